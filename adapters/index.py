"""All adapters in memory, so that a request's `model` is resolved without waiting. It knows no database, no files."""

import itertools
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from ..storage.errors import NotFound
from .base import DEFAULT_ALIAS, Adapter, AdapterVersion
from .refs import AdapterRef, parse_ref


class AdapterIndex:
    """Adapters by name, versions by number or alias. Every method is synchronous and costs no more than it must."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._references: Counter[str] = Counter()  # digest -> how many alias targets have it
        # Splitting traffic is no secret: a fast generator will do.
        self._random = random.Random()  # noqa: S311

    def put(self, adapter: Adapter) -> tuple[str, ...]:
        """Add or replace an adapter; returns the digests that it released (see AdapterEvent)."""
        return self._swap(adapter.name, _Entry(adapter))

    def remove(self, name: str) -> tuple[str, ...]:
        """Forget an adapter; returns the digests that it released. Unknown names are safe."""
        return self._swap(name, None)

    def list(self, *, base: str | None = None) -> list[Adapter]:
        """All adapters (of one base model), by name."""
        adapters = (entry.adapter for _, entry in sorted(self._entries.items()))
        return [adapter for adapter in adapters if base is None or adapter.base == base]

    def known(self, name: str) -> bool:
        return name in self._entries

    def referenced(self, digest: str) -> bool:
        return self._references[digest] > 0

    def get(self, name: str) -> Adapter:
        """Raises NotFound for an unknown name."""
        return self._entry(name).adapter

    def version(self, name: str, number: int) -> AdapterVersion:
        """Raises NotFound for an unknown name or number."""
        entry = self._entry(name)
        if number not in entry.versions:
            raise NotFound(
                f"The adapter {name!r} has no version {number}; it has {_join(entry.versions)}.",
                param="version",
                code="version_not_found",
            )
        return entry.versions[number]

    def resolve(self, ref: str, *, draw: float | None = None) -> AdapterVersion:
        """The version that a request for `ref` gets; see `AdapterStore.resolve`."""
        plain = self._entries.get(ref)
        parsed = AdapterRef(ref) if plain is not None else parse_ref(ref)
        if parsed.version is not None:
            return self.version(parsed.name, parsed.version)
        entry = plain or self._entry(parsed.name)
        alias = parsed.selector or DEFAULT_ALIAS
        target = entry.targets.get(alias)
        if target is None:
            raise NotFound(
                f"The adapter {parsed.name!r} has no alias {alias!r}; it has {_join(entry.targets)}.",
                param="model",
                code="alias_not_found",
            )
        return target.pick(self._random.random() if draw is None else draw)

    def check_integrity(self) -> None:
        """For tests and idle time: the counted references are those of the aliases."""
        counted = Counter(digest for entry in self._entries.values() for digest in entry.digests())
        if self._references != counted:
            raise AssertionError(f"counted {counted}, kept {self._references}")

    def _entry(self, name: str) -> "_Entry":
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(
                f"There is no adapter {name!r}; GET /v1/adapters lists those that exist.",
                param="name",
                code="adapter_not_found",
            )
        return entry

    def _swap(self, name: str, new: "_Entry | None") -> tuple[str, ...]:
        old = self._entries.pop(name, None)
        if new is not None:
            self._entries[name] = new
            self._references.update(new.digests())
        if old is None:
            return ()
        self._references.subtract(old.digests())
        kept = new.versions if new is not None else {}
        deleted = (version.digest for number, version in old.versions.items() if number not in kept)
        touched = dict.fromkeys(itertools.chain(old.digests(), deleted))
        released = tuple(digest for digest in touched if self._references[digest] == 0)
        for digest in released:
            del self._references[digest]
        return released


class _Entry:
    """One adapter with its versions and alias targets at hand."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.versions = {version.version: version for version in adapter.versions}
        self.targets = {
            alias.alias: _Target((self.versions[number], weight) for number, weight in sorted(alias.weights.items()))
            for alias in adapter.aliases
        }

    def digests(self) -> list[str]:
        return [version.digest for target in self.targets.values() for version in target.versions]


class _Target:
    """Where an alias points: versions with the upper ends of their shares of [0, 1)."""

    def __init__(self, weighted: Iterable[tuple[AdapterVersion, float]]) -> None:
        pairs = list(weighted)
        self.versions = [version for version, _ in pairs]
        self._ends = list(itertools.accumulate(weight for _, weight in pairs))

    def pick(self, draw: float) -> AdapterVersion:
        if len(self.versions) == 1:
            return self.versions[0]
        # Shares add up to 1 but for rounding; scaled, the last one's end is never missed.
        place = bisect_right(self._ends, draw * self._ends[-1])
        return self.versions[min(place, len(self.versions) - 1)]


def _join(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
