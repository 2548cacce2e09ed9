"""`tuneloop doctor`: what this machine has, which engine and kernels would be used and why, and what can be reached."""

from typing import Annotated

import typer

from .console import console, print_json
from .local import Config, Home, read_settings


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the model sources.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: Home = None,
    config: Config = None,
) -> None:
    """Show what this machine has and what a server on it would use."""
    from . import diagnosis

    settings = read_settings(home, config)
    sections = {
        "machine": diagnosis.machine(),
        "versions": diagnosis.versions(),
        "engine": diagnosis.engine(settings),
        "home": diagnosis.home(settings),
        "sources": {} if offline else diagnosis.sources(),
    }
    if as_json:
        print_json(sections)
        return
    out = console()
    for title, facts in sections.items():
        if facts:
            out.print(title, style="bold")
        for name, value in facts.items():
            out.print(f"  {name:<14} {value}", soft_wrap=True)
