"""The adapter store on a real database and real folders: what comes in, what it is called, what is left."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from tuneloop.adapters import AdapterEvent, AdapterFacts, AdapterLimits, AdapterStore, AdapterVersion
from tuneloop.storage import Database, ObjectStore, tables
from tuneloop.storage.errors import Conflict, InvalidInput, NotFound, TooLarge, TuneloopError, Unavailable


def facts(content: str, *, rank: int = 8, size_bytes: int = 10) -> AdapterFacts:
    return AdapterFacts(
        digest=f"sha256:{content.encode().hex():0>64}",
        peft_type="LORA",
        base_model_name="base",
        rank=rank,
        alpha=16.5,
        targets=("model.q_proj", "model.v_proj"),
        use_dora=True,
        use_rslora=False,
        size_bytes=size_bytes,
    )


async def publish(store: AdapterStore, name: str, content: str, **options: Any) -> AdapterVersion:
    async with store.staging() as folder:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(content)
        return await store.publish(
            folder, **{"name": name, "base": "base", "facts": facts(content), "origin": "upload", **options}
        )


def content(version: AdapterVersion) -> str:
    assert {path.name for path in version.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    return (version.path / "adapter_model.safetensors").read_text()


class Home:
    """A home folder with one database and one object store; `open()` is a server's start."""

    def __init__(self, folder: Path, storage_url: str, database_url: str | None = None) -> None:
        self.folder = folder
        self.storage_url = storage_url
        self.database_url = database_url or f"sqlite:///{folder}/tuneloop.db"

    @asynccontextmanager
    async def open(self, home: Path | None = None) -> AsyncIterator[AdapterStore]:
        database = Database(self.database_url)
        await database.migrate()
        limits = AdapterLimits(max_rank=64, max_bytes=1000)
        store = AdapterStore(database, ObjectStore(self.storage_url), home=home or self.folder, limits=limits)
        try:
            await store.start()
            yield store
            store.check_integrity()
        finally:
            await store.close()
            await database.close()

    async def blobs(self) -> list[str]:
        return await ObjectStore(self.storage_url).list("adapters")

    async def rows(self) -> int | None:
        database = Database(self.database_url)
        async with database.transaction(read_only=True) as session:
            count = await session.scalar(select(func.count()).select_from(tables.AdapterBlob))
        await database.close()
        return count


