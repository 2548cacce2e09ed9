"""The registry's adapters: what a reference resolves to, and when a version leaves the engine's memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tuneloop.adapters.base import DEFAULT_ALIAS, Adapter, AdapterVersion, Alias
from tuneloop.adapters.events import AdapterEvent
from tuneloop.engines.base import Engine
from tuneloop.engines.catalog import ModelCatalog
from tuneloop.engines.fake import FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.registry import ModelRegistry, RegistryLimits
from tuneloop.engines.retirement import AdapterLeases
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage import Database
from tuneloop.storage.errors import InvalidInput, NotFound


class Shelf:
    """An adapter store reduced to what the registry sees of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: dict[str, AdapterVersion] = {}
        self.current: dict[str, AdapterVersion] = {}
        self.pinned: set[str] = set()
        self.held: list[str] = []
        self.callbacks: list[Callable[[AdapterEvent], None]] = []

    def publish(self, name: str, number: int, *, base: str = "base") -> AdapterVersion:
        version = AdapterVersion(
            name=name,
            version=number,
            base=base,
            digest=f"sha256:{name}-{number}",
            path=Path("/not/here/yet"),
            rank=8,
            alpha=16,
            targets=("model.layers.0.self_attn.q_proj",),
            use_dora=False,
            use_rslora=False,
            size_bytes=1,
            origin="upload",
            source=None,
            created_at=datetime.now(UTC),
        )
        self.versions[version.ref] = version
        self.point(name, number)
        return version

    def point(self, name: str, number: int) -> None:
        before = self.current.get(name)
        self.current[name] = self.versions[f"{name}@{number}"]
        released = () if before is None else (before.digest,)
        for callback in self.callbacks:
            callback(AdapterEvent(kind="alias", adapter=name, released=released))

    def pin(self, name: str) -> None:
        self.pinned.add(name)
        for callback in self.callbacks:
            callback(AdapterEvent(kind="pinned", adapter=name))

    def get(self, name: str) -> Adapter:
        current = self.current[name]
        now = datetime.now(UTC)
        alias = Alias(adapter=name, alias=DEFAULT_ALIAS, weights={current.version: 1.0}, updated_at=now)
        return Adapter(
            name=name,
            base=current.base,
            pinned=name in self.pinned,
            created_at=now,
            versions=tuple(v for v in self.versions.values() if v.name == name),
            aliases=(alias,),
        )

    def list(self, *, base: str | None = None) -> Sequence[Adapter]:
        return [a for a in map(self.get, self.current) if base in (None, a.base)]

    def known(self, name: str) -> bool:
        return name in self.current

    def resolve(self, ref: str, *, draw: float | None = None) -> AdapterVersion:
        if ref not in self.current and ref not in self.versions:
            raise NotFound(f"The adapter has no version or alias '{ref}'.")
        return self.current.get(ref) or self.versions[ref]

    async def materialise(self, version: AdapterVersion) -> Path:
        return self.folder / version.ref

    @asynccontextmanager
    async def hold(self, version: AdapterVersion) -> AsyncIterator[None]:
        self.held.append(version.ref)
        try:
            yield
        finally:
            self.held.remove(version.ref)

    def referenced(self, digest: str) -> bool:
        return any(version.digest == digest for version in self.current.values())

    def subscribe(self, callback: Callable[[AdapterEvent], None]) -> object:
        self.callbacks.append(callback)
        return None


class Bench:
    def __init__(self, registry: ModelRegistry, shelf: Shelf, engines: list[FakeEngine]) -> None:
        self.registry = registry
        self.shelf = shelf
        self.engines = engines

    @property
    def resident(self) -> set[str]:
        return {version.ref for version in self.engines[-1].resident.values()}

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await database.migrate()
    catalog = ModelCatalog(database, tmp_path / "home")
    folder = write_fake_checkpoint(tmp_path / "base")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    await catalog.start()
    await catalog.add("base", str(folder))
    shelf = Shelf(tmp_path)
    engines: list[FakeEngine] = []

    def build(name: str, path: Path, tokenizer: ChatTokenizer) -> Engine:
        engines.append(FakeEngine(tokenizer))
        return engines[-1]

    registry = ModelRegistry(
        catalog=catalog, adapters=shelf, engine_factory=build, limits=RegistryLimits(check_seconds=3600)
    )
    await registry.start([])
    yield Bench(registry, shelf, engines)
    registry.check_integrity()
    await registry.close()
    await database.close()


async def test_a_lease_of_an_adapter_has_its_base_and_its_local_files(bench: Bench, tmp_path: Path) -> None:
    version = bench.shelf.publish("support", 1)
    async with bench.registry.lease("support@1") as lease:
        assert (lease.ref, lease.base) == ("support@1", "base")
        assert lease.adapter == replace(version, path=tmp_path / "support@1")
        assert bench.shelf.held == ["support@1"]
    assert bench.shelf.held == []


