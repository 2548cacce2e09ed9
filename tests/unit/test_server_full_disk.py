"""A disk that is full: a sentence and a 507 wherever the write failed, and nothing left behind."""

import errno
import io
import json
import os
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from tuneloop.adapters import archive
from tuneloop.engines.sources import worker
from tuneloop.engines.sources.cache import ModelCache
from tuneloop.server import multipart
from tuneloop.storage import Database, durable, tables
from tuneloop.storage.errors import StorageFull, Unavailable
from tuneloop.storage.full_disk import full_disk_named

from .conftest import BASE, MakeAdapter, Running


def fail(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "function"), [(multipart._Receiver, "flush"), (archive, "write_new"), (durable, "copy_file")]
)
async def test_an_upload_to_a_full_disk(
    running: Running, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, module: object, function: str
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        packed.add(make_adapter(), "adapter")
    form = {"data": {"name": "support", "base": BASE}, "files": {"file": ("a.tar.gz", buffer.getvalue())}}

    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        refused = await running.client.post("/v1/adapters", **form)  # type: ignore[arg-type]

    assert refused.status_code == 507, refused.text
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "storage_full")
    assert error["message"].startswith("The disk that holds ") and "free some space" in error["message"]
    assert "retry-after" not in refused.headers
    assert not [path for path in running.home.rglob("*") if "safetensors" in path.name or "part" in path.name]
    assert (await running.client.get("/v1/adapters")).json()["data"] == []
    assert (await running.client.post("/v1/adapters", **form)).status_code == 200  # type: ignore[arg-type]


async def test_a_full_database_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/full.db")
    await database.migrate()
    with pytest.raises(StorageFull, match="full"):
        async with database.transaction() as session:
            await session.execute(text("PRAGMA max_page_count=1"))  # SQLite raises it to what is used already
            for number in range(200):
                row = tables.BaseModel(name=f"m{number}", source="x" * 4000, created_at=datetime.now(UTC), detail={})
                session.add(row)
            await session.flush()
    async with database.transaction(read_only=True) as session:
        assert (await session.execute(text("SELECT count(*) FROM base_models"))).scalar() == 0
    await database.close()


def test_an_interrupted_fetch_gives_its_space_back_only_when_the_disk_is_full(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)

    def write_half(number: int) -> None:
        with cache.lock("pypi:x", on_wait=lambda: None):
            (cache.partial("pypi:x") / "wheel").write_bytes(b"half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match="Input/output"):
        write_half(errno.EIO)
    assert (cache.partial("pypi:x") / "wheel").exists()  # for the next attempt
    with pytest.raises(StorageFull, match=r"models is full"):
        write_half(errno.EDQUOT)
    assert not list((tmp_path / "models" / "partial").iterdir())


def test_a_pull_onto_a_full_disk_is_reported_by_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "fetch_here", fail)
    out = io.StringIO()
    worker._serve({"spec": "pypi:x", "home": str(tmp_path)}, worker._Reporter(out))
    error = json.loads(out.getvalue())["error"]
    assert (error["type"], error["code"]) == ("StorageFull", "storage_full")


def test_other_failures_of_the_file_system_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="denied") as caught, full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert not isinstance(caught.value, Unavailable)
