"""What all parts of the benchmark share: the pulled model, a scratch folder, the peer, and adapters made for it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tuneloop.engines.sources import find_model

from .peft_folders import write_adapter


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What the tuning part compares; `trl` and `llamafactory` are the peers' Python interpreters."""

    data: Path | None = None
    steps: int | None = None  # None: one epoch
    rounds: int = 1
    threads: int = 2
    trl: Path | None = None
    llamafactory: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    home: Path
    scratch: Path
    model: Path
    peer: Path | None
    many: int
    tuning: Tuning

    @classmethod
    def prepare(cls, home: Path, scratch: Path, *, peer: Path | None, many: int, tuning: Tuning) -> "Setting":
        """Pull the embedded model once; refuse a peer that isn't there."""
        for executable in (peer, tuning.trl, tuning.llamafactory):
            if executable is not None and not executable.is_file():
                raise SystemExit(f"{executable} does not exist: `make bench` makes it, or leave its option out.")
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "tuneloop.server.cli", "pull", "smollm2-135m", "--home", str(home)], check=True
        )
        found = find_model("smollm2-135m", home)
        assert found is not None
        return cls(home=home, scratch=scratch, model=found.path, peer=peer, many=many, tuning=tuning)

    @property
    def config(self) -> dict[str, int]:
        config: dict[str, int] = json.loads((self.model / "config.json").read_text())
        return config

    def adapters(self, count: int, prefix: str, *, everything: bool = True) -> dict[str, Path]:
        """`count` random rank-8 adapters, written once a run."""
        made: dict[str, Path] = {}
        for number in range(count):
            folder = self.scratch / "adapters" / f"{prefix}{number}"
            if not folder.exists():
                write_adapter(folder, self.config, seed=number, everything=everything)
            made[f"{prefix}{number}"] = folder
        return made

    def fresh_home(self, name: str) -> Path:
        """A home of its own for one server run, sharing the pulled model by a link."""
        home = self.scratch / name
        home.mkdir()
        (home / "models").symlink_to(self.home / "models")
        return home
