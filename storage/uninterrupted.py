"""Work that is finished once it has begun, even if the caller is cancelled meanwhile. It knows nothing of the work."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end. A cancellation that arrives meanwhile is raised afterwards, in place of the result."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # nobody is left to read it; without this the loop would complain
        raise cancelled
    return task.result()
