"""The database: connections, transactions and migrations. It knows no table and no query.

SQLite is the default, PostgreSQL comes by URL. Both give the same promise: what a transaction committed survives
`kill -9` and power loss, and a transaction that did not commit left nothing.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from .errors import InvalidInput, Unavailable
from .full_disk import full_disk
from .migrations import upgrade_to_head

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_BUSY_TIMEOUT_MS = 30_000


class Database:
    """One database behind one URL (`sqlite:///path`, `postgresql://user:password@host/name`).

    Raises InvalidInput for a URL that is neither, or whose driver is not installed. Nothing connects until it is used.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse_url(url)
        is_sqlite = self._url.get_backend_name() == "sqlite"
        self._file = _sqlite_file(self._url) if is_sqlite else None
        options: dict[str, Any] = {} if is_sqlite else {"pool_pre_ping": True}
        if is_sqlite and self._file is None:
            # A second connection would be a second, empty database.
            options = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0}
        try:
            self._engine = create_async_engine(self._url, **options)
        except ModuleNotFoundError as error:
            raise InvalidInput(
                f"database_url needs the Python package {error.name!r}, which is not installed; "
                'install it with pip install "tuneloop[postgres]".',
                param="database_url",
            ) from error
        snapshot = {"sqlite_begin": "DEFERRED"} if is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reader = self._engine.execution_options(**snapshot)
        if is_sqlite:
            event.listen(self._engine.sync_engine, "connect", _configure_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)

    @property
    def url(self) -> str:
        """The URL as it may be shown: without its password."""
        return self._url.render_as_string(hide_password=True)

    @asynccontextmanager
    async def transaction(self, *, read_only: bool = False) -> AsyncIterator[AsyncSession]:
        """A session whose changes are committed when the block ends well and undone when it raises.

        Objects stay readable after the commit. On SQLite writers wait for each other (at most 30 seconds); a
        `read_only` block waits for nobody, sees one snapshot and must not write.
        Raises Unavailable when the database cannot be reached or stays locked, StorageFull when its disk is full.
        """
        async with AsyncSession(self._reader if read_only else self._engine, expire_on_commit=False) as session:
            try:
                await self._connect(session)
                yield session
                await session.commit()
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                raise self._unavailable(error) from error

    async def migrate(self) -> None:
        """Create the tables, or bring them to this version's form. Safe to repeat, and in several processes at once.

        Raises Conflict when a newer Tuneloop made the database, Unavailable when it cannot be reached.
        """
        if self._file is not None:
            await asyncio.to_thread(self._file.parent.mkdir, parents=True, exist_ok=True)
        try:
            async with self._engine.begin() as connection:
                await connection.run_sync(upgrade_to_head)
        except (OSError, OperationalError, InterfaceError, PoolTimeout) as error:
            raise self._unavailable(error) from error

    async def close(self) -> None:
        """Close all connections. Safe to repeat; using the database again opens new ones."""
        await self._engine.dispose()

    async def _connect(self, session: AsyncSession) -> None:
        try:
            await session.connection()
        except OSError as error:  # asyncpg's way to say that nobody listens; the caller's own OSErrors pass untouched
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        reason = getattr(error, "orig", None) or error
        if getattr(reason, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return full_disk(self.url)
        return Unavailable(f"The database {self.url} cannot be used: {reason}. Check that it runs and is reachable.")


def _parse_url(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise InvalidInput(
            "database_url is not a database URL; write sqlite:////absolute/path or "
            "postgresql://user:password@host/database.",
            param="database_url",
        ) from error
    backend = url.get_backend_name()
    if backend not in _DRIVERS or (url.drivername not in (backend, _DRIVERS[backend])):
        raise InvalidInput(
            f"database_url begins with {url.drivername!r}; Tuneloop works with sqlite:// and postgresql:// URLs.",
            param="database_url",
        )
    url = url.set(drivername=_DRIVERS[backend])
    if "sslmode" in url.query:  # libpq's name, in most ready-made URLs; asyncpg calls it ssl
        url = url.update_query_dict({"ssl": url.query["sslmode"]}).difference_update_query(["sslmode"])
    return url


def _sqlite_file(url: URL) -> Path | None:
    return Path(url.database) if url.database and url.database != ":memory:" else None


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver's own implicit BEGIN leaves reads and DDL outside transactions; _begin_sqlite says it instead.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_TIMEOUT_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the write lock at once: a reader that turns writer halfway fails in WAL mode without any wait.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'IMMEDIATE')}")
