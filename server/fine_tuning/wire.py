"""What all request bodies of fine-tuning share: unknown fields are refused with the nearest known name.

Wire types: they know the form of a field, not what its value means.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema, model_validator

from ...finetune.recipe.nearest import nearest
from ...storage.errors import InvalidInput

AUTO = "auto"


def unknown_field(name: str, known: Iterable[str], *, inside: str = "") -> InvalidInput:
    """The refusal of a field that is none of the known ones; `inside` is the dotted place of its object."""
    where = f"{inside}." if inside else ""
    near = nearest(name, known)
    remedy = f"Did you mean '{where}{near}'?" if near else f"Known here: {', '.join(known)}."
    return InvalidInput(
        f"The field '{where}{name}' is not known. {remedy}", param=f"{where}{name}", code="unknown_parameter"
    )


class Wire(BaseModel):
    """`inside` is the dotted place of the object in the request, for messages."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    inside: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise unknown_field(name, cls.model_fields, inside=cls.inside)
        return data

    def given(self) -> dict[str, Any]:
        """What the request says, without what it leaves to us."""
        return self.model_dump(exclude_none=True, exclude_unset=True)


def _whole(value: Any) -> Any:
    if value is None or value == AUTO or (type(value) is int and value >= 1):
        return value
    raise ValueError(f'it must be a whole number of at least 1, or "auto", and is {value!r}')


def _positive(value: Any) -> Any:
    if value is None or value == AUTO or (type(value) in (int, float) and 0 < value < float("inf")):
        return value
    raise ValueError(f'it must be a number above 0, or "auto", and is {value!r}')


AutoInt = Annotated[
    Any,
    PlainValidator(_whole),
    WithJsonSchema({"anyOf": [{"const": AUTO}, {"type": "integer", "minimum": 1}, {"type": "null"}]}),
]
AutoFloat = Annotated[
    Any,
    PlainValidator(_positive),
    WithJsonSchema({"anyOf": [{"const": AUTO}, {"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}),
]
