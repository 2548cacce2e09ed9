"""/tokenize and /detokenize: vLLM's shape, prompts and chats, and that chats give what serving gives."""

from typing import Any

import pytest

from .conftest import BASE, AppFactory, Running

HI = [{"role": "user", "content": "Hi"}]


async def post(running: Running, path: str, status: int = 200, **body: Any) -> Any:
    response = await running.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


async def test_a_prompt(running: Running) -> None:
    answer = await post(running, "/tokenize", model=BASE, prompt="Hello from", return_token_strs=True)
    assert answer == {"count": 2, "max_model_len": 2048, "tokens": [290, 288], "token_strs": ["Hello", "Ġfrom"]}
    assert (await post(running, "/tokenize", model=BASE, prompt=""))["tokens"] == []


async def test_a_chat_gives_the_ids_that_serving_gives(running: Running) -> None:
    tokens = (await post(running, "/tokenize", model=BASE, messages=HI))["tokens"]
    await post(running, "/v1/chat/completions", model=BASE, messages=HI)
    assert tokens == list(running.engine.requests[-1].prompt_token_ids)
    shorter = await post(running, "/tokenize", model=BASE, messages=HI, add_generation_prompt=False)
    assert shorter["count"] < len(tokens)
    open_end = await post(running, "/tokenize", model=BASE, messages=HI, continue_final_message=True)
    assert open_end["count"] < shorter["count"]


async def test_back_to_text_with_special_tokens(running: Running) -> None:
    tokens = (await post(running, "/tokenize", model=BASE, messages=HI))["tokens"]
    text = (await post(running, "/detokenize", model=BASE, tokens=tokens))["prompt"]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert await post(running, "/detokenize", tokens=[]) == {"prompt": ""}


async def test_the_model_may_be_left_out_if_there_is_one(app_factory: AppFactory, running: Running) -> None:
    assert (await post(running, "/tokenize", prompt="Hello"))["tokens"] == [290]
    await running.services.registry.unload(BASE)
    assert (await post(running, "/tokenize", 400, prompt="Hello"))["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": HI}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": HI, "chat_template": "x"}, "chat_template"),
        ({"messages": HI, "tools": [{}]}, "tools"),
        ({"messages": [{"role": "x"}]}, "messages.0.role"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "color": 1}, "color"),
    ],
)
async def test_tokenize_refusals(running: Running, body: dict[str, Any], param: str) -> None:
    assert (await post(running, "/tokenize", 400, model=BASE, **body))["error"]["param"] == param


@pytest.mark.parametrize(("tokens", "param"), [([99999], "tokens"), ([-1], "tokens.0"), (["a"], "tokens.0")])
async def test_detokenize_refusals(running: Running, tokens: list[Any], param: str) -> None:
    assert (await post(running, "/detokenize", 400, model=BASE, tokens=tokens))["error"]["param"] == param


async def test_unknown_models(running: Running) -> None:
    await post(running, "/tokenize", 404, model="nobody", prompt="a")
    await post(running, "/detokenize", 404, model="nobody", tokens=[1])
