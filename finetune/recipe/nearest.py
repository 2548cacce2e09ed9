"""Finds the known name that a person probably meant. It knows no recipe."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is like it. Case, `-` and `.` count as nothing."""
    plain = _plain(name)
    candidates = {_plain(candidate): candidate for candidate in known}
    if plain in candidates:
        return candidates[plain]
    found = difflib.get_close_matches(plain, candidates, n=1, cutoff=0.65)
    return candidates[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_").strip("_")
