"""The requests and answers of POST /tokenize and /detokenize, as vLLM has them. Wire types."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...storage.errors import InvalidInput
from ..chat.messages import ChatMessage
from ..generation.fields import Bool, Int
from ..generation.refusals import Refusals, drop_refused

_REFUSALS: Refusals = {"tools": ([],), "media_io_kwargs": (), "mm_processor_kwargs": ()}


class TokenizeRequest(BaseModel):
    """Either `prompt` or `messages`. `model` may be left out where exactly one base model is loaded."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: Bool | None = None  # default: true for a prompt, false for messages
    return_token_strs: Bool | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return drop_refused(data, _REFUSALS)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("Send either 'prompt' or 'messages', and not both.", param="prompt")
        if self.prompt is not None:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise InvalidInput(f"The field '{name}' belongs to 'messages'; remove it.", param=name)
        return self


class TokenizeResponse(BaseModel):
    """`token_strs` are the tokens as the vocabulary writes them, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[Annotated[Int, Field(ge=0)]]


class DetokenizeResponse(BaseModel):
    prompt: str
