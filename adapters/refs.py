"""The names that requests use: `support`, `support@3`, `support@prod`. It knows their form, not which exist."""

import re
from dataclasses import dataclass

from ..storage.errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A parsed reference; `selector` is what stands behind the `@`, None if nothing does."""

    name: str
    selector: str | None = None

    @property
    def version(self) -> int | None:
        """The version number, if the selector is one (an alias never is: it begins with a letter)."""
        return int(self.selector) if self.selector is not None and self.selector.isdigit() else None

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"


def parse_ref(text: str) -> AdapterRef:
    """Split `name[@version|@alias]`. Raises InvalidInput (param `model`) if a part is malformed."""
    name, at, selector = text.partition("@")
    check_name(name, param="model")
    if not at:
        return AdapterRef(name)
    if not _VERSION.fullmatch(selector) and not _ALIAS.fullmatch(selector):
        raise InvalidInput(
            f"The part {selector!r} of {text!r} is neither a version nor an alias; write name@3 or name@prod.",
            param="model",
        )
    return AdapterRef(name, selector)


def check_name(name: str, *, param: str = "name") -> str:
    """The name itself if it may be an adapter's. Raises InvalidInput otherwise.

    Legal: 1 to 128 letters, digits, `.`, `_`, `:`, `/`, `-`, the first a letter or digit, without `..` and `//`;
    so `org/name` and OpenAI's `ft:base:suffix:id` are.
    """
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise InvalidInput(
            f"{name!r} cannot name an adapter; use 1 to 128 letters, digits, '.', '_', ':', '/' and '-', beginning "
            "with a letter or digit, without '..', '//' or a '/' at the end.",
            param=param,
        )
    return name


def check_alias(alias: str) -> str:
    """The alias itself if it is well formed. Raises InvalidInput (param `alias`) otherwise."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidInput(
            f"{alias!r} cannot be an alias; use 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter.",
            param="alias",
        )
    return alias
