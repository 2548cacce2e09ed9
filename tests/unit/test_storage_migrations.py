"""The migrations lead exactly to the tables, from anywhere, once, and refuse what they don't know."""

import asyncio
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text
from tuneloop.storage import Database
from tuneloop.storage.errors import Conflict
from tuneloop.storage.migrations import HEAD, config_for, upgrade_to_head
from tuneloop.storage.tables import Table


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return list(compare_metadata(context, Table.metadata))


def test_the_migrations_make_the_tables_and_take_them_away_again() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        upgrade_to_head(connection)
        assert differences(connection) == []
        command.downgrade(config_for(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        upgrade_to_head(connection)
        assert differences(connection) == []
    engine.dispose()


def test_the_head_is_the_last_step() -> None:
    assert ScriptDirectory.from_config(config_for()).get_heads() == [HEAD]


async def test_migrating_twice_and_at_once_is_safe(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path}/tuneloop.db") for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    await databases[0].migrate()
    for database in databases:
        await database.close()


async def test_a_database_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/tuneloop.db")
    await database.migrate()
    async with database.transaction() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Conflict, match="another version of Tuneloop"):
        await database.migrate()
    await database.close()
