"""A job's events as server-sent events: what happened so far, then what happens, then `[DONE]` after the job's end.

Every event carries its `seq` as id, so that a client that comes back (`Last-Event-ID`) misses nothing and sees nothing
twice. A stream that ends without `[DONE]` was cut by a server that shuts down: the job goes on, come back.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from ...finetune.jobs.records import JobEvent
from ..sse import DONE, encode_json
from .cards import event_card

_BEGIN = b"retry: 1000\n\n"  # the headers leave at once, though the next event may be minutes away
_LOOK_SECONDS = 1.0


async def event_stream(
    events: AsyncGenerator[JobEvent, None], *, draining: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    """Encoded events. `events` is closed with this, and when `draining` says that the server shuts down."""

    async def next_event() -> JobEvent | None:
        return await anext(events, None)

    waiting: asyncio.Task[JobEvent | None] | None = None
    try:
        yield _BEGIN
        while not draining():
            waiting = waiting or asyncio.create_task(next_event())
            await asyncio.wait((waiting,), timeout=_LOOK_SECONDS)
            if waiting.done():
                event, waiting = waiting.result(), None
                if event is None:
                    yield DONE
                    return
                yield b"id: %d\ndata: %s\n\n" % (event.seq, encode_json(event_card(event).model_dump()))
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()
