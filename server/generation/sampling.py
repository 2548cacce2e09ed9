"""Turns request fields into the engine's SamplingParams: what is not given comes from the checkpoint, then OpenAI.

It knows no HTTP; it raises InvalidInput where a value does not fit the model.
"""

from typing import TypeVar

from ...engines.base import EngineInfo, SamplingParams
from ...engines.sampling_defaults import SamplingDefaults
from ...storage.errors import ContextTooLong, InvalidInput
from .fields import GenerationFields

_Value = TypeVar("_Value", int, float)


def fit_max_tokens(
    requested: int | None, *, prompt_tokens: int, max_model_len: int, default: int | None = None, prompt_field: str
) -> int:
    """How many tokens the row may generate: what was requested, else `default` or the rest of the context.

    Raises ContextTooLong if the prompt alone, or with what was requested, does not fit.
    """
    room = max_model_len - prompt_tokens
    if requested is None and room >= 1:
        return room if default is None else min(default, room)
    if requested is not None and requested <= room:
        return requested
    if requested is None:
        asked = f"your {prompt_field} has {prompt_tokens} tokens, which leaves no room for a completion. "
    else:
        asked = (
            f"you requested {prompt_tokens + requested} tokens ({prompt_tokens} in the {prompt_field}, {requested} for "
            "the completion). "
        )
    raise ContextTooLong(
        f"This model's maximum context length is {max_model_len} tokens, but {asked}"
        f"Shorten the {prompt_field} or ask for a shorter completion.",
        param=prompt_field,
    )


def sampling_params(
    fields: GenerationFields,
    *,
    info: EngineInfo,
    defaults: SamplingDefaults,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """`logprobs` and `prompt_logprobs` are counts of alternatives; the endpoints ask for them in different fields."""
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidInput(
            f"The field 'min_tokens' is {min_tokens}, but the completion may have only {max_tokens} tokens; lower it.",
            param="min_tokens",
        )
    top_k = _given(fields.top_k, defaults.top_k, 0)
    return SamplingParams(
        n=fields.rows_per_prompt,
        temperature=_given(fields.temperature, defaults.temperature, 1.0),
        top_p=_given(fields.top_p, defaults.top_p, 1.0),
        top_k=max(top_k, 0),  # vLLM's -1 is off, too
        min_p=_given(fields.min_p, defaults.min_p, 0.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_given(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=fields.seed,
        logit_bias=_logit_bias(fields, info.vocab_size),
        stop=tuple(fields.stop or ()),
        include_stop=bool(fields.include_stop_str_in_output),
        stop_token_ids=_stop_token_ids(fields, info.vocab_size),
        ignore_eos=bool(fields.ignore_eos),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=fields.skip_special_tokens is not False,
    )


def _given(requested: _Value | None, recommended: _Value | None, otherwise: _Value) -> _Value:
    if requested is not None:
        return requested
    return otherwise if recommended is None else recommended


def _logit_bias(fields: GenerationFields, vocab_size: int) -> dict[int, float]:
    bias = {int(key): value for key, value in (fields.logit_bias or {}).items()}
    _check_ids(bias, vocab_size, "logit_bias")
    return bias


def _stop_token_ids(fields: GenerationFields, vocab_size: int) -> frozenset[int]:
    ids = frozenset(fields.stop_token_ids or ())
    _check_ids(ids, vocab_size, "stop_token_ids")
    return ids


def _check_ids(ids: dict[int, float] | frozenset[int], vocab_size: int, field: str) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            raise InvalidInput(
                f"The field '{field}' names the token id {token_id}, but this model's ids are 0 to {vocab_size - 1}.",
                param=field,
            )
