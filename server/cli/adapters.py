"""`tuneloop adapters`: the adapters of a running server, their versions and aliases."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .client import DEFAULT_URL, Client, Json, Key, Url, path_of
from .console import CliError, console, print_json, print_table, readable_bytes
from .upload import packed

app = typer.Typer(help="Adapters of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name.", show_default=False)]
_COLUMNS = ("ADAPTER", "BASE", "NOW", "VERSIONS", "RANK", "SIZE", "PINNED", "ALIASES")


@app.command("list")
def list_adapters(
    base: Annotated[str | None, typer.Option("--base", help="Only those of this base model.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Show all adapters."""
    with Client(url, api_key) as client:
        answer = client.call("GET", path_of("adapters"), params={"base": base} if base else None)
    if as_json:
        print_json(answer)
    else:
        print_table(_COLUMNS, [_row(card) for card in answer["data"]], empty="The server has no adapters.")


@app.command("add")
def add_adapter(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or archive here; or org/name, hf:, ms:, s3:// ... for the server.", show_default=False
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Its base model.", show_default="as its configuration says")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Add a version to an adapter that exists.")] = False,
    on_server: Annotated[bool, typer.Option("--on-server", help="SOURCE is a path of the server's machine.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Add an adapter, or with --replace a new version of one. It is live when this ends."""
    fields = ({} if replace else {"name": name}) | ({"base": base} if base else {})
    method, path = ("PUT", path_of("adapters", name)) if replace else ("POST", path_of("adapters"))
    local = Path(source).expanduser()
    if not on_server and source.startswith(("/", ".", "~")) and not local.exists():
        raise CliError(f"{source} does not exist here. If it is a path of the server's machine, add --on-server.")
    with Client(url, api_key) as client:
        if on_server or not local.exists():
            card = client.call(method, path, json={**fields, "source": source})
        else:
            with packed(local) as archive, archive.open("rb") as stream:
                files = {"file": (archive.name, stream, "application/octet-stream")}
                card = client.call(method, path, data=fields, files=files)
    _print_card(card, as_json)


@app.command("show")
def show_adapter(name: Name, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show an adapter's versions and aliases."""
    with Client(url, api_key) as client:
        card = client.call("GET", path_of("adapters", name))
        versions = client.call("GET", path_of("adapters", name, "versions"))["data"]
    if as_json:
        print_json({**card, "versions": versions})
        return
    console().print(f"{card['name']} on {card['base']}" + (", pinned" if card["pinned"] else ""), soft_wrap=True)
    for alias, weights in sorted(card["aliases"].items()):
        console().print(f"  {alias} -> {_weights(weights)}", soft_wrap=True)
    rows = [
        (v["version"], v["rank"], _kind(v), readable_bytes(v["size_bytes"]), v["origin"], v["source"], v["digest"][:19])
        for v in versions
    ]
    print_table(("VERSION", "RANK", "KIND", "SIZE", "ORIGIN", "FROM", "DIGEST"), rows, empty="It has no versions.")


@app.command("remove")
def remove_adapter(
    name: Annotated[str, typer.Argument(metavar="ADAPTER[@VERSION]", show_default=False)],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Remove an adapter with everything it has, or one of its versions."""
    adapter, _, version = name.partition("@")
    parts = ("adapters", adapter, "versions", version) if version else ("adapters", adapter)
    with Client(url, api_key) as client:
        client.call("DELETE", path_of(*parts))
    console().print(f"{name} is removed", soft_wrap=True)


@app.command("alias")
def alias_adapter(
    name: Name,
    alias: Annotated[str, typer.Argument(help="As in ADAPTER@ALIAS; `default` is the bare name.", show_default=False)],
    target: Annotated[
        str | None, typer.Argument(help="A version, or shares of several: 3=0.9,4=0.1.", show_default=False)
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Point an alias to a version, split its traffic, show or delete it. Requests in flight finish where they are."""
    path = path_of("adapters", name, "aliases", alias)
    if delete and target is not None:
        raise CliError("Give either a target or --delete, not both.")
    with Client(url, api_key) as client:
        if delete:
            client.call("DELETE", path)
            console().print(f"{name}@{alias} is deleted", soft_wrap=True)
            return
        card = client.call("GET", path) if target is None else client.call("PUT", path, json=_target(target))
    _print_alias(card, as_json)


@app.command("rollback")
def rollback_adapter(
    name: Name,
    alias: Annotated[str, typer.Option("--alias", help="Which alias.")] = "default",
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Point an alias back to where it was before."""
    with Client(url, api_key) as client:
        card = client.call("POST", path_of("adapters", name, "rollback"), json={"alias": alias})
    _print_alias(card, as_json)


@app.command("pin")
def pin_adapter(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Keep an adapter loaded."""
    with Client(url, api_key) as client:
        card = client.call("POST", path_of("adapters", name, "unpin" if off else "pin"))
    _print_card(card, as_json)


@app.command("download")
def download_adapter(
    name: Name,
    version: Annotated[
        int | None, typer.Option("--version", help="Which one.", show_default="what the name means")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="ADAPTER.tar.gz")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Download an adapter's two PEFT files as a tar.gz."""
    parts = (
        ("adapters", name, "download") if version is None else ("adapters", name, "versions", str(version), "download")
    )
    suffix = "" if version is None else f"-{version}"
    target = output or Path(f"{name.replace('/', '-').replace(':', '-')}{suffix}.tar.gz")
    aside = target.with_name(target.name + ".part")
    try:
        with Client(url, api_key) as client, aside.open("wb") as out:
            for block in client.stream_bytes(path_of(*parts)):
                out.write(block)
        aside.replace(target)
    except OSError as error:
        raise CliError(f"{target} cannot be written: {error.strerror}.") from error
    finally:
        aside.unlink(missing_ok=True)
    console().print(str(target), soft_wrap=True)


def _target(text: str) -> dict[str, Any]:
    try:
        if "=" not in text:
            return {"version": int(text)}
        shares = [part.split("=") for part in text.split(",")]
        return {"weights": {str(int(version)): float(share) for version, share in shares}}
    except ValueError:
        raise CliError(f"{text!r} is no target. Write a version as 3, or shares as 3=0.9,4=0.1.") from None


def _print_card(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(card)
        return
    pinned = ", pinned" if card["pinned"] else ""
    console().print(f"{card['name']} on {card['base']}: {_now(card)}{pinned}", soft_wrap=True)


def _print_alias(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(card)
    else:
        console().print(f"{card['adapter']}@{card['alias']} -> {_weights(card['weights'])}", soft_wrap=True)


def _row(card: dict[str, Any]) -> tuple[object, ...]:
    aliases = ", ".join(f"{a}: {_weights(w)}" for a, w in sorted(card["aliases"].items()) if a != "default")
    size, pinned = readable_bytes(card["size_bytes"]), "yes" if card["pinned"] else None
    return card["name"], card["base"], _now(card), len(card["versions"]), card["rank"], size, pinned, aliases


def _now(card: dict[str, Any]) -> str:
    """What the bare name means."""
    return f"version {card['version']}" if card["version"] else f"split {_weights(card['aliases']['default'])}"


def _weights(weights: dict[str, float]) -> str:
    if len(weights) == 1:
        return f"version {next(iter(weights))}"
    return " + ".join(
        f"{share:.0%} version {version}" for version, share in sorted(weights.items(), key=lambda w: int(w[0]))
    )


def _kind(version: dict[str, Any]) -> str:
    return (
        " ".join(filter(None, ("DoRA" if version["use_dora"] else "", "rsLoRA" if version["use_rslora"] else "")))
        or "LoRA"
    )
