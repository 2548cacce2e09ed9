"""Several base models at once: loaded by call and at first use, unloaded by call, for age and for room."""

from pathlib import Path
from typing import Any

import httpx

from .conftest import StartServer
from .serving import MODEL, Server, chat, error_of, is_gone, wait_for

MIB = 1024**2


def load(server: Server, name: str, path: Path | None = None, **fields: Any) -> dict[str, Any]:
    """POST /v1/models/load; answers with the model's status."""
    body = {"model": name, **({} if path is None else {"source": str(path)}), **fields}
    answer = server.http.post("/v1/models/load", json=body)
    assert answer.status_code == 200, answer.text
    status: dict[str, Any] = answer.json()["status"]
    assert status["state"] == "ready"
    return status


def ask(server: Server, model: str, tokens: int = 2) -> httpx.Response:
    return server.http.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": tokens})


def states(server: Server) -> dict[str, str]:
    """The state of each base model but the built-in one."""
    cards = server.http.get("/v1/models").json()["data"]
    return {card["id"]: card["status"]["state"] for card in cards if card["id"] != MODEL}


def tree_rss(server: Server) -> int:
    """Resident memory of the server and all its workers, in bytes."""
    return sum(process.memory_info().rss for process in (server.process, *server.workers()))


def test_two_models_at_once_and_unloading_frees_the_memory(
    start_server: StartServer, tiny_models: dict[str, Path]
) -> None:
    server = start_server(MODEL)
    assert ask(server, MODEL).status_code == 200
    alone = tree_rss(server)  # with what a first request allocates, as at the end
    tiny = load(server, "tiny", tiny_models["a"])
    assert {worker.pid for worker in server.workers()} == {tiny["pid"], server.status()["pid"]}
    with server.sdk() as client:
        assert {model.id for model in client.models.list()} == {MODEL, "tiny"}
        paris = client.chat.completions.create(**chat())
        assert "Paris" in (paris.choices[0].message.content or "")
        assert client.chat.completions.create(**chat(model="tiny", max_completion_tokens=4)).model == "tiny"
    assert server.card("tiny")["root"] == str(tiny_models["a"])

    # The real one goes, with all of its memory; the other one answers on.
    worker, before = server.worker(), tree_rss(server)
    held = worker.memory_info().rss
    assert server.http.post("/v1/models/unload", json={"model": MODEL}).status_code == 200
    assert is_gone(worker)
    assert tree_rss(server) < before - 0.9 * held
    assert (server.status()["state"], states(server)) == ("unloaded", {"tiny": "ready"})
    assert ask(server, "tiny").status_code == 200
    assert server.http.get("/ready").status_code == 200, "an unloaded model is loaded by its next request"

    # And comes back by itself when somebody asks for it.
    assert ask(server, MODEL).status_code == 200
    assert server.http.delete("/v1/models/tiny").status_code == 200
    assert ask(server, "tiny").status_code == 404
    assert tiny["pid"] not in {worker.pid for worker in server.workers()}
    assert tree_rss(server) < alone + 64 * MIB


def test_a_model_in_use_is_not_unloaded(start_server: StartServer, tiny_models: dict[str, Path]) -> None:
    server = start_server(f"tiny={tiny_models['a']}")
    body = chat(model="tiny", stream=True, ignore_eos=True, max_completion_tokens=8000)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        refused = server.http.post("/v1/models/unload", json={"model": "tiny"})
        assert "use" in error_of(refused, 409)["message"]
        assert next(line for line in lines if line).startswith("data: "), "the stream goes on"
    wait_for(lambda: server.status("tiny")["in_flight"] == 0, "the stream is closed")
    assert server.http.post("/v1/models/unload", json={"model": "tiny"}).status_code == 200
    assert server.workers() == []
    broken = server.http.post("/v1/models/load", json={"model": "x", "source": "/nowhere/at/all"})
    assert "/nowhere/at/all" in error_of(broken, 404)["message"]
    assert states(server) == {"tiny": "unloaded"}, "a refused source makes nothing known"


def test_the_least_recently_used_model_leaves_and_pinned_ones_stay(
    start_server: StartServer, tiny_models: dict[str, Path]
) -> None:
    measured = start_server(f"a={tiny_models['a']}")
    one = measured.status("a")["resident_memory_bytes"]
    measured.stop()

    # Two and a half of them fit, so each third load drives one out.
    server = start_server(f"a={tiny_models['a']}", "--memory-budget-bytes", str(int(2.5 * one)))
    assert server.http.post("/v1/models/pin", json={"model": "a"}).status_code == 200
    load(server, "b", tiny_models["b"])
    worker = server.worker("b")
    load(server, "c", tiny_models["c"])
    wait_for(lambda: states(server) == {"a": "ready", "b": "unloaded", "c": "ready"}, "b is older than c, a is pinned")
    wait_for(lambda: is_gone(worker), "b's worker has ended")

    assert server.http.post("/v1/models/pin", json={"model": "a", "pinned": False}).status_code == 200
    assert ask(server, "c").status_code == 200
    assert ask(server, "b").status_code == 200  # a request loads it again
    wait_for(lambda: states(server) == {"a": "unloaded", "b": "ready", "c": "ready"}, "a was the last to be used")
    assert len(server.workers()) == 2


def test_idle_models_leave_and_pinned_ones_stay(start_server: StartServer, tiny_models: dict[str, Path]) -> None:
    server = start_server(f"a={tiny_models['a']}", "--model-idle-seconds", "1")
    load(server, "b", tiny_models["b"], pinned=True)
    wait_for(lambda: states(server) == {"a": "unloaded", "b": "ready"}, "a was idle for a second")
    assert server.http.get("/ready").status_code == 200
    assert ask(server, "a").status_code == 200
    wait_for(lambda: states(server) == {"a": "unloaded", "b": "ready"}, "and is so again")
    assert len(server.workers()) == 1
