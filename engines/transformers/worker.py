"""The worker process of one base model: `python -m tuneloop.engines.transformers.worker FD CONFIG`.

The main thread steps the model; a reader thread takes messages off the socket, so that a long step never blocks the
server's writes; a loader thread reads adapters. The worker ends when its socket closes, whoever closed it.
"""

import contextlib
import ctypes
import gc
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from .config import TransformersConfig
from .protocol import (
    HEADER_BYTES,
    Ready,
    Refused,
    ToWorker,
    frame,
    frame_length,
    to_problem,
    to_worker_decoder,
)


class WorkerConfig(msgspec.Struct, frozen=True):
    """What the server tells a new worker on its command line."""

    path: str
    engine: TransformersConfig


class Inbox:
    """Messages from the server. `wake` makes a waiting `take` return without a message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._queue: SimpleQueue[ToWorker | None] = SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def wake(self) -> None:
        self._queue.put(None)

    def take(self, timeout: float) -> list[ToWorker]:
        """All messages there are; waits up to `timeout` seconds for the first one."""
        messages: list[ToWorker] = []
        with contextlib.suppress(Empty):
            first = self._queue.get(timeout=timeout) if timeout > 0 else self._queue.get_nowait()
            while True:
                if first is not None:
                    messages.append(first)
                first = self._queue.get_nowait()
        return messages

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while header := stream.read(HEADER_BYTES):
                    self._queue.put(to_worker_decoder.decode(stream.read(frame_length(header))))
        except (ConnectionError, msgspec.DecodeError, struct.error) as error:
            sys.stderr.write(f"the connection to the server broke: {error}\n")  # it died, also within a message
            sys.stderr.flush()
        os._exit(0)  # the server closed the socket or died: nobody waits for what this process computes


def main() -> None:
    gc.disable()  # nothing that the imports and the load make is garbage, and walking over it takes seconds
    connection = socket.socket(fileno=int(sys.argv[1]))
    config = msgspec.json.decode(sys.argv[2], type=WorkerConfig)
    _limit_threads(config.engine.threads)

    import transformers

    from ...storage.errors import TuneloopError
    from .core import EngineCore
    from .model import load_model

    transformers.utils.logging.disable_progress_bar()  # nobody watches the worker's stderr but for its last words
    inbox = Inbox(connection)
    try:
        began = time.monotonic()
        model = load_model(Path(config.path), config.engine)
        core = EngineCore(model, config.engine, send=lambda m: connection.sendall(frame(m)), wake=inbox.wake)
    except TuneloopError as error:
        connection.sendall(frame(Refused(to_problem(error))))
        return
    connection.sendall(
        frame(
            Ready(
                max_model_len=core.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=sorted(model.eos_token_ids),
                device=str(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                kernel=model.kernel,
                modules={
                    name: (linear.in_features, linear.parts[part].size)
                    for name, (linear, part) in model.modules.items()
                },
                kv_cache_tokens=core.scheduler.pool.capacity_tokens,
                load_seconds=time.monotonic() - began,
            )
        )
    )
    _return_freed_memory()
    gc.freeze()  # no later collection walks over the model and the libraries: each would be a pause in every stream
    gc.enable()
    core.run(inbox.take)


def _return_freed_memory() -> None:
    """Give the system back what loading has freed: glibc keeps it otherwise. Elsewhere there is nothing to call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _limit_threads(threads: int | None) -> None:
    """Compute threads, chosen before torch starts any."""
    count = (
        threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1
    )
    os.environ["OMP_NUM_THREADS"] = str(count)

    import torch

    torch.set_num_threads(count)


if __name__ == "__main__":
    main()
