"""Makes a command-line flag out of every setting, so that none is ever missing. It knows no setting by name."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def settings_parameters(fields: dict[str, FieldInfo], *, leave_out: frozenset[str]) -> Iterator[inspect.Parameter]:
    """Keyword parameters for typer, one a setting. They are None unless given; the settings check the values."""
    for name, field in fields.items():
        if name in leave_out:
            continue
        flag = "--" + name.replace("_", "-")
        kinds = _kinds(field.annotation)
        if bool in kinds:
            option: Any = typer.Option(
                f"{flag}/--no-{flag[2:]}", help=_text(field), show_default=_default(field), rich_help_panel="Settings"
            )
            annotation: Any = Annotated[bool | None, option]
        else:
            option = typer.Option(
                flag,
                help=_text(field),
                show_default=_default(field),
                metavar=_metavar(field, kinds),
                rich_help_panel="Settings",
            )
            annotation = Annotated[str | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, and what is inside an Annotated."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _kinds(member))
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return (annotation,)


def _text(field: FieldInfo) -> str:
    return field.description or ""


def _default(field: FieldInfo) -> str | bool:
    """As one would write it; nothing for "chosen elsewhere", which the description explains."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value in (None, ()):
        return False
    if isinstance(value, ByteSize):
        return value.human_readable(separator="")
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(str(Path.home()), "~", 1)


def _metavar(field: FieldInfo, kinds: tuple[Any, ...]) -> str:
    for kind in kinds:
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
    names = {int: "INTEGER", float: "NUMBER", ByteSize: "SIZE"}
    return next((names[kind] for kind in kinds if kind in names), "TEXT")
