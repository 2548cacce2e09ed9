"""Stands in for `python -m tuneloop.finetune`: writes the events of a run that a test has scripted, and trains nothing.

A line of the run's `script` file is one of: an event as JSON, `sleep SECONDS`, `checkpoint STEP`, `kill` (itself), or
`serve` (go on until the run is asked to pause, then save and stop).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tuneloop.finetune.events import EventWriter
from tuneloop.finetune.run_folder import RunFolder


def main(folder: Path, phase: str, script: Path) -> None:
    run = RunFolder(folder)
    events = EventWriter(run.events)
    if phase == "prepare":
        run.data.mkdir(exist_ok=True)
        sys.stderr.write("preparing\n")
    attempt = sum(1 for _ in folder.glob(f"{phase}.attempt.*"))
    (folder / f"{phase}.attempt.{attempt}").touch()
    phases: dict[str, list[list[Any]]] = json.loads(script.read_text())
    for step in phases[phase][min(attempt, len(phases[phase]) - 1)]:
        play(run, events, step)


def play(run: RunFolder, events: EventWriter, step: Any) -> None:
    if isinstance(step, dict):
        if step["kind"] == "prepared":
            (run.data / "prepared.json").write_text("{}")
        events.write(step.pop("kind"), step.pop("message", ""), level=step.pop("level", "info"), **step)
    elif step[0] == "sleep":
        time.sleep(step[1])
    elif step[0] == "checkpoint":
        run.checkpoint(step[1]).mkdir(parents=True)
    elif step[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        while run.wanted() is None:
            time.sleep(0.02)
        run.checkpoint(7).mkdir(parents=True, exist_ok=True)
        events.write("stopped", "Stopped after step 7.", reason="pause", step=7)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
