"""Whole chat completions: their shape, what each field does to the engine's request, and logprobs."""

from typing import Any

import httpx2  # the HTTP client that the official SDK brings
import pytest
from openai import AsyncOpenAI
from tuneloop.engines.base import SamplingParams

from .conftest import BASE, AppFactory, Running

HI = [{"role": "user", "content": "Hi"}]


async def chat(running: Running, **fields: Any) -> dict[str, Any]:
    response = await running.client.post("/v1/chat/completions", json={"model": BASE, "messages": HI, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def sampling(running: Running) -> SamplingParams:
    return running.engine.requests[-1].sampling


async def test_the_shape_is_openais(running: Running) -> None:
    answer = await chat(running)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": BASE,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello from the base model.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 17,
            "completion_tokens": 7,
            "total_tokens": 24,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_tiny",
    }


async def test_a_second_time_the_prompt_comes_from_the_cache(running: Running) -> None:
    await chat(running)
    assert (await chat(running))["usage"]["prompt_tokens_details"]["cached_tokens"] == 16


async def test_unset_fields_are_openais_defaults(running: Running) -> None:
    await chat(running)
    room = running.engine.info.max_model_len - len(running.engine.requests[-1].prompt_token_ids)
    assert sampling(running) == SamplingParams(max_tokens=room)


async def test_unset_fields_come_from_the_checkpoint_first(app_factory: AppFactory) -> None:
    async with app_factory() as running:
        await running.services.registry.load(BASE)  # the app began to by itself
        await running.services.registry.unload(BASE)
        checkpoint = running.home.parent / "checkpoints" / BASE
        (checkpoint / "generation_config.json").write_text(
            '{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}'
        )
        await running.services.registry.load(BASE)
        await chat(running, top_k=5)
        used = sampling(running)
        assert (used.temperature, used.top_p, used.top_k, used.min_p, used.repetition_penalty) == (
            0.6,
            0.9,
            5,
            0.1,
            1.1,
        )
        await chat(running, temperature=0, top_k=-1, top_p=1, min_p=0, repetition_penalty=1)
        used = sampling(running)
        assert (used.temperature, used.top_p, used.top_k, used.min_p, used.repetition_penalty) == (0, 1, 0, 0, 1)


async def test_every_field_reaches_the_engine(running: Running) -> None:
    await chat(
        running,
        n=2,
        temperature=0.5,
        top_p=0.8,
        top_k=7,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        seed=42,
        logit_bias={"5": -100, "6": 3.5},
        stop=["x", "yz"],
        include_stop_str_in_output=True,
        stop_token_ids=[3],
        ignore_eos=True,
        min_tokens=2,
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=3,
        prompt_logprobs=1,
        skip_special_tokens=False,
        priority=-3,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
    )
    assert sampling(running) == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.8,
        top_k=7,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        seed=42,
        logit_bias={5: -100.0, 6: 3.5},
        stop=("x", "yz"),
        include_stop=True,
        stop_token_ids=frozenset({3}),
        ignore_eos=True,
        min_tokens=2,
        max_tokens=4,
        logprobs=3,
        prompt_logprobs=1,
        skip_special_tokens=False,
    )
    assert running.engine.requests[-1].priority == -3


async def test_nulls_mean_not_given(running: Running) -> None:
    names = "n temperature top_p stop seed logit_bias logprobs top_logprobs max_tokens max_completion_tokens tools"
    names += " tool_choice response_format stream stream_options user metadata store service_tier functions audio"
    assert (await chat(running, **dict.fromkeys(names.split())))["choices"][0]["finish_reason"] == "stop"


async def test_a_stop_string_is_cut_and_named(running: Running) -> None:
    choice = (await chat(running, stop=" base"))["choices"][0]
    assert choice["message"]["content"] == "Hello from the"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " base")


async def test_max_tokens_ends_with_length(running: Running) -> None:
    answer = await chat(running, max_tokens=2)
    assert answer["choices"][0]["message"]["content"] == "Hello from"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


