"""From a model's name and prompts to a running Generation: the lease, the deadline, and what undoes both on failure."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from ...engines.base import GenerateRequest
from ...engines.registry import ModelLease, ModelRegistry
from ...storage.errors import DeadlineExceeded
from ..metrics import Metrics
from .run import Generation

# Prepares the engine's requests once the model is known; gets the lease and the deadline.
Prepare = Callable[[ModelLease, float | None], Awaitable[Sequence[GenerateRequest]]]


async def start_generation(
    registry: ModelRegistry, metrics: Metrics, *, model: str, timeout_seconds: float | None, prepare: Prepare
) -> Generation:
    """Lease the model (loading it if need be), prepare the prompts, and wait for the engine's first chunk.

    Everything that can be wrong with a request is raised here, before a response has begun. The caller closes the
    Generation. Raises what the registry, `prepare` and the engine raise, and DeadlineExceeded.
    """
    arrived = time.monotonic()
    deadline = None if timeout_seconds is None else arrived + timeout_seconds
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(timeout_seconds):
                lease = await stack.enter_async_context(registry.lease(model))
                requests = await prepare(lease, deadline)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The model '{model}' was not ready within {timeout_seconds:g} seconds; try again later."
            ) from None
        generation = Generation(lease, requests, metrics=metrics, stack=stack.pop_all(), arrived=arrived)
    try:
        await generation.begin()
    except BaseException:
        await generation.aclose()
        raise
    return generation


def fingerprint(lease: ModelLease) -> str:
    """OpenAI's `system_fingerprint`: what exactly answered, the adapter's version and digest included."""
    if lease.adapter is None:
        return f"fp_{lease.base}"
    return f"fp_{lease.adapter.ref}_{lease.adapter.digest.removeprefix('sha256:')[:12]}"
