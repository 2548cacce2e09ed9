"""How a new version gets in: checked, its files stored, then one transaction. It knows no memory and no subscriber."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from ..storage import Database
from ..storage.errors import Conflict, InvalidInput, NotFound, TooLarge, Unavailable
from . import rows
from .base import Adapter, AdapterFacts, AdapterLimits, AdapterVersion, Origin
from .blobs import AdapterBlobs
from .events import Kind
from .refs import check_name

T = TypeVar("T")
Expect = Literal["new", "existing", "any"]
_ATTEMPTS = 10


class Change(Protocol):
    """`AdapterStore`'s way to change an adapter: run `work` in a transaction, then let the memory follow."""

    def __call__(self, name: str, kind: Kind, work: Callable[[AsyncSession], Awaitable[T]]) -> Awaitable[T]: ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What may become a version; see `AdapterStore.publish`."""

    name: str
    base: str
    facts: AdapterFacts
    origin: Origin
    source: str | None
    metrics: Mapping[str, Any]
    expect: Expect
    move_default: bool

    def check(self, limits: AdapterLimits) -> None:
        """Raises InvalidInput for a malformed name, TooLarge over the limits."""
        check_name(self.name)
        if not self.base:
            raise InvalidInput("The adapter needs the name of its base model.", param="base")
        if self.facts.rank > limits.max_rank:
            raise TooLarge(
                f"The adapter's rank {self.facts.rank} is over this server's limit of {limits.max_rank}; train it with "
                "a smaller rank or raise max_lora_rank.",
                param="file",
            )
        if self.facts.size_bytes > limits.max_bytes:
            raise TooLarge(
                f"The adapter has {self.facts.size_bytes} bytes, over this server's limit of {limits.max_bytes}.",
                param="file",
            )

    def match(self, existing: Adapter | None) -> AdapterVersion | None:
        """The version that has this content already, if that is the current default.

        Raises Conflict or NotFound if the candidate does not fit what exists.
        """
        if existing is None:
            if self.expect == "existing":
                raise NotFound(
                    f"There is no adapter {self.name!r} to give a new version; create it with POST /v1/adapters.",
                    param="name",
                    code="adapter_not_found",
                )
            return None
        if self.expect == "new":
            raise Conflict(
                f"The adapter {self.name!r} exists already; give it a new version with PUT /v1/adapters/{self.name}, "
                "or choose another name.",
                param="name",
                code="adapter_exists",
            )
        if existing.base != self.base:
            raise Conflict(
                f"The adapter {self.name!r} belongs to the base model {existing.base!r}, not to {self.base!r}; "
                "choose another name for it.",
                param="base",
                code="base_mismatch",
            )
        current = [version for version in existing.versions if version.version in existing.default_weights]
        return current[0] if len(current) == 1 and current[0].digest == self.facts.digest else None


async def publish(
    candidate: Candidate, folder: Path, *, database: Database, blobs: AdapterBlobs, change: Change
) -> AdapterVersion:
    """Store the files, then the version; on any failure neither is left."""

    async def look(session: AsyncSession) -> Adapter | None:
        found = await rows.load(session, blobs.folder, candidate.name)
        return found[0] if found else None

    async def work(session: AsyncSession) -> AdapterVersion:
        row = await rows.lock_if_there(session, candidate.name)
        # No row, nothing to lock: another replica may create it after this look, and then `create` fails.
        same = candidate.match(await look(session) if row is not None else None)
        if same is not None:
            return same
        row = row or await rows.create(session, candidate.name, candidate.base)
        number = await rows.add_version(
            session,
            row,
            facts=candidate.facts,
            origin=candidate.origin,
            source=candidate.source,
            metrics=candidate.metrics,
            move_default=candidate.move_default,
        )
        [adapter] = await rows.load(session, blobs.folder, candidate.name)
        return next(version for version in adapter.versions if version.version == number)

    # A look before the files are copied: most refusals, and repeated uploads, then cost next to nothing.
    async with database.transaction(read_only=True) as session:
        same = candidate.match(await look(session))
    if same is not None:
        return same
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with blobs.stored(candidate.facts.digest, folder):
                    return await change(candidate.name, "published", work)
            except IntegrityError as error:
                # Another replica created the same adapter, or removed the same blob, at the same moment.
                if attempt == _ATTEMPTS:
                    raise Unavailable(
                        f"The adapter {candidate.name!r} is being changed by other servers; try again."
                    ) from error
        raise AssertionError("the last attempt returns or raises")
    except BaseException:
        await blobs.collect_quietly()
        raise
