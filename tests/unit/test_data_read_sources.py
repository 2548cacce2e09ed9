"""Where data come from: dataset_info.json, files and folders, hubs (stand-ins), and buckets (in memory)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuneloop.finetune.data import remote
from tuneloop.finetune.data.formats import Alpaca, Columns, OpenAIChat, ShareGPT
from tuneloop.finetune.data.read import read_rows
from tuneloop.finetune.data.repository_files import choose_files
from tuneloop.finetune.data.sources import data_sets
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import RunSpec
from tuneloop.storage.errors import InvalidInput, NotFound, PermissionDenied, TuneloopError, Unavailable


def spec_of(folder: Path, *names: str, **keys: Any) -> RunSpec:
    recipe = Recipe(model_name_or_path="m", dataset=names, dataset_dir=str(folder), **keys)
    return RunSpec(recipe=recipe, base_name="m", model_path=Path("/m"), home=folder / "home")


def define(folder: Path, **definitions: Any) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(definitions))


def texts(spec: RunSpec) -> list[str | None]:
    return [row.text for row in read_rows(spec, "train")]


def test_definitions_say_file_format_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"q": "Hi", "a": "Hello", "system": "not named"}]))
    (tmp_path / "b.jsonl").write_text('{"text": "t0"}\n{"text": "t1"}\n{"text": "t2"}\n')
    define(
        tmp_path,
        qa={"file_name": "a.json", "file_sha1": "x", "columns": {"prompt": "q", "response": "a"}},
        pt={"file_name": "b.jsonl", "columns": {"prompt": "text"}},
        few={"file_name": "b.jsonl", "columns": {"prompt": "text"}, "num_samples": 2},
        many={"file_name": "b.jsonl", "columns": {"prompt": "text"}, "num_samples": 7},
    )
    row = next(read_rows(spec_of(tmp_path, "qa"), "train"))
    assert [message["content"] for message in row.messages] == ["Hi", "Hello"]
    assert texts(spec_of(tmp_path, "pt")) == ["t0", "t1", "t2"]
    few = texts(spec_of(tmp_path, "few"))
    assert len(few) == len(set(few)) == 2
    assert few == texts(spec_of(tmp_path, "few"))
    assert sorted(map(str, texts(spec_of(tmp_path, "many"))))[:4] == ["t0", "t0", "t1", "t1"]
    assert len(texts(spec_of(tmp_path, "many"))) == 7


def test_formats_of_definitions(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    define(
        tmp_path,
        plain={"file_name": "a.json"},
        alpaca={"file_name": "a.json", "formatting": "alpaca"},
        talk={"file_name": "a.json", "formatting": "sharegpt", "columns": {"tools": "fns"}},
        roles={"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": roles},
        openai={"file_name": "a.json", "formatting": "openai"},
    )
    names = ("plain", "talk", "roles", "openai", "alpaca")
    found = [data_set.format for data_set in data_sets(spec_of(tmp_path, *names), "train")]
    assert found[0] is None  # recognised, as alpaca too
    talk = Columns(prompt=None, query=None, response=None, history=None, system=None, tools="fns")
    assert found[1] == ShareGPT(talk)
    assert isinstance(found[2], OpenAIChat)
    assert found[3:] == [OpenAIChat(), Alpaca()]


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"script_url": "load.py"}, "a Python script that loads the data"),
        ({"file_name": "a.json", "columns": {"images": "pics"}}, "columns.images"),
        ({"file_name": "a.json", "ranking": True}, "preference data"),
        ({"file_name": "a.json", "columns": {"chosen": "c", "rejected": "r"}}, "preference data"),
        ({"file_name": "a.json", "columns": {"kto_tag": "label"}}, "KTO data"),
        ({"file_name": "a.json", "formating": "sharegpt"}, "Did you mean formatting?"),
        ({"file_name": "a.json", "columns": {"promt": "q"}}, r"Did you mean columns.prompt\?"),
        ({"file_name": "a.json", "tags": {"role": "q"}}, r"tags.role\b"),
        ({"file_name": "a.json", "formatting": "xml"}, "Known are alpaca, sharegpt and openai"),
        ({"file_name": "a.json", "num_samples": 0}, "no number of rows"),
        ({"file_name": ["a.json"]}, "file_name that is no text"),
        ({"file_name": "a.json", "split": "test"}, "has no split 'test'"),
        ({"file_name": "missing.json"}, "Put it there"),
        ({}, "says nowhere where the data lie"),
        ([], "is not an object"),
    ],
)
def test_definitions_that_cannot_be_used(tmp_path: Path, definition: Any, message: str) -> None:
    (tmp_path / "a.json").write_text("[]")
    define(tmp_path, mine=definition)
    with pytest.raises(TuneloopError, match=message) as caught:
        texts(spec_of(tmp_path, "mine"))
    assert caught.value.param == "dataset"


def test_names_are_definitions_files_or_folders(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.txt", "a.txt", "README.md", ".hidden.txt"):
        (folder / name).write_text(f"{name}\n")
    assert texts(spec_of(tmp_path, "texts")) == ["a.txt", "b.txt"]
    assert texts(spec_of(tmp_path, str(folder / "b.txt"))) == ["b.txt"]
    define(tmp_path, stories={"file_name": "texts"})
    assert texts(spec_of(tmp_path, "stories")) == ["a.txt", "b.txt"]
    with pytest.raises(NotFound, match=r"Did you mean 'stories'\?"):
        texts(spec_of(tmp_path, "story"))
    with pytest.raises(InvalidInput, match="No data set is named"):
        texts(spec_of(tmp_path))
    with pytest.raises(InvalidInput, match="protocol that data are not read from"):
        texts(spec_of(tmp_path, "ftp://x/y"))
    with pytest.raises(InvalidInput, match="repository of definitions"):
        texts(spec_of(Path("REMOTE:org/name"), "x"))
    (folder / "empty").mkdir()
    with pytest.raises(NotFound, match="has no data files"):
        texts(spec_of(folder, "empty"))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read"):
        texts(spec_of(tmp_path, "stories"))


CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "main/*.jsonl"}
  - {split: test, path: [main/held-out.json]}
- config_name: other
  data_files: other.csv
---
# A data set
"""


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["a.jsonl", "b.jsonl"], {}, ["a.jsonl", "b.jsonl"]),
        (["data/train-0.parquet", "data/test-0.parquet", "train.csv"], {}, ["data/train-0.parquet"]),
        (["data/train-0.parquet", "data/test-0.parquet"], {"split": "test"}, ["data/test-0.parquet"]),
        (["train.jsonl.gz", "dev.jsonl.gz"], {"split": "validation"}, ["dev.jsonl.gz"]),
        (["en/train.json", "de/train.json"], {"subset": "de"}, ["de/train.json"]),
        (["x/a.json", "y/a.json", ".x/a.json"], {"folder": "y"}, ["y/a.json"]),
        (["main/a.jsonl", "main/held-out.json", "other.csv"], {"card": CARD}, ["main/a.jsonl"]),
        (["main/a.jsonl", "main/held-out.json"], {"card": CARD, "split": "test"}, ["main/held-out.json"]),
        (["main/a.jsonl", "other.csv"], {"card": CARD, "subset": "other"}, ["other.csv"]),
    ],
)
def test_files_of_a_repository(tmp_path: Path, names: list[str], options: Any, expected: list[str]) -> None:
    card = None
    if "card" in options:
        card = tmp_path / "README.md"
        card.write_text(options["card"])
    wanted = {"subset": None, "split": "train", "folder": None, **options}
    wanted.pop("card", None)
    assert choose_files(names, card, "hf:o/n", **wanted) == expected


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["load.py"], "train", "refs/convert/parquet"),
        (["README.md"], "train", "has no data files"),
        (["train.csv", "test.csv"], "validation", "It has the splits test, train"),
        (["train.csv"], "train[:10]", "use max_samples"),
    ],
)
def test_repositories_without_such_data(names: list[str], split: str, message: str) -> None:
    with pytest.raises(TuneloopError, match=message):
        choose_files(names, None, "hf:o/n", subset=None, split=split, folder=None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for huggingface_hub's three calls; `error` is raised by the listing."""
    import huggingface_hub

    state: dict[str, Any] = {"files": {"train.jsonl": b'{"text": "far"}\n'}, "error": None, "asked": []}
    remote.fetch_hub.cache_clear()

    class Api:
        def dataset_info(self, repository: str, *, revision: str | None) -> Any:
            state["asked"].append((repository, revision))
            if state["error"] is not None:
                raise state["error"]
            return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name) for name in state["files"]])

    def download(repository: str, name: str, *, repo_type: str, revision: str) -> str:
        assert (repo_type, revision) == ("dataset", "c0ffee")
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(state["files"][name])
        return str(path)

    def snapshot(repository: str, **_: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not (tmp_path / "cache").exists():
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


def no_network() -> Exception:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    error: Exception = HTTPError("no network")
    return error


def test_hub_data_sets(tmp_path: Path, hub: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, "hf:org/name@v1")
    rows = list(read_rows(spec, "train"))
    assert [str(row.place) for row in rows] == ["hf:org/name@v1/train.jsonl, line 1"]
    assert texts(spec) == ["far"]
    assert hub["asked"] == [("org/name", "v1")]  # one commit for all passes of a process
    define(tmp_path, far={"hf_hub_url": "org/name", "columns": {"prompt": "text"}})
    assert texts(spec_of(tmp_path, "far")) == ["far"]
    assert texts(spec_of(Path("ONLINE"), "org/name")) == ["far"]
    remote.fetch_hub.cache_clear()
    hub["error"] = no_network()
    assert texts(spec) == ["far"]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, PermissionDenied), (404, NotFound), (503, Unavailable), (None, Unavailable)]
)
def test_what_the_hub_refuses(tmp_path: Path, hub: dict[str, Any], status: int | None, kind: type[Exception]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    hub["error"] = HfHubHTTPError("x", response=response) if status else no_network()
    with pytest.raises(kind):
        texts(spec_of(tmp_path, "hf:org/name"))


def test_modelscope_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(InvalidInput, match=r"tuneloop\[modelscope\]"):
        texts(spec_of(tmp_path, "ms:org/name"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "train.txt").write_text("near\n")
    sdk = SimpleNamespace(dataset_snapshot_download=lambda repository, **options: str(tmp_path / "kept"))
    monkeypatch.setitem(__import__("sys").modules, "modelscope", sdk)
    assert texts(spec_of(tmp_path, "ms:org/name")) == ["near"]


def test_bucket_files_are_kept_until_they_change(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.txt", b"one\n")
    memory.pipe("/bucket/b.txt", b"two\n")
    memory.pipe("/bucket/notes.pdf", b"no")
    files = remote.fetch_bucket("memory://bucket", tmp_path)
    assert [Path(file.path).read_text() for file in files] == ["one\n", "two\n"]
    assert [file.name for file in files] == ["memory://bucket/a.txt", "memory://bucket/b.txt"]
    (single,) = remote.fetch_bucket("memory://bucket/a.txt", tmp_path)
    first = Path(single.path).stat().st_ino
    assert Path(remote.fetch_bucket("memory://bucket/a.txt", tmp_path)[0].path).stat().st_ino == first
    memory.pipe("/bucket/a.txt", b"other\n")
    assert Path(remote.fetch_bucket("memory://bucket/a.txt", tmp_path)[0].path).read_text() == "other\n"
    with pytest.raises(NotFound):
        remote.fetch_bucket("memory://bucket/none.txt", tmp_path)
