"""`make bench`: our server beside vLLM's and transformers' `generate()`, same model and settings, with ratios.

Parts (choose with --only): throughput, upload, zipf, overhead. Nothing else should run on the machine meanwhile.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from . import overhead, throughput, upload, zipf
from .report import Report, machine
from .setting import Setting

PARTS = {"throughput": throughput.run, "upload": upload.run, "zipf": zipf.run, "overhead": overhead.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="vLLM's executable; left out: our own figures only")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="a part to run (may be repeated)")
    parser.add_argument("--home", type=Path, default=Path(".bench/home"), help="where the model is kept between runs")
    parser.add_argument("--adapters", type=int, default=1000, help="how many adapters the zipf part registers")
    arguments = parser.parse_args()
    report = Report(Path(".bench"))
    report.say(machine())
    with tempfile.TemporaryDirectory(prefix="tuneloop-bench-") as folder:
        setting = Setting.prepare(arguments.home.resolve(), Path(folder), arguments.peer, arguments.adapters)
        for name in arguments.only or list(PARTS):
            report.say(f"\n== {name}")
            report.keep(name, asyncio.run(PARTS[name](setting, report)))
    report.say(f"\nfigures: .bench/latest.json\n{machine()}")


if __name__ == "__main__":
    main()
