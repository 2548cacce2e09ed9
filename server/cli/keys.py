"""`tuneloop keys`: API keys, made in the database itself, so that the first one needs no server and no other key."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from .console import console, print_json, print_table, say
from .local import Config, DatabaseUrl, Home, open_database, read_settings, run

if TYPE_CHECKING:
    from ..keys import KeyInfo
    from ..settings import Settings

app = typer.Typer(help="API keys of this home's database.", no_args_is_help=True)


@app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Who uses it.", show_default=False)],
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="infer, tune or admin.", show_default="infer")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Allow only this model.", show_default="all")
    ] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", help="Requests a minute.", show_default="no limit")] = None,
    days: Annotated[
        float | None, typer.Option("--days", min=0, help="Ends after so long.", show_default="never")
    ] = None,
    home: Home = None,
    config: Config = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Make a key and print its secret, which cannot be shown again. From then on the server wants a key."""
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)

    async def work(settings: "Settings") -> "tuple[str, KeyInfo]":
        from ..keys import Keys

        async with open_database(settings) as database:
            return await Keys(database).create(
                name, scopes=scope or ["infer"], expires_at=expires_at, rpm_limit=rpm, allowed_models=model or None
            )

    secret, info = run(work(read_settings(home, config, database_url)))
    say(f"{info.id}: {name}, {', '.join(info.scopes)}. The key, shown this once:")
    typer.echo(secret)


@app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: Home = None,
    config: Config = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Show all keys without their secrets."""

    async def work(settings: "Settings") -> "list[KeyInfo]":
        from ..keys import Keys

        async with open_database(settings) as database:
            return await Keys(database).list()

    keys = run(work(read_settings(home, config, database_url)))
    if as_json:
        print_json([_facts(key) for key in keys])
        return
    columns = ("ID", "NAME", "KEY", "SCOPES", "MODELS", "RPM", "CREATED", "LAST USED", "STATE")
    print_table(
        columns, [_row(key) for key in keys], empty="There are no keys: the server is open to all who reach it."
    )


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.", show_default=False)],
    home: Home = None,
    config: Config = None,
    database_url: DatabaseUrl = None,
) -> None:
    """End a key for good. Running servers notice within seconds."""

    async def work(settings: "Settings") -> "KeyInfo":
        from ..keys import Keys

        async with open_database(settings) as database:
            return await Keys(database).revoke(key_id)

    info = run(work(read_settings(home, config, database_url)))
    console().print(f"{info.id}: {info.name} is revoked")


def _row(key: "KeyInfo") -> tuple[object, ...]:
    models = "all" if key.allowed_models is None else ", ".join(key.allowed_models)
    shown = f"{key.prefix}..."
    return (
        key.id,
        key.name,
        shown,
        ", ".join(key.scopes),
        models,
        key.rpm_limit,
        _day(key.created_at),
        _day(key.last_used_at),
        _state(key),
    )


def _state(key: "KeyInfo") -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'expired' if key.expires_at <= datetime.now(UTC) else 'valid until'} {_day(key.expires_at)}"


def _day(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")


def _facts(key: "KeyInfo") -> dict[str, object]:
    moments = ("created_at", "expires_at", "revoked_at", "last_used_at")
    facts = {name: getattr(key, name) for name in ("id", "name", "prefix", "scopes", "allowed_models", "rpm_limit")}
    return facts | {name: value.isoformat() if (value := getattr(key, name)) else None for name in moments}
