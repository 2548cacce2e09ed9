"""The registry's models: shared loads, leases, the memory budget, idle unloading, deaths and restarts."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import pytest
from tuneloop.adapters.base import Adapter, AdapterVersion
from tuneloop.adapters.events import AdapterEvent
from tuneloop.engines.base import Engine
from tuneloop.engines.catalog import ModelCatalog
from tuneloop.engines.fake import FakeConfig, FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.registry import ModelRegistry, RegistryLimits
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage import Database
from tuneloop.storage.errors import Conflict, InvalidInput, NotFound, Unavailable

MIB = 1024**2


class NoAdapters:
    def known(self, name: str) -> bool:
        return False

    def get(self, name: str) -> Adapter:
        raise NotFound(f"no {name}")

    def list(self, *, base: str | None = None) -> Sequence[Adapter]:
        return []

    def resolve(self, ref: str, *, draw: float | None = None) -> AdapterVersion:
        raise NotFound(f"no {ref}")

    async def materialise(self, version: AdapterVersion) -> Path:
        return version.path

    def hold(self, version: AdapterVersion) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def referenced(self, digest: str) -> bool:
        return False

    def subscribe(self, callback: Callable[[AdapterEvent], None]) -> object:
        return None


class World:
    """A registry over models `a`, `b` and `c`, whose engines are fakes that can be looked at and told to fail."""

    def __init__(self, catalog: ModelCatalog, limits: RegistryLimits) -> None:
        self.now = 0.0
        self.engines: dict[str, list[FakeEngine]] = {}
        self.config = FakeConfig(rss_bytes=100 * MIB)
        self.catalog = catalog
        self.registry = ModelRegistry(
            catalog=catalog,
            adapters=NoAdapters(),
            engine_factory=self._build,
            limits=limits,
            clock=lambda: self.now,
        )

    def _build(self, name: str, path: Path, tokenizer: ChatTokenizer) -> Engine:
        engine = FakeEngine(tokenizer, config=self.config)
        self.engines.setdefault(name, []).append(engine)
        return engine

    def state(self, name: str) -> str:
        return self.registry.status(name).state

    async def use(self, *names: str) -> None:
        for name in names:
            self.now += 1
            async with self.registry.lease(name):
                pass


def write_model(folder: Path, *, weight_bytes: int = 8) -> Path:
    write_fake_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    header = json.dumps({"w": {"dtype": "U8", "shape": [weight_bytes], "data_offsets": [0, weight_bytes]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(weight_bytes))
    return folder


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[ModelCatalog]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await database.migrate()
    catalog = ModelCatalog(database, tmp_path / "home")
    await catalog.start()
    for name in ("a", "b", "c"):
        await catalog.add(name, str(write_model(tmp_path / name)))
    yield catalog
    await database.close()


@pytest.fixture
async def make_world(catalog: ModelCatalog) -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(*, budget: int | None = None, idle: float | None = None) -> World:
        # Supervision rounds run when a test calls for one, not by time.
        limits = RegistryLimits(memory_budget_bytes=budget, idle_seconds=idle, check_seconds=3600)
        worlds.append(World(catalog, limits))
        return worlds[-1]

    yield make
    for world in worlds:
        world.registry.check_integrity()
        await world.registry.close()
        assert all(engine.closed for engines in world.engines.values() for engine in engines)


MakeWorld = Callable[..., World]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the condition never came true")


async def test_concurrent_first_requests_share_one_load(make_world: MakeWorld) -> None:
    world = make_world()

    async def request() -> object:
        async with world.registry.lease("a") as lease:
            return lease.engine

    engines = await asyncio.gather(*(request() for _ in range(20)))
    assert len(world.engines["a"]) == 1
    assert set(map(id, engines)) == {id(world.engines["a"][0])}


async def test_a_lease_names_what_was_asked_for(make_world: MakeWorld) -> None:
    world = make_world()
    async with world.registry.lease("a") as lease:
        assert (lease.ref, lease.base, lease.adapter) == ("a", "a", None)
        assert lease.info.max_model_len == 2048
        assert lease.tokenizer.vocab_size == lease.info.vocab_size
        status = world.registry.status("a")
        assert (status.state, status.in_flight) == ("ready", 1)
    assert world.registry.status("a").last_used is not None


async def test_unknown_names_load_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    for name in ("nobody/nothing", "hf:org/name", "a@1"):
        with pytest.raises(NotFound) as caught:
            async with world.registry.lease(name):
                pass
        assert caught.value.param == "model"
    assert world.engines == {}


async def test_counts_survive_exceptions_and_cancellations(make_world: MakeWorld) -> None:
    world = make_world()

    async def fail() -> None:
        async with world.registry.lease("a"):
            raise RuntimeError("the request failed")

    async def hang() -> None:
        async with world.registry.lease("a"):
            await asyncio.Event().wait()

    with pytest.raises(RuntimeError):
        await fail()
    tasks = [asyncio.create_task(hang()) for _ in range(5)]
    await until(lambda: world.registry.status("a").in_flight == 5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert world.registry.status("a").in_flight == 0
    await world.registry.unload("a")


async def test_a_cancelled_waiter_leaves_the_load_to_the_others(make_world: MakeWorld) -> None:
    world = make_world()
    world.config = FakeConfig(load_seconds=0.05)
    first = asyncio.create_task(world.use("a"))
    second = asyncio.create_task(world.use("a"))
    await until(lambda: "a" in world.engines)
    first.cancel()
    await second
    assert first.cancelled()
    assert len(world.engines["a"]) == 1
    assert world.registry.status("a").in_flight == 0


async def test_a_failing_load_gives_the_reason_and_the_next_request_tries_again(make_world: MakeWorld) -> None:
    world = make_world()
    world.config = FakeConfig(start_error=InvalidInput("The architecture is from the future."))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"'a' could not be loaded: The architecture is from the future\."):
            await world.use("a")
    assert world.state("a") == "failed"
    assert world.registry.status("a").reason == "The architecture is from the future."
    assert all(engine.closed for engine in world.engines["a"])
    world.config = FakeConfig()
    await world.use("a")
    assert world.state("a") == "ready"


async def test_an_unexpected_failure_is_a_reason_too(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()

    async def explode(self: FakeEngine) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr(FakeEngine, "start", explode)
    with pytest.raises(Unavailable, match="ZeroDivisionError: one over none"):
        await world.use("a")
    assert world.engines["a"][0].closed


async def test_unload_gives_the_engine_back_and_the_next_request_loads_again(make_world: MakeWorld) -> None:
    world = make_world()
    await world.use("a")
    status = await world.registry.unload("a")
    assert (status.state, status.info, status.stats) == ("unloaded", None, None)
    assert world.engines["a"][0].closed
    await world.use("a")
    assert len(world.engines["a"]) == 2


async def test_unload_is_refused_while_in_use(make_world: MakeWorld) -> None:
    world = make_world()
    async with world.registry.lease("a"):
        with pytest.raises(Conflict, match="in use by 1 request"):
            await world.registry.unload("a")
        assert world.state("a") == "ready"


async def test_unload_may_wait_for_the_requests_and_refuses_new_ones_meanwhile(make_world: MakeWorld) -> None:
    world = make_world()
    async with world.registry.lease("a"):
        unloading = asyncio.create_task(world.registry.unload("a", wait_seconds=10))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="being unloaded"):
            await world.use("a")
    assert (await unloading).state == "unloaded"
    await world.use("a")


async def test_unload_that_waits_in_vain_leaves_the_model(make_world: MakeWorld) -> None:
    world = make_world()
    async with world.registry.lease("a"):
        with pytest.raises(Conflict):
            await world.registry.unload("a", wait_seconds=0.01)
    await world.use("a")
    assert len(world.engines["a"]) == 1


@pytest.mark.parametrize("at_once", [True, False])
async def test_unload_during_load_ends_the_load(make_world: MakeWorld, at_once: bool) -> None:
    world = make_world()
    world.config = FakeConfig(load_seconds=60)
    loading = asyncio.create_task(world.registry.load("a"))
    await asyncio.sleep(0)
    if not at_once:
        await until(lambda: "a" in world.engines)
        await asyncio.sleep(0.01)
    await world.registry.unload("a")
    with pytest.raises(Unavailable, match="unloaded while it was loading"):
        await loading
    assert world.state("a") == "unloaded"
    assert all(engine.closed for engine in world.engines.get("a", []))


async def test_unload_during_load_is_refused_while_a_request_waits_for_it(make_world: MakeWorld) -> None:
    world = make_world()
    world.config = FakeConfig(load_seconds=0.05)
    request = asyncio.create_task(world.use("a"))
    await until(lambda: world.state("a") == "loading")
    with pytest.raises(Conflict):
        await world.registry.unload("a")
    await request


async def test_the_least_recently_used_model_makes_room(make_world: MakeWorld) -> None:
    world = make_world(budget=250 * MIB)
    await world.use("a", "b", "a", "c")
    assert {name: world.state(name) for name in "abc"} == {"a": "ready", "b": "ready", "c": "ready"}
    await world.registry.check()  # `c` has grown beyond its weights on disk
    assert {name: world.state(name) for name in "abc"} == {"a": "ready", "b": "unloaded", "c": "ready"}


async def test_room_is_made_before_a_load(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(budget=200 * MIB)
    await world.use("a", "b")
    await world.catalog.add("big", str(write_model(tmp_path / "big", weight_bytes=60 * MIB)))
    await world.use("big")
    assert {name: world.state(name) for name in ("a", "b", "big")} == {"a": "unloaded", "b": "ready", "big": "ready"}


async def test_the_budget_never_unloads_a_leased_or_pinned_model(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(budget=200 * MIB)
    await world.catalog.add("big", str(write_model(tmp_path / "big", weight_bytes=60 * MIB)))
    await world.registry.load("a", pinned=True)
    async with world.registry.lease("b"):
        with pytest.raises(Unavailable, match=r"'big' needs at least 60 MiB.*budget is 200 MiB.*take 200 MiB"):
            await world.use("big")
        await world.registry.check()
        assert (world.state("a"), world.state("b")) == ("ready", "ready")
    await world.use("big")
    assert (world.state("a"), world.state("b")) == ("ready", "unloaded")


async def test_a_model_alone_over_the_budget_is_not_thrown_out(make_world: MakeWorld) -> None:
    world = make_world(budget=50 * MIB)
    await world.use("a")
    await world.registry.check()
    assert world.state("a") == "ready"


async def test_idle_models_are_unloaded_but_not_leased_or_pinned_ones(make_world: MakeWorld) -> None:
    world = make_world(idle=60)
    await world.use("a", "b")
    await world.registry.pin("b", True)
    async with world.registry.lease("c"):
        world.now += 58
        await world.registry.check()
        assert world.state("a") == "ready"
        world.now += 60
        await world.registry.check()
        assert [world.state(name) for name in "abc"] == ["unloaded", "ready", "ready"]
    await world.registry.check()
    assert world.state("c") == "ready"  # its last use has just ended


async def test_a_dead_engine_is_loaded_again_by_the_next_request(make_world: MakeWorld) -> None:
    world = make_world()
    async with world.registry.lease("a"):
        world.engines["a"][0].die("killed by signal 9")
        assert world.state("a") == "failed"
        await world.registry.check()
        await until(lambda: world.engines["a"][0].closed)
        assert "killed by signal 9" in (world.registry.status("a").reason or "")
    await world.use("a")
    assert len(world.engines["a"]) == 2
    assert world.engines["a"][0].closed


async def test_models_named_at_start_are_loaded_and_restarted_with_backoff(make_world: MakeWorld) -> None:
    world = make_world()
    await world.registry.start(["a"])
    assert world.registry.ready()[0] is False
    await until(lambda: world.state("a") == "ready")
    assert world.registry.ready() == (True, [])

    world.engines["a"][-1].die()
    is_ready, reasons = world.registry.ready()
    assert not is_ready
    assert reasons[0].startswith("The model 'a' has failed: ")
    await world.registry.check()  # the first time at once
    await until(lambda: world.state("a") == "ready")

    world.engines["a"][-1].die()
    await world.registry.check()
    await asyncio.sleep(0.01)
    assert world.state("a") == "failed"  # the second time after a second
    world.now += 1
    await world.registry.check()
    await until(lambda: world.state("a") == "ready")
    assert len(world.engines["a"]) == 3


async def test_a_restart_after_a_long_life_is_at_once(make_world: MakeWorld) -> None:
    world = make_world()
    await world.registry.start(["a"])
    for count in range(1, 5):
        await until(lambda: world.state("a") == "ready")
        assert len(world.engines["a"]) == count
        world.now += 60
        world.engines["a"][-1].die()
        await world.registry.check()


async def test_other_models_are_not_restarted_until_asked_for(make_world: MakeWorld) -> None:
    world = make_world()
    await world.registry.start(["a"])
    await world.use("b")
    world.engines["b"][-1].die()
    await world.registry.check()
    await asyncio.sleep(0.01)
    assert len(world.engines["b"]) == 1
    assert world.engines["b"][0].closed


async def test_a_model_that_can_never_be_served_is_not_tried_again_by_itself(make_world: MakeWorld) -> None:
    world = make_world()
    world.config = FakeConfig(start_error=InvalidInput("No such architecture."))
    await world.registry.start(["a", "b"])
    await until(lambda: world.state("b") == "failed")
    world.now += 3600
    await world.registry.check()
    await asyncio.sleep(0.01)
    assert len(world.engines["a"]) == 1
    assert world.registry.ready() == (
        False,
        [f"The model '{name}' has failed: No such architecture." for name in ("a", "b")],
    )


async def test_an_unloaded_model_named_at_start_still_can_answer(make_world: MakeWorld) -> None:
    world = make_world()
    await world.registry.start(["a"])
    await until(lambda: world.state("a") == "ready")
    await world.registry.unload("a")
    assert world.registry.ready() == (True, [])


async def test_start_takes_sources_and_refuses_what_is_no_model(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world()
    await world.registry.start([f"mine={write_model(tmp_path / 'x')}", str(write_model(tmp_path / "y")), "mine"])
    await until(lambda: world.state("mine") == world.state("y") == "ready")
    with pytest.raises(NotFound, match="does not exist"):
        await world.registry.start([str(tmp_path / "nowhere")])


async def test_load_makes_a_new_source_known(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world()
    status = await world.registry.load("new", source=str(write_model(tmp_path / "new")), pinned=True)
    assert (status.state, status.pinned, status.source) == ("ready", True, str(tmp_path / "new"))
    with pytest.raises(Conflict, match="stands for"):
        await world.registry.load("new", source=str(tmp_path / "a"))
    with pytest.raises(NotFound):
        await world.registry.load("unheard-of")


async def test_modules_load_the_model(make_world: MakeWorld) -> None:
    world = make_world()
    assert "model.layers.0.self_attn.q_proj" in await world.registry.modules("a")


async def test_nothing_is_loaded_after_close(make_world: MakeWorld) -> None:
    world = make_world()
    await world.use("a")
    await world.registry.close()
    await world.registry.close()
    assert world.registry.ready()[0] is False
    with pytest.raises(Unavailable, match="shutting down"):
        await world.use("a")


async def test_close_ends_loads_and_their_waiters(make_world: MakeWorld) -> None:
    world = make_world()
    world.config = FakeConfig(load_seconds=60)
    request = asyncio.create_task(world.use("a"))
    await until(lambda: "a" in world.engines)
    await world.registry.close()
    with pytest.raises(Unavailable):
        await request


async def test_many_requests_over_few_models_under_a_tight_budget(make_world: MakeWorld) -> None:
    """Models come and go all the time; no request ever sees a closed engine."""
    world = make_world(budget=150 * MIB)
    served: list[str] = []

    async def client(names: Iterable[str]) -> None:
        for name in names:
            world.now += 1
            async with world.registry.lease(name) as lease:
                await asyncio.sleep(0)
                assert lease.engine.alive
                served.append(name)
            await world.registry.check()
            world.registry.check_integrity()

    await asyncio.gather(*(client("abcabc"[shift : shift + 4] * 5) for shift in range(3)))
    assert len(served) == 60
    assert len(world.engines["a"]) > 1
