"""A phase of a run for tests of launchers: does what `data/mode` in the run's folder says. It loads no model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path, phase: str) -> int:
    """Leaves a `ready.<rank>` file with its process id."""
    rank = os.environ.get("RANK", "0")
    mode = (folder / "mode").read_text()
    print(f"{phase} in {Path.cwd()}", flush=True)
    if mode == "flood":
        for _ in range(4000):
            print("x" * 100)
        return 0
    if mode == "fail":
        print("the last words", file=sys.stderr)
        return 3
    if mode == "polite":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if mode == "heir" and os.fork() == 0:  # a child that inherits the lock
        (folder / "heir").write_text(str(os.getpid()))
        time.sleep(60)
        return 0
    if mode == "environment":
        lines = [f"{name}={value}" for name, value in os.environ.items()]
        (folder / "environment").write_text("\n".join([*lines, *sys.path]))
        return 0
    if mode == "detached":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        (folder / "heir").write_text(str(child.pid))
    (folder / f"ready.{rank}").write_text(str(os.getpid()))
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
