"""Adapter names inside URL paths. Names may hold `/` and `:`, so the router has to know where a name ends.

A name ends where a reserved word begins a path segment: `/v1/adapters/org/support/versions/3` is version 3 of
`org/support`. Names that would hold such a segment themselves are refused when the adapter is made.
"""

from starlette.convertors import Convertor, register_url_convertor

from ...storage.errors import InvalidInput

RESERVED = ("versions", "aliases", "rollback", "download", "pin", "unpin")


class AdapterNameConvertor(Convertor[str]):
    """`{name:adapter}`: segments of which none but the first may be a reserved word."""

    regex = rf"[^/]+(?:/(?!(?:{'|'.join(RESERVED)})(?:/|$))[^/]+)*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def register() -> None:
    """Make `{name:adapter}` known to the router. Safe to repeat."""
    register_url_convertor("adapter", AdapterNameConvertor())


def check_name_fits_paths(name: str) -> None:
    """Raises InvalidInput for a name that no URL of ours could reach."""
    clash = next((segment for segment in name.split("/")[1:] if segment in RESERVED), None)
    if clash is not None:
        raise InvalidInput(
            f"The adapter name '{name}' holds the segment '/{clash}', which is a part of the adapter URLs. "
            f"Choose a name without a segment out of {', '.join(RESERVED)}.",
            param="name",
        )
