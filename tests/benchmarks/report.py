"""The benchmark's figures as tables on the terminal and as JSON in `.bench/`, so that runs can be compared."""

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    folder: Path
    figures: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=140))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def keep(self, name: str, value: object) -> None:
        """Write the figures after every section: an interrupted run keeps what it has."""
        self.figures[name] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "latest.json").write_text(json.dumps({"machine": machine(), **self.figures}, indent=2))


def machine() -> str:
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load average {load}"
