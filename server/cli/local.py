"""What commands need that work on this machine's home and database, without a server."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .console import CliError

if TYPE_CHECKING:
    from ...storage import Database
    from ..settings import Settings

Home = Annotated[
    Path | None,
    typer.Option(
        "--home", help="Folder of the database, adapters and models.", show_default="~/.tuneloop or TUNELOOP_HOME"
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.", show_default="TUNELOOP_CONFIG")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Database URL.", show_default="SQLite in the home")
]

T = TypeVar("T")


@contextmanager
def explained() -> Iterator[None]:
    """Turns Tuneloop's own errors into CliError."""
    from ...storage.errors import TuneloopError

    try:
        yield
    except TuneloopError as error:
        raise CliError(error.message) from error


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; Tuneloop's own errors become CliError."""
    with explained():
        return asyncio.run(work)


def read_settings(home: Path | None, config: Path | None, database_url: str | None = None) -> "Settings":
    from ..settings_sources import load_settings

    with explained():
        return load_settings(config, home=home, database_url=database_url)


@asynccontextmanager
async def open_database(settings: "Settings") -> AsyncIterator["Database"]:
    """The migrated database that a server with these settings would use."""
    from ...storage import Database

    database = Database(settings.resolved_database_url)
    try:
        await database.migrate()
        yield database
    finally:
        await database.close()
