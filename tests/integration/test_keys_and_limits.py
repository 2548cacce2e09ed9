"""API keys and the queue limit as the SDK's exception classes, on a real server that asks for keys."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, NotFoundError, PermissionDeniedError, RateLimitError, Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from .conftest import StartServer
from .serving import Server, chat, error_of, wait_for

ADMIN = "an-admin-key-of-this-test"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def guarded(start_module_server: StartServer, tiny_models: dict[str, Path]) -> Server:
    """A server with an admin key, one row at a time and a queue of one."""
    return start_module_server(
        f"tiny={tiny_models['a']}", "--max-num-seqs", "1", "--max-waiting", "1", env={"TUNELOOP_API_KEY": ADMIN}
    )


def make_key(server: Server, **fields: Any) -> tuple[str, str]:
    """A new key's id and its secret."""
    answer = server.http.post("/v1/api_keys", json={"name": "test", **fields}, headers=AS_ADMIN)
    assert answer.status_code == 200, answer.text
    card = answer.json()
    return card["id"], card["key"]


def ask(server: Server, key: str) -> str:
    """A short chat by the SDK; the name of the model that answered."""
    with server.sdk(key) as client:
        answer: ChatCompletion = client.chat.completions.create(**chat(model="tiny", max_completion_tokens=2))
        return answer.model


def test_without_a_key_or_with_a_wrong_one_nothing_goes(guarded: Server) -> None:
    for key in ("wrong", ADMIN + "x"):
        with pytest.raises(AuthenticationError) as caught:
            ask(guarded, key)
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    bare = guarded.http.get("/v1/models")
    assert error_of(bare, 401)["type"] == "authentication_error"
    assert bare.headers["www-authenticate"].startswith("Bearer")
    for probe in ("/health", "/ready", "/metrics", "/version"):
        assert guarded.http.get(probe).status_code == 200
    assert ask(guarded, ADMIN) == "tiny"


def test_a_scope_allows_what_it_says(guarded: Server) -> None:
    key_id, key = make_key(guarded, scopes=["infer"])
    assert ask(guarded, key) == "tiny"
    with guarded.sdk(key) as client:
        assert "tiny" in {model.id for model in client.models.list()}
        with pytest.raises(PermissionDeniedError) as caught:
            client.post("/adapters", cast_to=httpx.Response, body={"name": "x", "source": "/tmp"})
        assert "tune" in str(caught.value)
        with pytest.raises(PermissionDeniedError):
            client.post("/models/unload", cast_to=httpx.Response, body={"model": "tiny"})
        assert guarded.http.delete(f"/v1/api_keys/{key_id}", headers=AS_ADMIN).status_code == 200
        with pytest.raises(AuthenticationError):
            client.models.list()
    assert key not in guarded.http.get("/v1/api_keys", headers=AS_ADMIN).text
    assert key.encode() not in (guarded.home / "tuneloop.db").read_bytes()
    assert key not in guarded.log_text()


def test_a_key_may_be_bound_to_models(guarded: Server) -> None:
    _, key = make_key(guarded, scopes=["infer"], allowed_models=["another"])
    with guarded.sdk(key) as client:
        assert list(client.models.list()) == []
        with pytest.raises(NotFoundError):
            client.models.retrieve("tiny")
    with pytest.raises(PermissionDeniedError) as caught:
        ask(guarded, key)
    assert caught.value.param == "model"


def test_a_quota_is_a_rate_limit(guarded: Server) -> None:
    _, key = make_key(guarded, scopes=["infer"], rpm_limit=1)
    assert ask(guarded, key) == "tiny"
    with pytest.raises(RateLimitError) as caught:
        ask(guarded, key)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_a_rate_limit_and_frees_itself(guarded: Server) -> None:
    endless = chat(model="tiny", max_completion_tokens=8000, extra_body={"ignore_eos": True})
    tiny = {"model_name": "tiny"}
    with guarded.sdk(ADMIN) as client, ThreadPoolExecutor() as pool:
        first: Stream[ChatCompletionChunk] = client.chat.completions.create(**endless, stream=True)
        with first:
            next(first)
            second = pool.submit(ask, guarded, ADMIN)
            wait_for(lambda: guarded.metric("vllm:num_requests_waiting", **tiny) == 1, "the second one waits")
            with pytest.raises(RateLimitError) as caught:
                ask(guarded, ADMIN)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            with pytest.raises(RateLimitError):  # a stream is refused by its status, too
                client.chat.completions.create(**endless, stream=True)
            assert not second.done()
        assert second.result() == "tiny", "it runs once the first has left"
    assert guarded.metric("vllm:request_success_total", **tiny, finished_reason="abort") == 1
