"""Alembic migrations: each step from an older database to this version's tables. They know no engine and no URL.

`versions/` has one file a step; `env.py` is what Alembic runs. A new step: change `tables.py`, write the next file by
hand (`v0002_...`), set `HEAD`, and let `test_storage_migrations.py` compare the three.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from ..errors import Conflict

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0002"  # the last step's revision, so that a start with nothing to do need not import Alembic to learn it
_LOCK = 0x74756E65  # any number will do, as long as all replicas use the same


def config_for(connection: Connection | None = None) -> "Config":
    """Alembic's configuration for the scripts of this folder, to run on an open connection."""
    from alembic.config import Config

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
    if _revisions(connection) == [HEAD]:
        return
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(config_for(connection), "head")
    except CommandError as error:
        raise Conflict(
            f"The database was made by another version of Tuneloop ({error}); this version knows the steps up to "
            f"{HEAD!r}. Install the version that made it, or use another database_url."
        ) from error


def _revisions(connection: Connection) -> list[str]:
    if not inspect(connection).has_table("alembic_version"):
        return []
    return list(connection.scalars(text("SELECT version_num FROM alembic_version")))
