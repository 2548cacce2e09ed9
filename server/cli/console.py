"""What commands print with: results on stdout, everything about them on stderr. It knows no command."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


class CliError(Exception):
    """Ends the command with this one sentence on stderr and status 1."""


def console(*, stderr: bool = False) -> "Console":
    """A console without markup and emoji codes: names and answers are shown as they are."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def fail(message: str) -> NoReturn:
    console(stderr=True).print("Error:", " ".join(message.split()), style="red", soft_wrap=True)
    sys.exit(1)


def say(message: str) -> None:
    """A remark for people, on stderr."""
    console(stderr=True).print(message, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()  # a full disk should be noticed while it can still be reported


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A plain table; `empty` is said instead when there are no rows."""
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("-" if cell is None or cell == "" else str(cell) for cell in row))
    if table.row_count:
        console().print(table)
    else:
        say(empty)


def readable_bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
