"""`tuneloop train`: a recipe from YAML and `key=value` words, trained on this machine or by a server."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .client import Key
from .console import say
from .local import Home, explained

if TYPE_CHECKING:
    from ...finetune.recipe.recipe import Recipe

_SERVER_URL = typer.Option(
    "--url", envvar="TUNELOOP_URL", help="Train on the server at this base URL instead of here.", show_default=False
)


def train(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="A YAML recipe, and keys that change it."),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the recipe, and train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="As cpu or cuda:0.", show_default="the accelerator there is, else cpu"),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option("--suffix", help="Part of the new model's name on a server.", show_default=False)
    ] = None,
    home: Home = None,
    url: Annotated[str | None, _SERVER_URL] = None,
    api_key: Key = None,
) -> None:
    """Fine-tune a model by a recipe. LLaMA-Factory's YAML is understood.

    Ctrl-C once saves a checkpoint and stops (status 130), twice ends at once. With --url a server trains, and
    Ctrl-C only ends the watching.
    """
    from ...finetune.recipe.read import read_recipe

    path, overrides = _split(words)
    with explained():
        recipe, auto, notices = read_recipe(path, overrides)
    for notice in notices:
        say(f"Note: {notice}")
    if dry_run:
        _print_recipe(recipe, auto)
        return
    from .train_display import open_display

    display = open_display(as_json=as_json)
    try:
        if url:
            from .train_remote import train_there

            status = train_there(recipe, auto, display=display, url=url, api_key=api_key, home=home, suffix=suffix)
        else:
            from .train_local import train_here

            command = _again(words, home, device)
            status = train_here(recipe, auto, display=display, home=home, device=device, command=command)
    finally:
        display.close()
    raise typer.Exit(status)


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """The first word is a file unless it is `key=value`."""
    first = words[0]
    if "=" in first and not Path(first).exists():
        return None, words
    return Path(first), words[1:]


def _print_recipe(recipe: "Recipe", auto: tuple[str, ...]) -> None:
    import yaml

    values: dict[str, Any] = recipe.model_dump(mode="json") | dict.fromkeys(auto, "auto")
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def _again(words: list[str], home: Path | None, device: str | None) -> str:
    """The command line to go on with, less what asked for a new beginning or another resumption."""
    options = [part for flag, value in (("--home", home), ("--device", device)) if value for part in (flag, str(value))]
    kept = [word for word in words if not word.startswith("resume_from_checkpoint=")]
    return shlex.join(["tuneloop", "train", *options, *kept])
