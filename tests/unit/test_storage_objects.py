"""Folders and files of the object store, the same tests on a local folder and on an fsspec store."""

import asyncio
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tuneloop.storage import ObjectStore, durable, remote_objects
from tuneloop.storage.errors import InvalidInput, NotFound, StorageFull, Unavailable


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return ObjectStore((tmp_path / "objects").as_uri())
    return ObjectStore(f"memory://{uuid.uuid4().hex}/prefix")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "weights").write_bytes(bytes(range(256)) * 100)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


async def collect(store: ObjectStore, key: str, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in store.open_file(key, offset=offset)])


async def test_a_folder_comes_back_as_it_was(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    assert not await store.exists("adapters/a")
    await store.put_folder("adapters/a", folder)
    assert await store.exists("adapters/a")
    await store.fetch_folder("adapters/a", tmp_path / "cache" / "a")
    assert content(tmp_path / "cache" / "a") == content(folder)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"a"}


async def test_an_existing_folder_is_left_as_it_is(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    await store.put_folder("adapters/a", folder)
    (folder / "config.json").write_text("other")
    await store.put_folder("adapters/a", folder)
    await store.fetch_folder("adapters/a", tmp_path / "a")
    assert content(tmp_path / "a")["config.json"] == b"{}"


async def test_many_may_put_and_fetch_one_folder_at_once(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    await asyncio.gather(*(store.put_folder("adapters/a", folder) for _ in range(8)))
    await asyncio.gather(*(store.fetch_folder("adapters/a", tmp_path / "cache" / "a") for _ in range(8)))
    assert content(tmp_path / "cache" / "a") == content(folder)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"a"}
    assert await store.list("adapters") == ["adapters/a"]


async def test_list_and_delete(store: ObjectStore, folder: Path) -> None:
    assert await store.list("adapters") == []
    for key in ("adapters/b", "adapters/a", "adapters/ab"):
        await store.put_folder(key, folder)
    await store.put_file("adapters/readme", folder / "config.json")
    await store.delete("adapters/a")
    await store.delete("adapters/never-there")
    assert await store.list("adapters") == ["adapters/ab", "adapters/b", "adapters/readme"]
    await store.delete("adapters/readme")
    assert not await store.exists("adapters/readme")


async def test_a_file_is_replaced_and_streamed(store: ObjectStore, tmp_path: Path) -> None:
    big = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(b"old")
    await store.put_file("files/f", tmp_path / "f")
    (tmp_path / "f").write_bytes(big)
    await store.put_file("files/f", tmp_path / "f")
    assert await collect(store, "files/f") == big
    assert await collect(store, "files/f", offset=1_000_001) == big[1_000_001:]


async def test_what_is_not_there_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder 'adapters/x'"):
        await store.fetch_folder("adapters/x", tmp_path / "x")
    with pytest.raises(NotFound, match="no file 'files/x'"):
        await collect(store, "files/x")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.manifest.json", "a b", "a\n"])
async def test_malformed_keys_are_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        await store.exists(key)


async def test_links_are_refused_and_nothing_is_stored(store: ObjectStore, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="neither a regular file nor a folder"):
        await store.put_folder("adapters/a", folder)
    assert not await store.exists("adapters/a")


async def test_local_folders_are_used_where_they_lie(tmp_path: Path, folder: Path) -> None:
    store = ObjectStore(str(tmp_path / "objects"))
    await store.put_folder("adapters/a", folder)
    where = store.local_folder("adapters/a")
    assert store.is_local
    assert where is not None
    assert content(where) == content(folder)
    assert ObjectStore("memory://x").local_folder("adapters/a") is None


async def test_a_failed_local_put_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: Path) -> None:
        raise OSError(28, "No space left on device")

    store = ObjectStore(str(tmp_path / "objects"))
    monkeypatch.setattr(durable, "sync_file", no_space)
    with pytest.raises(StorageFull, match="free some space"):
        await store.put_folder("adapters/a", folder)
    with pytest.raises(StorageFull, match="free some space"):
        await store.put_file("adapters/f", folder / "config.json")
    assert list((tmp_path / "objects" / "adapters").iterdir()) == []


async def test_delete_removes_what_a_killed_put_left(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "objects"))
    leftover = tmp_path / "objects" / "adapters" / ".a.0123.partial"
    leftover.mkdir(parents=True)
    (leftover / "weights").write_bytes(b"half")
    assert await store.list("adapters") == []
    await store.delete("adapters/a")
    assert not leftover.exists()


async def test_a_remote_folder_without_its_manifest_is_not_there(folder: Path, tmp_path: Path) -> None:
    root = f"{uuid.uuid4().hex}/prefix"
    store = ObjectStore(f"memory://{root}")
    await store.put_folder("adapters/a", folder)
    memory = fsspec.filesystem("memory")
    memory.rm_file(f"/{root}/adapters/a/{remote_objects._MANIFEST}")
    assert not await store.exists("adapters/a")
    assert await store.list("adapters") == []
    with pytest.raises(NotFound):
        await store.fetch_folder("adapters/a", tmp_path / "a")
    await store.delete("adapters/a")
    assert memory.find(f"/{root}") == []


async def test_a_remote_file_that_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    root = f"{uuid.uuid4().hex}/prefix"
    store = ObjectStore(f"memory://{root}")
    await store.put_folder("adapters/a", folder)
    fsspec.filesystem("memory").pipe_file(f"/{root}/adapters/a/config.json", b"[]")
    with pytest.raises(Unavailable, match="not the one that was stored"):
        await store.fetch_folder("adapters/a", tmp_path / "cache" / "a")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("failure", [ConnectionError("no route"), RuntimeError("no credentials")])
async def test_a_failing_backend_is_unavailable(
    folder: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    store = ObjectStore(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(Unavailable, match=str(failure)):
        await store.put_folder("adapters/a", folder)
    assert not await store.exists("adapters/a")


@pytest.mark.parametrize(
    ("url", "message"), [("nonsense://x", "cannot be opened"), ("ceph-xyz://b", "cannot be opened")]
)
def test_unknown_protocols_are_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        ObjectStore(url)
    assert caught.value.param == "storage_url"


def test_a_missing_backend_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("tuneloop.storage.objects.url_to_fs", missing)
    with pytest.raises(InvalidInput, match=r'pip install "tuneloop\[s3\]"'):
        ObjectStore("s3://bucket/prefix")
