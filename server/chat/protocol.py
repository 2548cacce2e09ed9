"""The request of POST /v1/chat/completions. Wire types: they know nothing of engines."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ...storage.errors import InvalidInput
from ..generation.fields import MAX_LOGPROBS, Bool, GenerationFields, Int
from ..generation.refusals import COMMON, Refusals
from .messages import ChatMessage

_CHAT_REFUSALS: Refusals = {
    **COMMON,
    "audio": (),
    "documents": (),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "return_prompt_text": (False,),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ChatCompletionRequest(GenerationFields):
    """OpenAI's fields and vLLM's extras that a text model can honour.

    `user`, `safety_identifier`, `prompt_cache_key` and `metadata` identify; they do not change the answer.
    """

    refusals: ClassVar[Refusals] = _CHAT_REFUSALS

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("The field 'top_logprobs' needs logprobs: true; add it.", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidInput(
                "The fields 'max_tokens' and 'max_completion_tokens' mean the same and differ; send only the latter.",
                param="max_tokens",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidInput(
                "The fields 'continue_final_message' and 'add_generation_prompt' exclude each other; set one to false.",
                param="continue_final_message",
            )
        return self

    @property
    def opens_new_message(self) -> bool:
        """Whether the prompt ends with the header of a new assistant message."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def response_role(self) -> str:
        """Whose message is generated: the assistant's, or a continuation of the last one."""
        return "assistant" if self.opens_new_message else self.messages[-1].role
