"""The file store: adding, listing, reading, deleting and expiry of files, in a folder and in a bucket."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from tuneloop.storage import Database, ObjectStore
from tuneloop.storage.errors import InvalidInput, NotFound, Unavailable
from tuneloop.storage.file_ids import created_at_of, new_id
from tuneloop.storage.files import FileStore, StoredFile

OpenStore = Callable[[], AbstractAsyncContextManager[FileStore]]


@asynccontextmanager
async def opened(home: Path, url: str) -> AsyncIterator[FileStore]:
    database = Database(f"sqlite:///{home}/tuneloop.db")
    await database.migrate()
    store = FileStore(database, ObjectStore(url), home=home)
    await store.start()
    try:
        yield store
    finally:
        await store.close()
        await database.close()


@pytest.fixture(params=["folder", "bucket"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    url = str(tmp_path / "blobs") if request.param == "folder" else f"memory://{uuid4().hex}"
    return lambda: opened(tmp_path, url)


async def add(
    store: FileStore, content: bytes, *, purpose: str = "fine-tune", expires_at: datetime | None = None
) -> StoredFile:
    async with store.staging() as folder:
        path = folder / "part"
        path.write_bytes(content)
        return await store.add(path, filename="a.jsonl", purpose=purpose, expires_at=expires_at)


async def read(store: FileStore, file: StoredFile, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in store.open(file, offset=offset)])


async def blobs(store: FileStore) -> list[str]:
    return await store._objects.list("files")


async def test_a_file_is_there_after_a_restart(open_store: OpenStore) -> None:
    async with open_store() as store:
        file = await add(store, b"hello")
        assert (file.size_bytes, file.filename, file.purpose, file.expires_at) == (5, "a.jsonl", "fine-tune", None)
        assert file.id.startswith("file-")
        assert len(file.id) == 29
    async with open_store() as store:
        assert await store.get(file.id) == file
        assert await read(store, file) == b"hello"
        assert await read(store, file, offset=3) == b"lo"
        assert [note.name for note in (store._home / "notes").iterdir()] == []


async def test_what_is_deleted_is_gone_with_its_bytes(open_store: OpenStore) -> None:
    async with open_store() as store:
        file, other = await add(store, b"1"), await add(store, b"1")
        await store.delete(file.id)
        for _ in range(2):
            with pytest.raises(NotFound) as caught:
                await store.delete(file.id)
            assert caught.value.param == "file_id"
        with pytest.raises(NotFound):
            await read(store, file)
        assert await blobs(store) == [other.blob]
        assert await read(store, other) == b"1"


async def test_of_two_deletions_at_once_one_finds_nothing(open_store: OpenStore) -> None:
    async with open_store() as store:
        file = await add(store, b"1")
        ends = await asyncio.gather(*(store.delete(file.id) for _ in range(4)), return_exceptions=True)
        assert [type(end) for end in ends if end is not None] == [NotFound] * 3, ends


async def test_a_reader_reads_on_after_a_deletion(open_store: OpenStore) -> None:
    content = os.urandom(3 * 1024 * 1024)
    async with open_store() as store:
        file = await add(store, content)
        stream = store.open(file)
        received = await anext(stream)
        await store.delete(file.id)
        async for chunk in stream:
            received += chunk
        assert received == content
        await store._blobs.collect()
        assert await blobs(store) == []


async def test_pages(open_store: OpenStore) -> None:
    async with open_store() as store:
        ids = [(await add(store, b"", purpose=purpose)).id for purpose in ("batch", "evals", "batch", "batch")]
        assert ids == sorted(ids)
        page, has_more = await store.list(limit=3)
        assert ([file.id for file in page], has_more) == (ids[:0:-1], True)
        page, has_more = await store.list(limit=3, after=page[-1].id)
        assert ([file.id for file in page], has_more) == (ids[:1], False)
        page, has_more = await store.list(purpose="batch", order="asc", limit=2)
        assert ([file.id for file in page], has_more) == ([ids[0], ids[2]], True)
        await store.delete(ids[2])  # the place of a deleted file is still a place
        page, has_more = await store.list(purpose="batch", order="asc", limit=2, after=ids[2])
        assert ([file.id for file in page], has_more) == ([ids[3]], False)
        page, has_more = await store.list(limit=1, without=["batch"])
        assert ([file.id for file in page], has_more) == ([ids[1]], False)
        for wrong in ("file-1", "x", ids[0].upper()):
            with pytest.raises(InvalidInput) as caught:
                await store.list(after=wrong)
            assert caught.value.param == "after"


async def test_a_file_whose_time_is_up_is_gone(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.storage.files._SWEEP_SECONDS", 0.05)
    soon = datetime.now(UTC) + timedelta(seconds=0.3)
    async with open_store() as store:
        file, later = await add(store, b"1", expires_at=soon), await add(store, b"2", expires_at=soon + timedelta(1))
        assert await store.get(file.id) == file
        await asyncio.sleep(0.35)
        with pytest.raises(NotFound):
            await store.get(file.id)
        assert await store.list() == ([later], False)
        async with asyncio.timeout(5):
            while await blobs(store) != [later.blob]:
                await asyncio.sleep(0.02)


async def test_the_start_removes_what_expired_meanwhile(open_store: OpenStore) -> None:
    async with open_store() as store:
        await add(store, b"1", expires_at=datetime.now(UTC) + timedelta(seconds=0.1))
    await asyncio.sleep(0.1)
    async with open_store() as store:
        assert await blobs(store) == []


async def test_a_local_path_has_the_bytes_and_keeps_them(open_store: OpenStore, tmp_path: Path) -> None:
    async with open_store() as store:
        file, empty = await add(store, b"hello"), await add(store, b"")
        dest = tmp_path / "run" / "data" / "train.jsonl"
        assert await store.local_path(empty, dest) == dest
        assert dest.read_bytes() == b""
        assert await store.local_path(file, dest) == dest
        await store.delete(file.id)
        assert dest.read_bytes() == b"hello"
        with pytest.raises(NotFound):
            await store.local_path(file, tmp_path / "gone")
        assert [path.name for path in dest.parent.iterdir()] == ["train.jsonl"]
        assert not (tmp_path / "gone").exists()


async def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    async with opened(tmp_path, str(tmp_path / "blobs")) as store:
        file = await add(store, b"hello")
        monkeypatch.setattr(os, "link", refuse)
        assert (await store.local_path(file, tmp_path / "copy")).read_bytes() == b"hello"
        (tmp_path / "blobs" / file.blob).write_bytes(b"hallo")
        with pytest.raises(Unavailable, match="not those that were stored"):
            await store.local_path(file, tmp_path / "wrong")
        assert "wrong" not in "".join(os.listdir(tmp_path))  # noqa: PTH208 (a Path's would block)


async def test_a_failed_addition_leaves_nothing(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_store() as store:
        async with store.staging() as folder:
            with pytest.raises(FileNotFoundError):
                await store.add(folder / "absent", filename="a", purpose="batch")
        with monkeypatch.context() as patch:
            patch.setattr("tuneloop.storage.files.new_id", lambda _: None)  # the row cannot be written
            with pytest.raises(Exception, match="files"):
                await add(store, b"1")
        assert await blobs(store) == []
        assert list((store._home / "notes").iterdir()) == []
        assert await store.list() == ([], False)


async def test_a_cancelled_caller_leaves_a_whole_file_or_none(open_store: OpenStore) -> None:
    async with open_store() as store:
        for delay in (0.0, 0.001, 0.003, 0.01, 0.03):
            task = asyncio.create_task(add(store, b"1"))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        files, _ = await store.list()
        assert sorted(file.blob for file in files) == await blobs(store)
        assert list((store._home / "notes").iterdir()) == []


def test_ids_say_their_moment() -> None:
    moment = datetime(2026, 11, 24, 10, 30, 0, 123456, UTC)
    assert created_at_of(new_id(moment)) == moment
    assert len({new_id(moment) for _ in range(100)}) == 100