@pytest.fixture(params=["local", "memory"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    remote = f"memory://{uuid.uuid4().hex}"
    return Home(tmp_path, str(tmp_path / "blobs") if request.param == "local" else remote)


@pytest.fixture
async def store(home: Home) -> AsyncIterator[AdapterStore]:
    async with home.open() as store:
        yield store


async def test_a_version_is_stored_and_survives_a_restart(home: Home) -> None:
    async with home.open() as store:
        version = await publish(store, "org/a", "one", origin="hub", source="org/a", metrics={"loss": 0.5})
        assert version.ref == "org/a@1"
        assert store.resolve("org/a") == version
        assert content(version) == "one"
    async with home.open() as store:
        assert store.resolve("org/a") == version
        assert await store.materialise(version) == version.path
        assert content(version) == "one"
        assert (version.alpha, version.targets, version.use_dora) == (16.5, ("model.q_proj", "model.v_proj"), True)
        assert (version.origin, version.source, dict(version.metrics)) == ("hub", "org/a", {"loss": 0.5})


async def test_versions_count_up_and_the_default_follows(store: AdapterStore) -> None:
    for number, text in enumerate(("one", "two", "three"), start=1):
        assert (await publish(store, "a", text)).version == number
    quiet = await publish(store, "a", "four", move_default=False)
    assert store.resolve("a").version == 3
    assert store.resolve("a@4") == quiet
    assert [version.version for version in store.get("a").versions] == [1, 2, 3, 4]
    assert (await publish(store, "b", "one", move_default=False)).version == 1
    assert store.resolve("b").version == 1


async def test_the_same_content_again_changes_nothing(store: AdapterStore, home: Home) -> None:
    first = await publish(store, "a", "one")
    assert await publish(store, "a", "one", source="other") == first
    await publish(store, "a", "two")
    assert (await publish(store, "a", "one")).version == 3  # not the current one any more: it is a new version
    assert len(await home.blobs()) == 2


async def test_refusals_leave_nothing(store: AdapterStore, home: Home, tmp_path: Path) -> None:
    await publish(store, "a", "one")
    refused: list[tuple[type[TuneloopError], str, dict[str, Any]]] = [
        (Conflict, "exists already", {"expect": "new"}),
        (Conflict, "belongs to the base model 'base'", {"base": "other"}),
        (NotFound, "no adapter 'z'", {"name": "z", "expect": "existing"}),
        (TooLarge, "rank 65 is over", {"facts": facts("two", rank=65)}),
        (TooLarge, "1001 bytes", {"facts": facts("two", size_bytes=1001)}),
        (InvalidInput, "cannot name an adapter", {"name": "a@b"}),
        (InvalidInput, "base model", {"base": ""}),
    ]
    for kind, message, options in refused:
        with pytest.raises(kind, match=message):
            await publish(store, **{"name": "a", "content": "two", **options})
    async with store.staging() as folder:
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(InvalidInput, match="nothing else"):
            await store.publish(folder, name="a", base="base", facts=facts("two"), origin="upload")
    assert len(await home.blobs()) == await home.rows() == 1
    assert list((tmp_path / "adapters" / "instances").glob("*/*")) == []


async def test_staging_is_removed_even_when_the_block_raises(store: AdapterStore) -> None:
    with pytest.raises(RuntimeError):
        async with store.staging() as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
    assert not folder.exists()


async def test_many_publish_at_once(store: AdapterStore, home: Home) -> None:
    texts = [f"text-{number}" for number in range(12)]
    versions = await asyncio.gather(*(publish(store, "a", text) for text in texts), publish(store, "b", "text-0"))
    assert sorted(version.version for version in versions[:-1]) == list(range(1, 13))
    assert sorted(content(version) for version in store.get("a").versions) == sorted(texts)
    assert store.resolve("a").version == 12
    assert len(await home.blobs()) == 12


async def test_one_new_name_is_won_by_one(store: AdapterStore, home: Home) -> None:
    results = await asyncio.gather(
        *(publish(store, "a", f"text-{number}", expect="new") for number in range(6)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["AdapterVersion", *["Conflict"] * 5]
    assert len(await home.blobs()) == await home.rows() == 1


async def test_a_cancelled_publish_is_whole_or_absent(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async with home.open() as store:
        storing, proceed = asyncio.Event(), asyncio.Event()
        put_folder = ObjectStore.put_folder

        async def slow(self: ObjectStore, key: str, folder: Path) -> None:
            storing.set()
            await proceed.wait()
            await put_folder(self, key, folder)

        monkeypatch.setattr(ObjectStore, "put_folder", slow)
        task = asyncio.create_task(publish(store, "a", "one"))
        await storing.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert content(store.resolve("a")) == "one"
    async with home.open() as store:
        assert content(store.resolve("a")) == "one"


async def test_a_failing_object_store_leaves_nothing(
    store: AdapterStore, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise Unavailable("The object store is full.")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_folder", full)
        with pytest.raises(Unavailable):
            await publish(store, "a", "one")
    assert not store.known("a")
    assert await home.rows() == 0
    assert (await publish(store, "a", "one")).version == 1


async def test_deleting_removes_files_that_nobody_else_has(store: AdapterStore, home: Home) -> None:
    await publish(store, "a", "one")
    two = await publish(store, "a", "two")
    await publish(store, "b", "one")
    await store.delete("a")
    assert not store.known("a")
    assert not two.path.exists()
    assert content(store.resolve("b")) == "one"
    with pytest.raises(NotFound):
        await store.materialise(two)
    with pytest.raises(NotFound):
        await store.delete("a")
    await store.delete("b")
    assert await home.blobs() == []
    assert await home.rows() == 0
    assert (await publish(store, "a", "two")).version == 1


async def test_a_version_goes_only_when_no_alias_has_it_and_its_number_never_comes_back(store: AdapterStore) -> None:
    await publish(store, "a", "one")
    two = await publish(store, "a", "two")
    await store.set_alias("a", "prod", {1: 1, 2: 1})
    for number in (1, 2):
        with pytest.raises(Conflict, match=f"Version {number} .* 'prod'"):
            await store.delete_version("a", number)
    await store.set_alias("a", "prod", {1: 1})
    await store.rollback("a")
    await store.delete_version("a", 2)
    assert not two.path.exists()
    with pytest.raises(NotFound):
        await store.delete_version("a", 2)
    with pytest.raises(NotFound):
        store.resolve("a@2")
    assert (await publish(store, "a", "three")).version == 3


async def test_held_files_outlive_their_version(store: AdapterStore, home: Home) -> None:
    version = await publish(store, "a", "one")
    async with store.hold(version), store.hold(version):
        await store.delete("a")
        assert content(version) == "one"
    assert not version.path.exists()
    assert await home.blobs() == []
    async with store.hold(version):  # holding what is gone is harmless
        pass


async def test_deleting_and_publishing_the_same_content_at_once_never_loses_files(store: AdapterStore) -> None:
    for _ in range(10):
        await publish(store, "a", "one")
        await asyncio.gather(store.delete("a"), publish(store, "b", "one"), publish(store, "c", "one"))
        assert content(store.resolve("b")) == content(store.resolve("c")) == "one"
        await asyncio.gather(store.delete("b"), store.delete("c"))


async def test_subscribers_hear_of_every_change_after_it_happened(store: AdapterStore) -> None:
    events: list[tuple[str, str, bool]] = []
    released: list[str] = []

    def listen(event: AdapterEvent) -> None:
        events.append((event.kind, event.adapter, store.known(event.adapter)))
        released.extend(event.released)

    end = store.subscribe(listen)
    one = await publish(store, "a", "one")
    two = await publish(store, "a", "two")
    assert released == [one.digest]
    await store.set_alias("a", "prod", {1: 1})
    await store.rollback("a")
    assert released == [one.digest, two.digest]
    await store.delete_alias("a", "prod")
    await store.pin("a", True)
    await store.delete("a")
    assert released == [one.digest, two.digest, one.digest, two.digest]
    end()
    await publish(store, "b", "one")
    kinds = ["published", "published", "alias", "alias", "alias", "pinned"]
    assert events == [*((kind, "a", True) for kind in kinds), ("deleted", "a", False)]


async def test_pins_are_kept(home: Home) -> None:
    async with home.open() as store:
        await publish(store, "a", "one")
        assert (await store.pin("a", True)).pinned
        with pytest.raises(NotFound):
            await store.pin("b", True)
    async with home.open() as store:
        assert store.get("a").pinned
        assert not (await store.pin("a", False)).pinned


async def test_replicas_see_each_other_after_a_refresh(tmp_path: Path) -> None:
    home = Home(tmp_path, f"memory://{uuid.uuid4().hex}")
    async with home.open(tmp_path / "h1") as one, home.open(tmp_path / "h2") as two:
        kinds: list[str] = []
        two.subscribe(lambda event: kinds.append(event.kind))
        version = await publish(one, "a", "one")
        assert not two.known("a")
        await two.refresh()
        seen = two.resolve("a")
        assert seen.digest == version.digest
        assert not seen.path.exists()
        folders = await asyncio.gather(*(two.materialise(seen) for _ in range(5)))
        assert set(folders) == {seen.path}
        assert content(seen) == "one"
        assert (await publish(two, "a", "two")).version == 2
        assert (await publish(one, "a", "two")).version == 2  # published by the other: memory catches up
        assert one.resolve("a").version == 2
        await one.set_alias("a", "prod", {1: 1})
        await two.refresh()
        await one.pin("a", True)
        await two.refresh()
        await one.rollback("a")
        await one.delete_alias("a", "prod")
        await one.delete_version("a", 2)
        await two.refresh()
        await one.delete("a")
        await two.refresh()
        await two.refresh()
        assert kinds == ["published", "published", "alias", "pinned", "deleted", "deleted"]
        assert not two.known("a")


async def test_another_replicas_fresh_blob_is_left_alone_until_it_is_abandoned(tmp_path: Path) -> None:
    home = Home(tmp_path, f"memory://{uuid.uuid4().hex}")
    async with home.open(tmp_path / "h1") as store:
        version = await publish(store, "a", "one")
    async with home.open(tmp_path / "h2") as store:
        await store.delete("a")
        assert len(await home.blobs()) == 1  # h1 might be about to refer to it again
    database = Database(home.database_url)
    async with database.transaction() as session:
        await session.execute(update(tables.AdapterBlob).values(touched_at=version.created_at.replace(year=2000)))
    await database.close()
    async with home.open(tmp_path / "h2"):
        assert await home.blobs() == []


async def test_a_remote_cache_holds_only_what_exists(tmp_path: Path) -> None:
    home = Home(tmp_path, f"memory://{uuid.uuid4().hex}")
    async with home.open() as store:
        kept = await publish(store, "a", "one")
    (kept.path.parent / "stale").mkdir()
    (kept.path.parent / ".x.partial").mkdir()
    async with home.open() as store:
        assert list(kept.path.parent.iterdir()) == [kept.path]


async def test_a_store_that_was_not_started_says_so(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/t.db")
    store = AdapterStore(database, ObjectStore(str(tmp_path / "b")), home=tmp_path, limits=AdapterLimits())
    with pytest.raises(Unavailable, match="not been started"):
        async with store.staging():
            pass
    await store.close()
    await database.close()
