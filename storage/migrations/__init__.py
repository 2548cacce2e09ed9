"""Alembic migrations: each step from an older database to this version's tables. They know no engine and no URL.

`versions/` has one file a step; `env.py` is what Alembic runs. A new step: change `tables.py`, write the next file by
hand (`v0002_...`), and let `test_storage_migrations.py` compare the two.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from ..errors import Conflict

_LOCK = 0x74756E65  # any number will do, as long as all replicas use the same


def config_for(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the scripts of this folder, to run on an open connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade_to_head(connection: Connection) -> None:
    """Run all missing steps inside the connection's transaction; a second process waits until they are done.

    Raises Conflict if the database's revision is unknown here, i.e. a newer Tuneloop made it.
    """
    if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE has locked already
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    config = config_for(connection)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        head = ScriptDirectory.from_config(config).get_current_head()
        raise Conflict(
            f"The database was made by another version of Tuneloop ({error}); this version knows the steps up to "
            f"{head!r}. Install the version that made it, or use another database_url."
        ) from error
