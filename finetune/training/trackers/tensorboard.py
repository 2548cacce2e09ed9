"""Scalars for TensorBoard: event files in the run's folder, for `tensorboard --logdir`."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import Status, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Tracker):
    """The file is opened by the first step, which tells what an earlier, longer attempt's points must give way to."""

    _writer: "SummaryWriter | None" = None
    _texts: Mapping[str, str]

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        import torch.utils.tensorboard  # noqa: F401  (a broken installation shows here, not at the first step)

        self.folder.mkdir(parents=True, exist_ok=True)
        self._texts = {"run": run_name, "config": _markdown(config), "metadata": _markdown(metadata)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._writer or self._open(step if metrics else step + 1)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def finish(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.add_text("status", status)
            self._writer.close()

    def _open(self, first_step: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=first_step)
        for name, text in self._texts.items():
            self._writer.add_text(name, text)
        return self._writer


def _markdown(values: Mapping[str, Any]) -> str:
    """TensorBoard shows texts as Markdown; four spaces keep JSON as it is."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=1, default=str).splitlines())
