"""The official SDK and curl on the real model: answers, streams and every sampling field."""

import asyncio
import json
import math
import subprocess
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, Stream
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from .serving import MODEL, Server, chat, error_of, parse_events, wait_for

PARIS = "The capital of France is Paris."
LONG: dict[str, Any] = {"max_completion_tokens": 4000, "extra_body": {"ignore_eos": True}}


def answer(client: OpenAI, prompt: str = "What is the capital of France?", **fields: Any) -> str:
    completion = client.chat.completions.create(**chat(prompt, **fields))
    return completion.choices[0].message.content or ""


def test_the_sdk_answers_with_paris(client: OpenAI) -> None:
    completion = client.chat.completions.create(**chat())
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", PARIS, "stop")
    assert completion.object == "chat.completion"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_the_sdk_streams_paris(client: OpenAI) -> None:
    stream = client.chat.completions.create(**chat(), stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(text) == PARIS
    assert sum(map(bool, text)) > 3, "it came in pieces"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 8  # seven of text and the end of the turn
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_curl_streams_paris(server: Server) -> None:
    command = ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    body = json.dumps(chat(stream=True))
    done = subprocess.run(command, input=body, capture_output=True, text=True, check=True, timeout=240)
    events = parse_events(done.stdout.splitlines())
    assert events[-1] == ("message", "[DONE]")
    deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == PARIS


def test_n_completions_of_one_seed_come_again(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "n": 3, "seed": 7, "max_completion_tokens": 24}

    def texts(**changes: Any) -> list[str | None]:
        completion = client.chat.completions.create(**chat("Tell me a story.", **(fields | changes)))
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        return [choice.message.content for choice in completion.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first
    assert texts(seed=8) != first


async def test_a_seed_gives_the_same_whatever_else_runs(server: Server) -> None:
    body = chat("Tell me a story.", temperature=1.0, seed=3, max_completion_tokens=24)
    async with server.async_sdk() as client:

        async def text(**changes: Any) -> str | None:
            completion: ChatCompletion = await client.chat.completions.create(**(body | changes))
            return completion.choices[0].message.content

        alone = await text()
        crowd = [text(seed=seed, max_completion_tokens=12 + seed) for seed in range(100, 106)]
        together, *_ = await asyncio.gather(text(), *crowd)
    assert together == alone


def test_stop_strings_across_tokens_are_not_in_the_answer(client: OpenAI) -> None:
    for stop in ("l of Fra", ["nothing", "of France is P"]):
        completion = client.chat.completions.create(**chat(stop=stop))
        cut = PARIS.index(stop if isinstance(stop, str) else stop[1])
        assert completion.choices[0].message.content == PARIS[:cut]
        assert completion.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**chat(stop="l of Fra"), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == PARIS[: PARIS.index("l of Fra")]
    kept = answer(client, stop="of Fra", extra_body={"include_stop_str_in_output": True})
    assert kept == "The capital of Fra"


def test_stop_token_ids_min_tokens_and_limits(client: OpenAI, words: Mapping[str, int]) -> None:
    ids = client.post("/../tokenize", cast_to=httpx.Response, body={"model": MODEL, "prompt": " France"}).json()
    (france,) = ids["tokens"]
    assert answer(client, extra_body={"stop_token_ids": [france]}) == "The capital of"
    completion = client.chat.completions.create(**chat(max_completion_tokens=3))
    assert (completion.choices[0].message.content, completion.choices[0].finish_reason) == ("The capital of", "length")
    assert answer(client, max_tokens=3) == "The capital of"
    longer = client.chat.completions.create(**chat(max_completion_tokens=40, extra_body={"min_tokens": 30}))
    assert longer.usage is not None and longer.usage.completion_tokens >= 30
    endless = client.chat.completions.create(**chat(max_completion_tokens=40, extra_body={"ignore_eos": True}))
    assert endless.usage is not None and endless.usage.completion_tokens == 40


def test_logprobs_are_a_distribution_that_greedy_choices_lead(client: OpenAI) -> None:
    completion = client.chat.completions.create(**chat(logprobs=True, top_logprobs=5))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content[:-1]) == PARIS
    for entry in logprobs.content:
        assert bytes(entry.bytes or ()).decode() == entry.token
        assert len(entry.top_logprobs) == 5
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-6
        assert [other.logprob for other in entry.top_logprobs] == sorted(
            (other.logprob for other in entry.top_logprobs), reverse=True
        )
    stream = client.chat.completions.create(**chat(logprobs=True, top_logprobs=5), stream=True)
    streamed = [
        entry
        for chunk in stream
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in logprobs.content]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in logprobs.content], abs=1e-4
    )


