"""The request fields that chat completions and completions share, with their ranges. Wire types only."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, field_validator, model_validator

from ...storage.errors import InvalidInput
from .refusals import COMMON, Refusals, drop_refused

MAX_LOGPROBS = 20  # OpenAI's limit for chats, vLLM's default one for both
MAX_ROWS = 1024  # prompts x n of one request
MAX_STOP_STRINGS = 32

# JSON has types, and a client that sends "5" or 5.0 for an integer has a bug that is better told than guessed around.
Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Float = Annotated[float, Strict()]
Int64 = Annotated[Int, Field(ge=-(2**63), le=2**63 - 1)]


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopList = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_list), Field(max_length=MAX_STOP_STRINGS)
]


class StreamOptions(BaseModel):
    """`continuous_usage_stats` (vLLM's) adds the usage so far to every chunk; it needs `include_usage`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Bool = False
    continuous_usage_stats: Bool = False
    include_obfuscation: Literal[False] = False


class GenerationFields(BaseModel):
    """None means: not given. Unknown fields are refused, and so are the known ones in `refusals`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    refusals: ClassVar[Refusals] = COMMON

    model: str = Field(min_length=1)
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Float, Field(gt=0, le=10)] | None = None
    seed: Int64 | None = None
    logit_bias: dict[str, Annotated[Float, Field(ge=-100, le=100)]] | None = None
    stop: StopList | None = None
    stop_token_ids: list[Annotated[Int, Field(ge=0)]] | None = None
    include_stop_str_in_output: Bool | None = None
    ignore_eos: Bool | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    skip_special_tokens: Bool | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: Bool | None = None
    return_token_ids: Bool | None = None
    echo: Bool | None = None
    priority: Int64 | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return drop_refused(data, cls.refusals)

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not key.isascii() or not key.isdigit():
                raise ValueError(f"its keys must be token ids, and '{key}' is none")
        return value

    @model_validator(mode="after")
    def _streaming_fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "The field 'stream_options' is only allowed with stream: true; remove it or stream.",
                param="stream_options",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidInput(
                "The field 'prompt_logprobs' is not available in a stream; send stream: false.", param="prompt_logprobs"
            )
        return self

    @property
    def rows_per_prompt(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats
