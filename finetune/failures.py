"""Why a run failed, in words for the person who started it. It knows exceptions, not what raised them."""

import errno
import traceback

from ..storage.errors import InvalidInput, StorageFull, TuneloopError
from .events import EventWriter


class RunFailed(InvalidInput):
    """A run cannot go on, and the message says what to change."""

    code = "training_failed"


class Diverged(RunFailed):
    code = "diverged"


class OutOfMemory(RunFailed):
    code = "out_of_memory"


def explain(error: BaseException) -> TuneloopError:
    """The error as one that a person can act on. The traceback of a bug of ours goes to the run's log."""
    if isinstance(error, TuneloopError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            "The disk is full. Checkpoints that were saved before are complete; make room and resume the job."
        )
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return OutOfMemory(
            "The memory did not suffice for a training step. Set a smaller cutoff_len or per_device_train_batch_size "
            "(with more gradient_accumulation_steps the result stays the same), or gradient_checkpointing: true."
        )
    return RunFailed(
        f"The trainer met an error that it does not know ({type(error).__name__}: {error}). The run's log.txt has the "
        "details; checkpoints that were saved stay usable."
    )


def report(events: EventWriter, error: BaseException) -> None:
    """Write the `failed` event, and the traceback to standard error (log.txt)."""
    traceback.print_exception(error)
    known = explain(error)
    place = getattr(known, "place", None)
    try:
        events.write(
            "failed",
            known.message,
            level="error",
            code=known.code,
            param=known.param,
            line=getattr(place, "line", None),
        )
    except OSError:  # a full disk has no room for the event either: the launcher tells the exit from the log's end
        traceback.print_exc()


def _is_torch_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for accelerators; its CPU allocator raises RuntimeError with this text only."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
