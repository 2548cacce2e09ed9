"""Aliases: pointing, splitting, history and rollback, across restarts."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tuneloop.adapters import AdapterFacts, AdapterLimits, AdapterStore
from tuneloop.storage import Database, ObjectStore
from tuneloop.storage.errors import Conflict, InvalidInput, NotFound


async def open_store(folder: Path) -> tuple[AdapterStore, Database]:
    database = Database(f"sqlite:///{folder}/tuneloop.db")
    await database.migrate()
    store = AdapterStore(database, ObjectStore(str(folder / "blobs")), home=folder, limits=AdapterLimits())
    await store.start()
    return store, database


async def add_version(store: AdapterStore, number: int) -> None:
    facts = AdapterFacts(
        digest=f"sha256:{number:064}",
        peft_type="LORA",
        base_model_name=None,
        rank=8,
        alpha=8.0,
        targets=("q",),
        use_dora=False,
        use_rslora=False,
        size_bytes=1,
    )
    async with store.staging() as folder:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(str(number))
        assert (await store.publish(folder, name="a", base="b", facts=facts, origin="job")).version == number


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AdapterStore]:
    """Adapter `a` with versions 1 to 3, the default at 3."""
    store, database = await open_store(tmp_path)
    for number in (1, 2, 3):
        await add_version(store, number)
    yield store
    store.check_integrity()
    await store.close()
    await database.close()


def weights(store: AdapterStore, alias: str = "default") -> Mapping[int, float]:
    return next(found.weights for found in store.get("a").aliases if found.alias == alias)


async def test_an_alias_points_and_splits(store: AdapterStore) -> None:
    before = datetime.now(UTC)
    alias = await store.set_alias("a", "prod", {2: 5})
    assert (alias.adapter, alias.alias, dict(alias.weights)) == ("a", "prod", {2: 1.0})
    assert before <= alias.updated_at <= datetime.now(UTC)
    assert store.resolve("a@prod").version == 2
    await store.set_alias("a", "prod", {1: 3, 3: 1})
    assert weights(store, "prod") == {1: 0.75, 3: 0.25}
    assert [store.resolve("a@prod", draw=draw).version for draw in (0.7, 0.8)] == [1, 3]
    assert store.get("a").default_weights == {3: 1.0}


async def test_rollback_walks_back_step_by_step(store: AdapterStore) -> None:
    assert (await store.rollback("a")).weights == {2: 1.0}
    assert (await store.rollback("a")).weights == {1: 1.0}
    with pytest.raises(Conflict, match="no earlier version"):
        await store.rollback("a")
    await store.set_alias("a", "default", {1: 1, 2: 1})
    await store.set_alias("a", "default", {3: 1})
    assert (await store.rollback("a")).weights == {1: 0.5, 2: 0.5}


async def test_setting_an_alias_to_where_it_is_adds_no_history(store: AdapterStore) -> None:
    first = await store.set_alias("a", "prod", {1: 1})
    assert await store.set_alias("a", "prod", {1: 7}) == first
    with pytest.raises(Conflict):
        await store.rollback("a", "prod")


async def test_rollback_passes_over_deleted_versions(store: AdapterStore) -> None:
    await store.delete_version("a", 2)
    assert (await store.rollback("a")).weights == {1: 1.0}


async def test_rollback_after_a_deletion_in_between_is_a_real_move(store: AdapterStore) -> None:
    await store.set_alias("a", "default", {2: 1})
    await store.set_alias("a", "default", {3: 1})
    await store.delete_version("a", 2)  # history: 1, 2, 3, 2; now at 3
    assert (await store.rollback("a")).weights == {1: 1.0}


async def test_history_survives_a_restart(tmp_path: Path) -> None:
    store, database = await open_store(tmp_path)
    await add_version(store, 1)
    await add_version(store, 2)
    await store.close()
    await database.close()
    store, database = await open_store(tmp_path)
    assert (await store.rollback("a")).weights == {1: 1.0}
    assert store.resolve("a").version == 1
    await store.close()
    await database.close()


async def test_a_deleted_alias_takes_its_history_along(store: AdapterStore) -> None:
    await store.set_alias("a", "prod", {1: 1})
    await store.set_alias("a", "prod", {2: 1})
    await store.delete_alias("a", "prod")
    with pytest.raises(NotFound):
        store.resolve("a@prod")
    await store.set_alias("a", "prod", {3: 1})
    with pytest.raises(Conflict):
        await store.rollback("a", "prod")


async def test_refusals(store: AdapterStore) -> None:
    with pytest.raises(Conflict, match="cannot be deleted"):
        await store.delete_alias("a", "default")
    for alias in ("prod", "7"):
        with pytest.raises(NotFound):
            await store.delete_alias("a", alias)
        with pytest.raises(NotFound):
            await store.rollback("a", alias)
    with pytest.raises(NotFound, match="no version 9"):
        await store.set_alias("a", "prod", {1: 1, 9: 1})
    with pytest.raises(NotFound, match="no adapter 'b'"):
        await store.set_alias("b", "prod", {1: 1})
    with pytest.raises(NotFound):
        await store.rollback("b")
    with pytest.raises(InvalidInput, match="cannot be an alias"):
        await store.set_alias("a", "3", {1: 1})
    with pytest.raises(InvalidInput, match="above 0"):
        await store.set_alias("a", "prod", {1: 0})
    assert [alias.alias for alias in store.get("a").aliases] == ["default"]
