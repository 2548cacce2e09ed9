"""`make bench`: our server beside vLLM's and transformers' `generate()`, our trainer beside TRL's and LLaMA-Factory.

Parts (choose with --only): throughput, upload, zipf, overhead, tuning. Nothing else should run on the machine
meanwhile.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from . import overhead, throughput, tuning, upload, zipf
from .report import Report, machine
from .setting import Setting, Tuning

PARTS = {
    "throughput": throughput.run,
    "upload": upload.run,
    "zipf": zipf.run,
    "overhead": overhead.run,
    "tuning": tuning.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="vLLM's executable; left out: our own figures only")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="a part to run (may be repeated)")
    parser.add_argument("--home", type=Path, default=Path(".bench/home"), help="where the model is kept between runs")
    parser.add_argument("--adapters", type=int, default=1000, help="how many adapters the zipf part registers")
    group = parser.add_argument_group("tuning")
    group.add_argument("--trl", type=Path, help="Python of an environment with TRL; left out: without it")
    group.add_argument("--llamafactory", type=Path, help="Python of one with LLaMA-Factory; left out: without it")
    group.add_argument("--data", type=Path, help="alpaca rows as JSON; left out: generated rows")
    group.add_argument("--steps", type=int, help="steps of 8 rows; left out: one epoch")
    group.add_argument("--rounds", type=int, default=1, help="how often each trainer runs, in turn")
    arguments = parser.parse_args()
    compared = Tuning(
        data=arguments.data,
        steps=arguments.steps,
        rounds=arguments.rounds,
        trl=arguments.trl,
        llamafactory=arguments.llamafactory,
    )
    report = Report(Path(".bench"))
    report.say(machine())
    with tempfile.TemporaryDirectory(prefix="tuneloop-bench-") as folder:
        setting = Setting.prepare(
            arguments.home.resolve(), Path(folder), peer=arguments.peer, many=arguments.adapters, tuning=compared
        )
        for name in arguments.only or list(PARTS):
            report.say(f"\n== {name}")
            report.keep(name, asyncio.run(PARTS[name](setting, report)))
    report.say(f"\nfigures: .bench/latest.json\n{machine()}")


if __name__ == "__main__":
    main()
