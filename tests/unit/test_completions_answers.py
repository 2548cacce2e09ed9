"""Whole completions: prompts in every form, echo, logprobs, and what is refused."""

from typing import Any

import pytest

from .conftest import BASE, Running


async def complete(running: Running, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    response = await running.client.post("/v1/completions", json={"model": BASE, "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_the_shape_is_openais(running: Running) -> None:
    answer = await complete(running)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": BASE,
        "system_fingerprint": "fp_tiny",
        "choices": [
            {
                "index": 0,
                "text": "Hello from the base model.",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 7,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_the_default_length_is_sixteen_tokens(running: Running) -> None:
    running.engine.reply = lambda _request, _index: "Hello from" * 30
    answer = await complete(running)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hello", [[290]]),
        (["Hello", " from"], [[290], [288]]),
        ([290, 288], [[290, 288]]),
        ([[290], [288, 290]], [[290], [288, 290]]),
        (["Hello", [288]], [[290], [288]]),
    ],
)
async def test_prompts_in_every_form(running: Running, prompt: Any, expected: list[list[int]]) -> None:
    answer = await complete(running, prompt, n=2)
    assert [list(request.prompt_token_ids) for request in running.engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert [choice["text"] for choice in answer["choices"]][:2] == [
        "Hello from the base model.",
        "Hello number 1 from the base model.",
    ]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_echo_puts_the_prompt_in_front(running: Running) -> None:
    answer = await complete(running, ["Hello", [290, 288]], echo=True, max_tokens=1)
    assert [choice["text"] for choice in answer["choices"]] == ["HelloHello", "Hello fromHello"]


async def test_logprobs_in_the_old_form(running: Running) -> None:
    choice = (await complete(running, logprobs=2, max_tokens=3))["choices"][0]
    assert choice["logprobs"]["tokens"] == ["Hello", " from", " the"]
    assert choice["logprobs"]["text_offset"] == [0, 5, 10]
    assert choice["logprobs"]["token_logprobs"] == [-0.6931] * 3
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2, 2, 2]
    zero = (await complete(running, logprobs=0, max_tokens=1))["choices"][0]
    assert zero["logprobs"]["top_logprobs"] == [{"Hello": -0.6931}]


async def test_a_prompt_can_be_scored_without_generating(running: Running) -> None:
    """What lm-eval's loglikelihood asks for."""
    answer = await complete(running, "Hello from", echo=True, max_tokens=0, logprobs=1, return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["text"] == "Hello from"
    assert choice["logprobs"]["tokens"] == ["Hello", " from"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.6931]
    assert choice["logprobs"]["top_logprobs"] == [None, {" from": -0.6931}]
    assert (choice["finish_reason"], choice["token_ids"]) == ("length", [])
    assert answer["usage"]["completion_tokens"] == 0


async def test_parts_of_characters_stay_apart_in_logprobs(running: Running) -> None:
    running.engine.reply = lambda _request, _index: "é!"
    logprobs = (await complete(running, logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"][:3] == [0, 0, 1]


async def test_token_ids_and_prompt_logprobs_on_wish(running: Running) -> None:
    choice = (await complete(running, [290, 288], return_token_ids=True, prompt_logprobs=1, max_tokens=1))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([290, 288], [290])
    assert choice["prompt_logprobs"] == [
        None,
        {"288": {"logprob": -0.6931, "rank": 1, "decoded_token": " from"}},
    ]


async def test_best_of_equal_to_n_asks_for_nothing(running: Running) -> None:
    assert len((await complete(running, n=2, best_of=2))["choices"]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["a"] * 600, "n": 2}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2048}, "prompt"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
async def test_refusals_name_the_field(running: Running, fields: dict[str, Any], param: str) -> None:
    body = {"model": BASE, "prompt": "Hello", **fields}
    response = await running.client.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert running.engine.requests == []
