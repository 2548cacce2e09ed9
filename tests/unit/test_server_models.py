"""The models endpoints, the probes, keys over HTTP and the metrics, on an app with the fake engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from tuneloop.engines.fake import FakeConfig
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage.errors import InvalidInput

from .conftest import BASE, AppFactory, MakeAdapter, Running
from .test_server_adapters import answer, post

BUILTIN = "smollm2-135m"


async def test_list_and_retrieve(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "org/support", make_adapter(), base=BASE)
    listed = (await running.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert set(cards) == {BUILTIN, BASE, "org/support"}
    base, adapter = cards[BASE], cards["org/support"]
    assert (base["object"], base["owned_by"], base["parent"]) == ("model", "tuneloop", None)
    assert base["root"].endswith(f"/checkpoints/{BASE}")
    assert (base["max_model_len"], base["status"]["state"], base["status"]["device"]) == (2048, "ready", "fake")
    assert cards[BUILTIN]["status"]["state"] == "unloaded"
    assert (adapter["parent"], adapter["status"], adapter["max_model_len"]) == (BASE, None, 2048)
    for ref in ("org/support", "org/support@1", "org/support@default", BASE):
        card = (await running.client.get(f"/v1/models/{ref}")).json()
        assert (card["id"], card["parent"]) == (ref, None if ref == BASE else BASE)
    missing = await running.client.get("/v1/models/org/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (await running.client.get("/v1/models/org/support@9")).status_code == 404


async def test_the_sdk_reads_them(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "org/support", make_adapter(), base=BASE)
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(running.app))
    async with AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client) as sdk:
        assert {model.id async for model in sdk.models.list()} == {BUILTIN, BASE, "org/support"}
        assert (await sdk.models.retrieve("org/support@1")).id == "org/support@1"
        assert (await sdk.models.delete("org/support")).deleted


async def test_load_unload_pin(running: Running) -> None:
    client, home = running.client, running.home.parent
    source = str(home / "checkpoints" / BASE)
    loaded = await client.post("/v1/models/load", json={"model": "second", "source": source, "pinned": True})
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["status"]["state"], loaded.json()["status"]["pinned"]) == ("ready", True)
    assert await answer(client, "second") == "Hello from the base model."
    pinned = await client.post("/v1/models/pin", json={"model": "second", "pinned": False})
    assert pinned.json()["status"]["pinned"] is False
    unloaded = await client.post("/v1/models/unload", json={"model": "second"})
    assert unloaded.json()["status"]["state"] == "unloaded"
    assert running.engines["second"].closed
    assert (await client.post("/v1/models/load", json={"model": "nobody"})).status_code == 404
    assert (await client.post("/v1/models/load", json={"name": "nobody"})).json()["error"]["param"] is not None
    assert (await client.delete("/v1/models/second")).json()["deleted"] is True
    assert (await client.get("/v1/models/second")).status_code == 404


async def test_a_model_that_is_not_there_cannot_be_deleted(running: Running) -> None:
    refused = await running.client.delete("/v1/models/nobody")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_base_model_with_adapters_is_not_deleted(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "support", make_adapter(), base=BASE)
    assert (await running.client.post("/v1/models/load", json={"model": "support"})).status_code == 409
    assert (await running.client.delete(f"/v1/models/{BASE}")).status_code == 409
    assert (await running.client.delete("/v1/models/support@default")).status_code == 400
    assert (await running.client.delete("/v1/models/support@1")).status_code == 409
    assert (await running.client.delete("/v1/models/support")).status_code == 200


async def test_health_ready_version(app_factory: AppFactory) -> None:
    async with app_factory(config=FakeConfig(start_error=InvalidInput("It has no layers."))) as running:
        assert (await running.client.get("/health")).status_code == 200
        assert "version" in (await running.client.get("/version")).json()
        ready = await running.client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
        assert any(BASE in reason for reason in ready.json()["reasons"])
    async with app_factory() as running:
        await running.services.registry.load(BASE)
        assert (await running.client.get("/ready")).json() == {"status": "ready", "reasons": []}
        running.services.drain.begin()
        ready = await running.client.get("/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the server is shutting down"])
        assert (await running.client.get("/v1/models")).status_code == 503
        assert (await running.client.get("/metrics")).status_code == 200


async def test_keys_over_http(running: Running) -> None:
    client = running.client
    made = (await client.post("/v1/api_keys", json={"name": "root", "scopes": ["admin"]})).json()
    assert made["key"].startswith("tl-")
    assert (await client.get("/v1/models")).status_code == 401
    admin = {"Authorization": f"Bearer {made['key']}"}
    body: dict[str, Any] = {
        "name": "app",
        "rpm_limit": 1,
        "allowed_models": [BASE],
        "expires_at": "2100-01-01T00:00:00Z",
    }
    app = (await client.post("/v1/api_keys", json=body, headers=admin)).json()
    assert (app["scopes"], app["expires_at"]) == (["infer"], 4102444800)
    headers = {"Authorization": f"Bearer {app['key']}"}
    listed = await client.get("/v1/models", headers=headers)
    assert [card["id"] for card in listed.json()["data"]] == [BASE]
    over = await client.get("/v1/models", headers=headers)
    assert (over.status_code, "retry-after" in over.headers) == (429, True)
    keys = (await client.get("/v1/api_keys", headers=admin)).json()["data"]
    assert [key["name"] for key in keys] == ["root", "app"]
    assert all("key" not in key for key in keys)
    assert (await client.delete(f"/v1/api_keys/{app['id']}", headers=admin)).json()["revoked_at"] is not None
    assert (await client.get("/v1/models", headers=headers)).status_code == 401
    wrong = await client.post("/v1/api_keys", json={"name": "x", "scopes": ["root"]}, headers=admin)
    assert wrong.status_code == 400


async def test_a_key_sees_only_its_models(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "support", make_adapter(), base=BASE)
    secret, _ = await running.services.keys.create("s", scopes=["infer"], allowed_models=["support"])
    headers = {"Authorization": f"Bearer {secret}"}
    assert (await running.client.get("/v1/models/support@1", headers=headers)).status_code == 200
    assert (await running.client.get(f"/v1/models/{BASE}", headers=headers)).status_code == 404
    assert (await running.client.delete("/v1/models/support", headers=headers)).status_code == 403


async def test_cors_is_off_until_asked_for(app_factory: AppFactory) -> None:
    origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    async with app_factory() as running:
        assert "access-control-allow-origin" not in (await running.client.get("/health", headers=origin)).headers
    async with app_factory(cors_origins=("https://page.example",), api_key="k") as running:
        preflight = await running.client.options("/v1/chat/completions", headers=origin)
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        refused = await running.client.get("/v1/models", headers=origin)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (401, True)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False)],
)
async def test_an_open_server_beyond_loopback_warns(
    app_factory: AppFactory, settings: dict[str, Any], warns: bool
) -> None:
    with capture_logs() as logs:
        async with app_factory(**settings):
            pass
    assert any("tuneloop keys create" in line["event"] for line in logs) is warns


async def test_pages_of_other_sites_change_nothing(app_factory: AppFactory) -> None:
    evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    async with app_factory(cors_origins=("https://page.example",)) as running:
        files = {"file": ("a", b"")}
        refused = await running.client.post("/v1/adapters", data={"name": "x"}, files=files, headers=evil)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert (await running.client.get("/v1/models", headers=evil)).status_code == 200
        page = {**evil, "Origin": "https://page.example"}
        assert (await running.client.post("/v1/adapters", headers=page)).status_code == 400
        near = {**evil, "Sec-Fetch-Site": "same-origin"}
        assert (await running.client.post("/v1/adapters", headers=near)).status_code == 400


def series(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and sorted labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_metrics_count_models_and_adapters(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "support", make_adapter(), base=BASE)
    await answer(running.client, "support")
    await answer(running.client, BASE)
    response = await running.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = series(response.text)
    model = (("model_name", BASE),)
    adapter = (("adapter", "support"), ("model_name", BASE), ("version", "1"))
    assert found["vllm:request_success_total"][(("finished_reason", "stop"), *model)] == 2
    assert found["vllm:time_to_first_token_seconds_count"][model] == 2
    assert found["vllm:num_requests_running"][model] == 0
    assert found["tuneloop:requests_in_flight"][model] == 0
    assert found["tuneloop:model_ready"][model] == 1
    tokens = found["vllm:generation_tokens_total"][model]
    assert 0 < found["tuneloop:adapter_generation_tokens_total"][adapter] < tokens
    assert found["tuneloop:adapter_e2e_request_latency_seconds_count"][adapter] == 1
    residency = found["tuneloop:adapter_residency"]
    assert [dict(labels)["tier"] for labels in residency] == ["device"]
    assert [dict(labels)["max_lora"] for labels in found["vllm:lora_requests_info"]] == ["8"]

    await running.client.delete("/v1/adapters/support")
    found = series((await running.client.get("/metrics")).text)
    assert "tuneloop:adapter_generation_tokens_total" not in found
    assert "tuneloop:adapter_residency" not in found


async def test_adapters_that_run_are_named(
    running: Running, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (await post(running.client, "org/support", make_adapter(), base=BASE)).json()
    stats = running.engine.stats()

    def busy() -> Any:
        return replace(stats, running_adapters=(card["digest"],), waiting_adapters=(card["digest"], "sha256:gone"))

    monkeypatch.setattr(running.engine, "stats", busy)
    (labels,) = series((await running.client.get("/metrics")).text)["vllm:lora_requests_info"]
    assert dict(labels) == {
        "max_lora": "8",
        "running_lora_adapters": "org/support",
        "waiting_lora_adapters": "org/support",
    }


async def test_trust_in_a_models_own_code_reaches_its_tokenizer(
    app_factory: AppFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[bool] = []
    load = ChatTokenizer.load

    def spy(path: Path, *, trust_remote_code: bool = False) -> ChatTokenizer:
        trusted.append(trust_remote_code)
        return load(path)

    monkeypatch.setattr(ChatTokenizer, "load", spy)
    for trust in (False, True):
        async with app_factory(trust_remote_code=trust) as running:
            await running.services.registry.load(BASE)
    assert trusted == [False, True]
