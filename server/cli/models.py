"""`tuneloop models`: the base models of a running server."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from .client import DEFAULT_URL, Client, Json, Key, Url, path_of
from .console import console, print_json, print_table, readable_bytes

app = typer.Typer(help="Base models of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="The served name.", show_default=False)]


@app.command("list")
def list_models(as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show the base models, what state they are in and what they take."""
    with Client(url, api_key) as client:
        answer = client.call("GET", path_of("models"))
    if as_json:
        print_json(answer)
        return
    bases = [card for card in answer["data"] if card.get("parent") is None]
    columns = ("MODEL", "STATE", "PINNED", "IN USE", "MEMORY", "LAST USED", "FROM")
    print_table(columns, [_row(card) for card in bases], empty="The server knows no base models.")


@app.command("load")
def load_model(
    name: Name,
    source: Annotated[str | None, typer.Option("--source", help="Makes a new model known under this name.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in memory whatever happens.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Load a base model and wait until it can answer. `NAME=SOURCE` means --source, as it does for `serve`."""
    if source is None and "=" in name:
        name, _, source = name.partition("=")
    body: dict[str, Any] = {"model": name} | ({"source": source} if source else {}) | ({"pinned": True} if pin else {})
    _post("load", body, as_json, url, api_key)


@app.command("unload")
def unload_model(name: Name, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Unload a base model and free its memory; the next request loads it again."""
    _post("unload", {"model": name}, as_json, url, api_key)


@app.command("pin")
def pin_model(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Never unload a base model to make room or for being idle."""
    _post("pin", {"model": name, "pinned": not off}, as_json, url, api_key)


def _post(action: str, body: dict[str, Any], as_json: bool, url: str, api_key: str | None) -> None:
    with Client(url, api_key) as client:
        card = client.call("POST", path_of("models", action), json=body)
    if as_json:
        print_json(card)
        return
    status = card.get("status") or {}
    pinned = ", pinned" if status.get("pinned") else ""
    console().print(f"{card['id']}: {status.get('state', 'unknown')}{pinned}", soft_wrap=True)


def _row(card: dict[str, Any]) -> tuple[object, ...]:
    status = card.get("status") or {}
    state = status.get("state", "unloaded")
    if status.get("reason"):
        state = f"{state}: {status['reason']}"
    used = status.get("last_used")
    when = None if used is None else datetime.fromtimestamp(used, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    memory = readable_bytes(status.get("resident_memory_bytes") or None)
    return (
        card["id"],
        state,
        "yes" if status.get("pinned") else None,
        status.get("in_flight"),
        memory,
        when,
        card["root"],
    )
