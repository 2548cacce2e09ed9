"""Every field that OpenAI's SDK or vLLM's clients can send is either honoured or refused by name; none is unknown."""

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel
from tuneloop.server.chat.protocol import ChatCompletionRequest
from tuneloop.server.completions.protocol import CompletionRequest
from tuneloop.server.generation.fields import GenerationFields

SHARED = [
    "model",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
    "add_special_tokens",
    "return_token_ids",
    "echo",
    "priority",
    "stream",
    "stream_options",
    "user",
]
CHAT = [
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
]
COMPLETION = ["prompt", "logprobs", "best_of"]

VLLM = [
    "use_beam_search",
    "length_penalty",
    "stop_token_ids",
    "truncate_prompt_tokens",
    "truncation_side",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "stream_interval",
    "thinking_token_budget",
    "watermarking",
    "spaces_between_special_tokens",
]
VLLM_CHAT = [
    "tools",
    "tool_choice",
    "reasoning_effort",
    "include_reasoning",
    "parallel_tool_calls",
    "documents",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "return_prompt_text",
]


def test_the_accepted_fields_are_fixed() -> None:
    assert sorted(ChatCompletionRequest.model_fields) == sorted([*SHARED, *CHAT])
    assert sorted(CompletionRequest.model_fields) == sorted([*SHARED, *COMPLETION])


@pytest.mark.parametrize(
    ("request_type", "names"),
    [
        (ChatCompletionRequest, {*chat_create_params.CompletionCreateParamsBase.__annotations__, *VLLM, *VLLM_CHAT}),
        (CompletionRequest, {*completion_create_params.CompletionCreateParamsBase.__annotations__, *VLLM}),
    ],
)
def test_no_known_field_is_unknown(request_type: type[GenerationFields], names: set[str]) -> None:
    known = {*request_type.model_fields, *request_type.refusals}
    assert names <= known, names - known


@pytest.mark.parametrize("request_type", [ChatCompletionRequest, CompletionRequest])
def test_no_field_is_both_accepted_and_refused(request_type: type[GenerationFields]) -> None:
    assert not set(request_type.model_fields) & set(request_type.refusals)


@pytest.mark.parametrize("request_type", [ChatCompletionRequest, CompletionRequest])
def test_the_schema_can_be_published(request_type: type[BaseModel]) -> None:
    assert request_type.model_json_schema()["additionalProperties"] is False