async def test_several_choices(running: Running) -> None:
    answer = await chat(running, n=3)
    contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert contents[1:] == ["Hello number 1 from the base model.", "Hello number 2 from the base model."]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 17  # the prompt counts once


async def test_logprobs_have_bytes_and_alternatives(running: Running) -> None:
    choice = (await chat(running, logprobs=True, top_logprobs=2, max_tokens=1))["choices"][0]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("Hello", list(b"Hello"), -0.6931)
    assert [set(other) for other in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    assert choice["logprobs"]["refusal"] is None
    assert (await chat(running, logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_token_ids_and_prompt_logprobs_on_wish(running: Running) -> None:
    answer = await chat(running, return_token_ids=True, prompt_logprobs=0, max_tokens=2)
    ids = answer["prompt_token_ids"]
    assert ids == list(running.engine.requests[-1].prompt_token_ids)
    assert len(answer["choices"][0]["token_ids"]) == 2
    assert answer["prompt_logprobs"][0] is None
    assert [list(entry) for entry in answer["prompt_logprobs"][1:]] == [[str(token_id)] for token_id in ids[1:]]


async def test_the_last_message_can_be_continued_and_echoed(running: Running) -> None:
    messages = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "So, "}]}]
    answer = await chat(running, messages=messages, continue_final_message=True, echo=True)
    assert answer["choices"][0]["message"]["content"] == "So, Hello from the base model."
    prompt = await detokenize(running)
    assert prompt.endswith("<|im_start|>assistant\nSo, ")
    fresh = await chat(running, echo=True)  # nothing of the assistant's to repeat
    assert fresh["choices"][0]["message"]["content"] == "Hello from the base model."


async def test_the_generation_prompt_can_be_left_out(running: Running) -> None:
    answer = await chat(running, add_generation_prompt=False)
    assert (await detokenize(running)).endswith("Hi<|im_end|>\n")
    assert answer["choices"][0]["message"]["role"] == "user"


async def test_all_roles_are_rendered(running: Running) -> None:
    await chat(
        running,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
    )
    assert (await detokenize(running)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


async def test_a_long_chat_is_rendered_too(running: Running) -> None:
    await chat(running, messages=[{"role": "user", "content": "the capital of France " * 300}])
    assert (await detokenize(running)).count("France") == 300


async def test_templates_of_requests_need_the_operators_trust(app_factory: AppFactory) -> None:
    template = "{{ mood }}: {{ messages[0].content }}"
    fields = {"chat_template": template, "chat_template_kwargs": {"mood": "calm"}, "add_special_tokens": False}
    async with app_factory(trust_request_chat_template=True) as running:
        await chat(running, **fields)
        assert await detokenize(running) == "calm: Hi"


async def test_the_official_sdk_reads_it(official: AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello from the base model."
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


async def test_the_sdk_can_send_its_own_answers_back(official: AsyncOpenAI) -> None:
    first = await official.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}])
    messages: list[Any] = [*HI, first.choices[0].message, {"role": "user", "content": "And?"}]
    second = await official.chat.completions.create(model=BASE, messages=messages)
    assert second.choices[0].finish_reason == "stop"


async def test_requests_are_counted(running: Running) -> None:
    await chat(running, max_tokens=3)
    metrics = (await running.client.get("/metrics")).text
    assert 'vllm:generation_tokens_total{model_name="tiny"} 3.0' in metrics
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in metrics
    assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in metrics


async def detokenize(running: Running) -> str:
    """The text of the last prompt that the engine got."""
    ids = list(running.engine.requests[-1].prompt_token_ids)
    response = await running.client.post("/detokenize", json={"model": BASE, "tokens": ids})
    text: str = response.json()["prompt"]
    return text


@pytest.fixture
def official(running: Running) -> AsyncOpenAI:
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(running.app))
    return AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)
