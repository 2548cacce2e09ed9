"""The request of POST /v1/completions. Wire types: they know nothing of engines."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, model_validator

from ...storage.errors import InvalidInput
from ..generation.fields import MAX_LOGPROBS, MAX_ROWS, GenerationFields, Int
from ..generation.refusals import COMMON, Refusals

_COMPLETION_REFUSALS: Refusals = {**COMMON, "prompt_embeds": (), "suffix": ()}

Prompts = list[str | list[int]]


def _prompts(value: Any) -> Prompts:
    """One prompt or several, each as text or as token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a string, a list of token ids, or a non-empty list of either")
    if all(_is_id(item) for item in value):
        return [value]
    for place, item in enumerate(value):
        if not isinstance(item, str) and not (isinstance(item, list) and item and all(_is_id(part) for part in item)):
            raise ValueError(f"entry {place} of the list is neither a string nor a list of token ids")
    return value


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


class CompletionRequest(GenerationFields):
    """OpenAI's fields and vLLM's extras. `user` identifies; it does not change the answer."""

    refusals: ClassVar[Refusals] = _COMPLETION_REFUSALS

    prompt: Annotated[
        Prompts, PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.best_of is not None and self.best_of != self.rows_per_prompt:
            raise InvalidInput(
                f"The field 'best_of' is not supported unless it equals n, which is {self.rows_per_prompt}; "
                "ask for n completions and choose among them.",
                param="best_of",
                code="unsupported_parameter",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidInput(
                "The field 'max_tokens' may only be 0 with echo: true; ask for at least one token.", param="max_tokens"
            )
        if len(self.prompt) * self.rows_per_prompt > MAX_ROWS:
            raise InvalidInput(
                f"The request asks for {len(self.prompt)} x {self.rows_per_prompt} completions, over the limit of "
                f"{MAX_ROWS}; send several requests.",
                param="prompt",
            )
        return self

    @property
    def only_echoes(self) -> bool:
        """Nothing is generated: the request is for the prompt's own log-probabilities."""
        return self.max_tokens == 0
