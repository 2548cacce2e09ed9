"""Which adapters are where: device slots, host memory, disk; least recently used leaves first. Knows no requests.

`claim` is called by the scheduler before a row runs: it gives the device slot, or None while the adapter is being read
by the loader thread or every slot is in use. Reading and preparing never happen in the step loop; installing does, as
it writes the tensors that the step reads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from ...storage.errors import InvalidInput, TuneloopError
from .batch import AdapterSlot
from .linear import AdaptedLinear
from .lora import PreparedAdapter, prepare

_FIRST_SLOTS = 4


@dataclass(slots=True)
class _Resident:
    slot: AdapterSlot
    users: int = 0
    retired: bool = False


@dataclass
class AdapterResidency:
    """`on_event` wakes the step loop when the loader has something."""

    modules: dict[str, tuple[AdaptedLinear, int]]
    max_slots: int
    max_rank: int
    cpu_bytes: int
    on_event: Callable[[], None]
    _device: OrderedDict[str, _Resident] = field(default_factory=OrderedDict)  # least recently used first
    _host: OrderedDict[str, PreparedAdapter] = field(default_factory=OrderedDict)
    _loading: set[str] = field(default_factory=set)
    _kept: frozenset[str] = frozenset()
    _capacity: dict[int, int] = field(default_factory=dict)  # slots reserved, by rank class
    _jobs: "SimpleQueue[tuple[str, Path] | None]" = field(default_factory=SimpleQueue)
    _done: "SimpleQueue[tuple[str, PreparedAdapter | TuneloopError]]" = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._linears = list({id(x): x for x, _ in self.modules.values()}.values())
        self._by_name = {x.name: x for x in self._linears}
        self._thread = threading.Thread(target=self._load_forever, name="adapter-loader", daemon=True)
        self._thread.start()

    @property
    def on_device(self) -> list[str]:
        return list(self._device)

    @property
    def on_host(self) -> list[str]:
        return list(self._host)

    def request(self, digest: str, path: Path) -> None:
        """Bring an adapter to host memory, if it isn't there or on its way."""
        resident = self._device.get(digest)
        if resident is not None:
            resident.retired = False
        if resident is not None or digest in self._host or digest in self._loading:
            return
        self._loading.add(digest)
        self._jobs.put((digest, path))

    def keep(self, paths: Mapping[str, Path]) -> None:
        """Load these adapters and let the others go before them from now on."""
        self._kept = frozenset(paths)
        for digest, path in paths.items():
            self.request(digest, path)

    def is_loading(self, digest: str) -> bool:
        return digest in self._loading

    def waits_for_slot(self, digest: str) -> bool:
        """Whether only a device slot is missing."""
        return digest in self._host and digest not in self._device

    def collect(self) -> list[tuple[str, TuneloopError | None]]:
        """Take what the loader has finished: (digest, None) for ready ones, (digest, error) for refused ones."""
        finished: list[tuple[str, TuneloopError | None]] = []
        while not self._done.empty():
            digest, result = self._done.get()
            if digest not in self._loading:
                continue  # forgotten meanwhile
            self._loading.discard(digest)
            if isinstance(result, TuneloopError):
                finished.append((digest, result))
            else:
                self._host[digest] = result
                self._trim(keep=digest)
                finished.append((digest, None))
        return finished

    def claim(self, digest: str, path: Path) -> AdapterSlot | None:
        """The device slot for one more user of `digest`, or None: not yet (`collect` tells of failures)."""
        resident = self._device.get(digest)
        if resident is None:
            prepared = self._host.get(digest)
            if prepared is None:
                self.request(digest, path)
                return None
            self._host.move_to_end(digest)
            resident = self._install(digest, prepared)
            if resident is None:
                return None
        self._device.move_to_end(digest)
        resident.users += 1
        return resident.slot

    def release(self, digest: str) -> None:
        resident = self._device[digest]
        resident.users -= 1
        if resident.users == 0 and resident.retired:
            self._evict(digest)

    def forget(self, digest: str) -> None:
        """Drop an adapter from memory, at once or when its last user leaves."""
        self._host.pop(digest, None)
        self._loading.discard(digest)
        resident = self._device.get(digest)
        if resident is None:
            return
        resident.retired = True
        if resident.users == 0:
            self._evict(digest)

    def close(self) -> None:
        self._jobs.put(None)

    def _install(self, digest: str, prepared: PreparedAdapter) -> _Resident | None:
        if len(self._device) >= self.max_slots:
            unused = [d for d, r in self._device.items() if r.users == 0]
            idle = next((d for d in unused if d not in self._kept), unused[0] if unused else None)
            if idle is None:
                return None
            self._evict(idle)
        rank = prepared.rank_class
        taken = {r.slot.index for r in self._device.values() if r.slot.rank_class == rank}
        index = next(i for i in range(len(taken) + 1) if i not in taken)
        if index >= self._capacity.get(rank, 0):
            self._capacity[rank] = min(self.max_slots, max(_FIRST_SLOTS, 2 * self._capacity.get(rank, 0)))
            for linear in self._linears:
                linear.reserve(rank, self._capacity[rank])
        for name, part in prepared.linears.items():
            self._by_name[name].install(rank, index, self._capacity[rank], part.a, part.b, part.magnitude)
        resident = _Resident(AdapterSlot(rank, index, prepared.uses_dora))
        self._device[digest] = resident
        return resident

    def _evict(self, digest: str) -> None:
        slot = self._device.pop(digest).slot
        for linear in self._linears:
            linear.clear(slot.rank_class, slot.index)
        if not any(r.slot.rank_class == slot.rank_class for r in self._device.values()):
            self._capacity.pop(slot.rank_class, None)

    def _trim(self, keep: str) -> None:
        size = sum(p.size_bytes for p in self._host.values())
        for digest in list(self._host):
            if size <= self.cpu_bytes:
                return
            if digest != keep and digest not in self._kept:
                size -= self._host.pop(digest).size_bytes

    def _load_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            digest, path = job
            try:
                result: PreparedAdapter | TuneloopError = prepare(path, digest, self.modules, self.max_rank)
            except TuneloopError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the file is that request's error
                result = InvalidInput(f"The adapter's files cannot be read: {error}", param="adapter")
            self._done.put((digest, result))
            self.on_event()

    def check_integrity(self) -> None:
        """Assert the invariants that tests and idle time rely on."""
        assert len(self._device) <= self.max_slots
        slots = [(r.slot.rank_class, r.slot.index) for r in self._device.values()]
        assert len(slots) == len(set(slots))
        assert all(r.users >= 0 for r in self._device.values())
        for linear in self._linears:
            for rank, stack in linear.stacks.items():
                assert {(rank, s) for s in stack.filled} <= set(slots)