def test_logit_bias_forces_and_forbids(client: OpenAI, words: Mapping[str, int]) -> None:
    water = str(words["water"])
    forced = answer(client, logit_bias={water: 100}, max_completion_tokens=5)
    assert forced.split() == ["water"] * 5
    tokens = client.post("/../tokenize", cast_to=httpx.Response, body={"model": MODEL, "prompt": " Paris"}).json()
    (paris,) = tokens["tokens"]
    assert "Paris" not in answer(client, logit_bias={str(paris): -100}, max_completion_tokens=10)


def test_penalties_end_a_repetition(client: OpenAI) -> None:
    def complete(**fields: Any) -> str:
        completion: Completion = client.completions.create(
            model=MODEL, prompt="1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2,", temperature=0, max_tokens=12, **fields
        )
        return completion.choices[0].text

    repeated = " 1, 2, 1, 2,"
    assert complete() == repeated
    assert complete(frequency_penalty=2.0) != repeated
    penalised = complete(extra_body={"repetition_penalty": 10.0})
    assert not {"1", "2", ","} & set(penalised)
    plain = answer(client, "Tell me a story.", max_completion_tokens=48)
    assert answer(client, "Tell me a story.", max_completion_tokens=48, presence_penalty=2.0) != plain


def test_sampling_filters_can_leave_only_the_best_token(client: OpenAI) -> None:
    hot: dict[str, Any] = {"temperature": 2.0, "seed": 1, "max_completion_tokens": 8}
    assert answer(client, **hot) != PARIS
    for only in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1.0}}):
        assert answer(client, **hot, **only) == PARIS


def test_completions_echo_token_ids_lists_and_logprobs(client: OpenAI) -> None:
    prompt = "The capital of France is"
    completion = client.completions.create(
        model=MODEL,
        prompt=prompt,
        temperature=0,
        max_tokens=2,
        echo=True,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    choice = completion.choices[0]
    assert choice.text.startswith(prompt) and "Paris" in choice.text
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:] if value is not None)
    extra = choice.model_extra or {}
    assert completion.usage is not None
    assert len(extra["prompt_token_ids"]) == completion.usage.prompt_tokens == 5
    assert len(extra["token_ids"]) == 2

    by_ids = client.completions.create(
        model=MODEL, prompt=[extra["prompt_token_ids"], extra["prompt_token_ids"]], temperature=0, max_tokens=2, n=1
    )
    assert [choice.text for choice in by_ids.choices] == [completion.choices[0].text.removeprefix(prompt)] * 2
    scored = client.completions.create(model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == prompt
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(
        choice.logprobs.token_logprobs[:5], abs=1e-3, nan_ok=True
    )


def test_completions_stream_with_usage(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "One, two, three,"],
        temperature=0,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert "Paris" in texts[0] and "four" in texts[1]
    assert last.usage is not None and last.usage.completion_tokens == 8


def test_whole_characters_are_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(**chat("Repeat: 你好，世界 🎉", max_completion_tokens=60), stream=True)
    assert "\ufffd" not in "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).owned_by == "tuneloop"
    with pytest.raises(NotFoundError):
        client.models.retrieve("nobody")


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(**chat(model="org/never-pulled"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**6}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"60000": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"stop_token_ids": [60000]}}, "stop_token_ids"),
        ({"messages": []}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_400_and_named(client: OpenAI, fields: dict[str, Any], param: str, stream: bool) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**chat(stream=stream, **fields))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_routes_methods_and_bodies_that_do_not_exist(server: Server) -> None:
    assert error_of(server.http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(server.http.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    broken = server.http.post(
        "/v1/chat/completions", content=b'{"model": ', headers={"Content-Type": "application/json"}
    )
    assert "JSON" in error_of(broken, 400)["message"]


def test_a_client_that_leaves_frees_its_rows(server: Server, client: OpenAI) -> None:
    stream: Stream[ChatCompletionChunk] = client.chat.completions.create(**chat(n=4, **LONG), stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert server.status()["in_flight"] == 1
    stream.close()
    wait_for(lambda: server.running_rows() == (0, 0), "the rows have left the batch")
    aborted = {"model_name": MODEL, "finished_reason": "abort"}
    wait_for(lambda: server.metric("vllm:request_success_total", **aborted) >= 1, "the request is counted")


def test_tokens_travel_there_and_back(server: Server) -> None:
    text = "Hello, 世界!"
    tokens = server.http.post("/tokenize", json={"model": MODEL, "prompt": text}).json()["tokens"]
    back = server.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()
    assert back["prompt"] == text
