"""Refuses, by name, the request fields that clients know and this server cannot honour.

A field is let through where its value asks for nothing (null, or the documented default), because SDKs send those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...storage.errors import InvalidInput

Refusals = Mapping[str, Sequence[Any]]  # the field's name to the values that ask for nothing, beside null

# Fields of OpenAI and vLLM that both generation endpoints know.
COMMON: Refusals = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": ([],),
    "mm_processor_kwargs": (),
    "repetition_detection": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "watermarking": (False,),
}


def drop_refused(data: Any, refusals: Refusals) -> Any:
    """The request body without the listed fields. Raises InvalidInput for one that asks for something.

    A body that is no object is returned as it is, for the model's own validation to complain about.
    """
    if not isinstance(data, dict):
        return data
    kept = {}
    for name, value in data.items():
        if name not in refusals:
            kept[name] = value
        elif value is not None and value not in refusals[name]:
            raise InvalidInput(
                f"The field '{name}' is not supported by this server; send the request without it.",
                param=name,
                code="unsupported_parameter",
            )
    return kept
