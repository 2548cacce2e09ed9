"""Which trackers there are, whether their packages are installed, and how all of a run are opened."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....storage.errors import InvalidInput
from .base import Options, Tracker, Warn
from .guarded import Guarded
from .mlflow import MLflow
from .swanlab import SwanLab
from .tensorboard import TensorBoard
from .wandb import WeightsAndBiases


@dataclass(frozen=True)
class _Known:
    title: str
    module: str
    package: str  # what pip calls it
    make: Callable[[Path, Options, Warn], Tracker]


_KNOWN = {
    "tensorboard": _Known("TensorBoard", "tensorboard", "tensorboard", TensorBoard),
    "wandb": _Known("Weights & Biases", "wandb", "wandb", WeightsAndBiases),
    "mlflow": _Known("MLflow", "mlflow", "mlflow-skinny", MLflow),
    "swanlab": _Known("SwanLab", "swanlab", "swanlab", SwanLab),
}
TRACKERS = tuple(_KNOWN)


def check_trackers(names: Sequence[str], *, param: str = "report_to") -> None:
    """Refuse trackers that are unknown or not installed. Imports none of them."""
    for name in names:
        known = _KNOWN.get(name)
        if known is None:
            raise InvalidInput(
                f"There is no tracker '{name}'. {param} takes {', '.join(TRACKERS[:-1])} and {TRACKERS[-1]}.",
                param=param,
            )
        if importlib.util.find_spec(known.module) is None:
            raise InvalidInput(
                f"{known.title} is not installed where this run trains. Install it with "
                f"`pip install {known.package}`, or take '{name}' out of {param}.",
                param=param,
            )


def open_trackers(
    names: Sequence[str],
    *,
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    warn: Warn,
    metadata: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """Start all of them; each writes into a folder of its name below `folder`.

    `options` has a tracker's settings by its name, with the keys of `Options`. `warn` hears of trackers that fail,
    once each; they stay in the list and do nothing.
    """
    check_trackers(names)
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        known = _KNOWN[name]
        chosen = Options.model_validate({k: v for k, v in options.get(name, {}).items() if v is not None})
        tracker = Guarded(known.make(folder / name, chosen, warn), known.title)
        tracker.start(chosen.name or run_name, config, metadata or {})
        opened.append(tracker)
    return opened