async def test_what_cannot_be_resolved_is_not_found(bench: Bench) -> None:
    bench.shelf.publish("support", 1)
    bench.shelf.publish("lost", 1, base="elsewhere")
    for ref, message in (
        ("nobody", "The model 'nobody' does not exist"),
        ("nobody@prod", "The model 'nobody@prod' does not exist"),
        ("support@9", "no version or alias"),
        ("lost", "base model 'elsewhere', which this server does not know"),
    ):
        with pytest.raises(NotFound, match=message):
            async with bench.registry.lease(ref):
                pass
    assert bench.engines == []


async def test_a_replaced_version_leaves_memory_after_its_last_lease(bench: Bench) -> None:
    first = bench.shelf.publish("support", 1)
    await bench.registry.warm(first)
    async with bench.registry.lease("support") as one, bench.registry.lease("support") as two:
        second = bench.shelf.publish("support", 2)
        await bench.registry.warm(second)
        assert one.adapter == two.adapter
        async with bench.registry.lease("support") as three:
            assert three.adapter is not None
            assert three.adapter.version == 2
        await bench.settle()
        assert bench.resident == {"support@1", "support@2"}
    await bench.settle()
    assert bench.resident == {"support@2"}


async def test_a_version_that_nobody_holds_leaves_at_once(bench: Bench) -> None:
    await bench.registry.warm(bench.shelf.publish("support", 1))
    bench.shelf.publish("support", 2)
    await bench.settle()
    assert bench.resident == set()


async def test_a_version_that_was_rolled_back_to_stays(bench: Bench) -> None:
    await bench.registry.warm(bench.shelf.publish("support", 1))
    async with bench.registry.lease("support"):
        bench.shelf.publish("support", 2)
        bench.shelf.point("support", 1)
    await bench.settle()
    assert bench.resident == {"support@1"}


async def test_a_cancelled_request_lets_its_version_go(bench: Bench) -> None:
    await bench.registry.warm(bench.shelf.publish("support", 1))
    entered = asyncio.Event()

    async def hang() -> None:
        async with bench.registry.lease("support"):
            entered.set()
            await asyncio.Event().wait()

    request = asyncio.create_task(hang())
    await entered.wait()
    bench.shelf.publish("support", 2)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await bench.settle()
    assert bench.resident == set()
    assert bench.shelf.held == []


async def test_an_explicit_version_may_still_be_used_after_it_was_replaced(bench: Bench) -> None:
    first = bench.shelf.publish("support", 1)
    bench.shelf.publish("support", 2)
    for _ in range(2):
        async with bench.registry.lease("support@1") as lease:
            assert lease.adapter is not None
            await lease.engine.load_adapter(lease.adapter)
        await bench.settle()
        # It stays under the engine's own LRU: loading it for each request would be waste.
        assert bench.resident == {first.ref}


async def test_a_retirement_on_a_dead_engine_is_no_error(bench: Bench) -> None:
    await bench.registry.warm(bench.shelf.publish("support", 1))
    async with bench.registry.lease("support"):
        bench.engines[-1].die()
        bench.shelf.publish("support", 2)
    await bench.settle()


async def test_warming_an_unfit_adapter_says_why(bench: Bench) -> None:
    version = bench.shelf.publish("support", 1)
    await bench.registry.load("base")
    bench.engines[-1].refuse_adapter(version.digest, InvalidInput("Its rank is too large."))
    with pytest.raises(InvalidInput, match="rank is too large"):
        await bench.registry.warm(version)


def test_leases_are_counted_by_digest() -> None:
    referenced = {"x"}
    leases = AdapterLeases(referenced.__contains__)
    leases.begin("x")
    leases.begin("x")
    assert leases.held("x") == 2
    referenced.clear()
    assert leases.release("x") is False
    assert leases.end("x") is False
    assert leases.end("x") is True
    assert leases.held("x") == 0
    assert leases.release("x") is True  # safe to say twice: nobody holds it


async def test_pinned_adapters_are_kept_by_their_engine(bench: Bench) -> None:
    first = bench.shelf.publish("support", 1)
    bench.shelf.pin("support")
    async with bench.registry.lease("base"):
        await bench.settle()
    assert bench.engines[-1].kept == [first.digest]
    second = bench.shelf.publish("support", 2)
    bench.shelf.publish("other", 1)
    await bench.settle()
    assert bench.engines[-1].kept == [second.digest], "a pin follows the bare name"
    assert second.ref in bench.resident
