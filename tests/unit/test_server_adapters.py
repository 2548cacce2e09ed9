"""Adapters over HTTP, from upload to rollback, with the real store and validation and a fake engine."""

import asyncio
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from tuneloop.storage.errors import InvalidInput, Unavailable

from .conftest import BASE, AppFactory, MakeAdapter, Running

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tar_gz(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, "adapter")
    return buffer.getvalue()


async def post(client: httpx.AsyncClient, name: str, folder: Path, **data: str) -> httpx.Response:
    files = {"file": ("a.tar.gz", tar_gz(folder))}
    return await client.post("/v1/adapters", data={"name": name, **data}, files=files)


async def put(client: httpx.AsyncClient, name: str, folder: Path) -> httpx.Response:
    return await client.put(f"/v1/adapters/{name}", files={"file": ("a.tar.gz", tar_gz(folder))})


async def answer(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def nothing_is_left(running: Running) -> None:
    kept = [path.name for path in running.home.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert not any("safetensors" in name or name.startswith("part-") for name in kept), kept


async def test_upload_replace_alias_rollback_delete(running: Running, make_adapter: MakeAdapter) -> None:
    client = running.client
    created = await post(client, "support", make_adapter(1), base=BASE)
    assert created.status_code == 200, created.text
    card = created.json()
    assert (card["name"], card["base"], card["version"], card["versions"]) == ("support", BASE, 1, [1])
    assert card["aliases"] == {"default": {"1": 1.0}}
    assert card["digest"] in running.engine.resident  # it was warm before we heard of it
    assert await answer(client, "support") == "Hello from support@1."

    replaced = await put(client, "support", make_adapter(2))
    assert replaced.json()["version"] == 2
    assert await answer(client, "support") == "Hello from support@2."
    assert await answer(client, "support@1") == "Hello from support@1."

    alias = await client.put("/v1/adapters/support/aliases/prod", json={"version": 1})
    assert alias.json()["version"] == 1
    assert await answer(client, "support@prod") == "Hello from support@1."
    split = await client.put("/v1/adapters/support/aliases/prod", json={"weights": {"1": 9, "2": 1}})
    assert split.json()["weights"] == {"1": 0.9, "2": 0.1}
    assert split.json()["version"] is None
    assert (await client.get("/v1/adapters/support/aliases/prod")).json() == split.json()

    back = await client.post("/v1/adapters/support/rollback")
    assert (back.json()["alias"], back.json()["version"]) == ("default", 1)
    back = await client.post("/v1/adapters/support/rollback", json={"alias": "prod"})
    assert (back.json()["alias"], back.json()["version"]) == ("prod", 1)
    assert await answer(client, "support") == "Hello from support@1."

    assert [v["version"] for v in (await client.get("/v1/adapters/support/versions")).json()["data"]] == [1, 2]
    assert (await client.delete("/v1/adapters/support/versions/1")).status_code == 409
    assert (await client.delete("/v1/adapters/support/versions/2")).json()["deleted"] is True
    assert (await client.delete("/v1/adapters/support/aliases/prod")).json()["id"] == "support@prod"
    listed = (await client.get("/v1/adapters")).json()
    assert listed["object"] == "list"
    assert [adapter["name"] for adapter in listed["data"]] == ["support"]

    assert (await client.delete("/v1/adapters/support")).json()["deleted"] is True
    assert (await client.get("/v1/adapters/support")).status_code == 404
    assert (await client.get("/v1/adapters")).json()["data"] == []
    nothing_is_left(running)


async def test_the_ways_to_upload_give_the_same_version(running: Running, make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    weights, config = (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(WEIGHTS, weights)
        archive.writestr(CONFIG, config)
    ways: list[Any] = [
        {"file": ("whatever", tar_gz(folder))},
        {"file": ("whatever", zipped.getvalue())},
        [("file", (WEIGHTS, weights)), ("file", (CONFIG, config))],
        {"adapter_config": ("c", config), "adapter_model": ("m", weights)},
    ]
    digests = set()
    for number, files in enumerate(ways):
        response = await running.client.post("/v1/adapters", data={"name": f"way-{number}", "base": BASE}, files=files)
        assert response.status_code == 200, response.text
        digests.add(response.json()["digest"])
    assert len(digests) == 1


async def test_the_same_files_again_change_nothing(running: Running, make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    await post(running.client, "support", folder)
    assert (await put(running.client, "support", folder)).json()["versions"] == [1]


async def test_by_json_from_an_allowed_path_only(
    app_factory: AppFactory, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter()
    secret = tmp_path / "secret"
    folder.rename(secret)
    allowed = tmp_path / "adapters"
    (allowed / "ok").mkdir()
    for path in secret.iterdir():
        (allowed / "ok" / path.name).write_bytes(path.read_bytes())
    (allowed / "link").symlink_to(secret)
    async with app_factory(adapter_roots=(allowed,)) as running:
        body = {"name": "a", "base": BASE, "source": str(allowed / "ok")}
        created = await running.client.post("/v1/adapters", json=body)
        assert created.status_code == 200, created.text
        version = (await running.client.get("/v1/adapters/a/versions/1")).json()
        assert (version["origin"], version["source"]) == ("path", str(allowed / "ok"))
        for source in (str(secret), str(allowed / "link"), str(allowed / ".." / "secret"), f"file://{secret}"):
            refused = await running.client.post("/v1/adapters", json={**body, "name": "b", "source": source})
            assert refused.status_code == 403, source
        replaced = await running.client.put("/v1/adapters/a", json={"source": str(allowed / "ok")})
        assert replaced.json()["versions"] == [1]
        unknown = await running.client.post("/v1/adapters", json={**body, "sauce": "x"})
        assert unknown.json()["error"]["param"] == "sauce"


async def test_refusals_leave_nothing_behind(running: Running, make_adapter: MakeAdapter) -> None:
    client = running.client
    cases: list[tuple[Path, dict[str, str], int, str]] = [
        (make_adapter(), {"base": "nobody"}, 404, "no base model 'nobody'"),
        (make_adapter(rank=300), {"base": BASE}, 413, "rank"),
        (make_adapter(peft_type="IA3"), {"base": BASE}, 400, "peft_type"),
        (make_adapter(), {"base": BASE, "bass": "x"}, 400, "'bass' is not known"),
    ]
    for folder, data, status, words in cases:
        response = await post(client, "bad", folder, **data)
        assert (response.status_code, words in response.json()["error"]["message"]) == (status, True), response.text
    for name, status in ((BASE, 409), ("a@b", 400), ("../x", 400), ("org/versions", 400), ("", 400)):
        assert (await post(client, name, make_adapter(), base=BASE)).status_code == status, name
    files = {"file": ("adapter_model.bin", b"\x80\x04}.")}
    assert (await client.post("/v1/adapters", data={"name": "p", "base": BASE}, files=files)).status_code == 400
    lone = {"file": (CONFIG, b"{}")}
    assert "adapter_model" in (await client.post("/v1/adapters", data={"name": "p"}, files=lone)).text
    assert (await client.post("/v1/adapters", content=b"x", headers={"Content-Type": "text/plain"})).status_code == 400
    assert (await client.get("/v1/adapters")).json()["data"] == []
    nothing_is_left(running)


async def test_new_and_existing_are_told_apart(running: Running, make_adapter: MakeAdapter) -> None:
    assert (await put(running.client, "support", make_adapter())).status_code == 404
    assert (await post(running.client, "support", make_adapter())).status_code == 200
    assert (await post(running.client, "support", make_adapter(2))).status_code == 409
    files = {"file": ("a.tar.gz", tar_gz(make_adapter(3)))}
    mixed = await running.client.put("/v1/adapters/support", data={"name": "other"}, files=files)
    assert mixed.json()["error"]["param"] == "name"


@pytest.mark.parametrize("error", [InvalidInput("It does not fit."), Unavailable("The worker died.")])
async def test_what_the_engine_refuses_is_taken_back(
    running: Running, make_adapter: MakeAdapter, error: InvalidInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(version: Any) -> None:
        raise error

    await post(running.client, "kept", make_adapter(1))
    monkeypatch.setattr(running.engine, "load_adapter", refuse)
    assert (await post(running.client, "new", make_adapter(2))).status_code in (400, 503)
    assert (await put(running.client, "kept", make_adapter(3))).status_code in (400, 503)
    assert (await put(running.client, "kept", make_adapter(1))).status_code in (400, 503)  # the live version stays
    monkeypatch.undo()
    adapters = (await running.client.get("/v1/adapters")).json()["data"]
    assert [(a["name"], a["version"], a["versions"]) for a in adapters] == [("kept", 1, [1])]
    assert await answer(running.client, "kept") == "Hello from kept@1."


async def test_uploads_of_one_name_take_turns(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "support", make_adapter(0))
    folders = [make_adapter(seed) for seed in range(1, 5)]
    answers = await asyncio.gather(*(put(running.client, "support", folder) for folder in folders))
    assert sorted(response.json()["version"] for response in answers) == [2, 3, 4, 5]


async def test_no_request_fails_while_versions_are_replaced(running: Running, make_adapter: MakeAdapter) -> None:
    await post(running.client, "support", make_adapter(0))
    replacing = True

    async def ask() -> set[str]:
        seen = set()
        while replacing:
            seen.add(await answer(running.client, "support"))
        return seen

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    for seed in range(1, 11):
        assert (await put(running.client, "support", make_adapter(seed))).status_code == 200
    replacing = False
    seen = set().union(*await asyncio.gather(*asking))
    assert seen <= {f"Hello from support@{number}." for number in range(1, 12)}
    assert len(seen) > 1
    for _ in range(50):  # the last old version is let go in a task of its own
        await asyncio.sleep(0)
    assert list(running.engine.resident) == [(await running.client.get("/v1/adapters/support")).json()["digest"]]


@pytest.mark.parametrize("name", ["org/team/support", "ft:tiny:me:x9", "org/versions2"])
async def test_names_with_slashes_and_colons_work_everywhere(
    running: Running, make_adapter: MakeAdapter, name: str
) -> None:
    client = running.client
    assert (await post(client, name, make_adapter(1))).status_code == 200
    for shown in (name, name.replace("/", "%2F").replace(":", "%3A")):
        assert (await client.get(f"/v1/adapters/{shown}")).json()["name"] == name
        assert (await client.get(f"/v1/adapters/{shown}/versions/1")).json()["id"] == f"{name}@1"
        assert (await client.put(f"/v1/adapters/{shown}/aliases/prod", json={"version": 1})).status_code == 200
        assert (await client.get(f"/v1/models/{shown}@prod")).json()["parent"] == BASE
    assert await answer(client, f"{name}@prod") == f"Hello from {name}@1."
    assert (await client.post(f"/v1/adapters/{name}/pin")).json()["pinned"] is True
    assert (await client.post(f"/v1/adapters/{name}/unpin")).json()["pinned"] is False
    assert (await client.get(f"/v1/adapters/{name}/rollback")).status_code == 405
    assert (await client.delete(f"/v1/models/{name}")).json() == {"id": name, "object": "model", "deleted": True}


async def test_a_download_can_be_uploaded_again(running: Running, make_adapter: MakeAdapter) -> None:
    client = running.client
    first = (await post(client, "a/b", make_adapter(1))).json()
    await put(client, "a/b", make_adapter(2))
    for path in ("a/b/versions/1/download", "a/b/download?version=1"):
        response = await client.get(f"/v1/adapters/{path}")
        assert 'filename="a-b-1.tar.gz"' in response.headers["content-disposition"]
        files = {"file": ("x", response.content)}
        again = await client.post("/v1/adapters", data={"name": f"copy-{len(path)}", "base": BASE}, files=files)
        assert again.json()["digest"] == first["digest"], again.text
    assert (await client.get("/v1/adapters/a/b/download")).headers["content-disposition"].endswith('"a-b-2.tar.gz"')
    assert (await client.get("/v1/adapters/a/b/versions/9/download")).status_code == 404


@pytest.mark.parametrize(
    "body", [{}, {"version": 1, "weights": {"1": 1}}, {"version": 0}, {"weights": {}}, {"weights": {"x": 1}}, {"v": 1}]
)
async def test_an_alias_needs_exactly_one_target(
    running: Running, make_adapter: MakeAdapter, body: dict[str, Any]
) -> None:
    await post(running.client, "support", make_adapter())
    response = await running.client.put("/v1/adapters/support/aliases/prod", json=body)
    assert response.status_code == 400


async def test_an_upload_over_the_limit_is_refused(app_factory: AppFactory, make_adapter: MakeAdapter) -> None:
    async with app_factory(max_upload_bytes=100) as running:
        response = await post(running.client, "big", make_adapter())
        assert response.status_code == 413
        assert "max_upload_bytes" in response.json()["error"]["message"]
        nothing_is_left(running)


async def test_a_restart_keeps_what_was_acknowledged(app_factory: AppFactory, make_adapter: MakeAdapter) -> None:
    async with app_factory() as running:
        card = (await post(running.client, "support", make_adapter())).json()
    async with app_factory() as running:
        assert (await running.client.get("/v1/adapters/support")).json() == card
        assert await answer(running.client, "support") == "Hello from support@1."


async def test_the_base_is_known_without_being_said(app_factory: AppFactory, make_adapter: MakeAdapter) -> None:
    async with app_factory() as running:  # two are known: ours and the built-in one
        assert (await post(running.client, "named", make_adapter(1))).json()["base"] == BASE
        await running.services.registry.load(BASE)
        assert (await post(running.client, "loaded", make_adapter(2, base="org/else"))).json()["base"] == BASE
        await running.services.registry.unload(BASE)
        response = await post(running.client, "unclear", make_adapter(3, base="org/else"))
        assert response.json()["error"]["param"] == "base"


def load(name: str, path: object, **extra: object) -> dict[str, object]:
    return {"lora_name": name, "lora_path": str(path), **extra}


async def test_vllm_calls(app_factory: AppFactory, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    first, second, broken = make_adapter(1), make_adapter(2), make_adapter(peft_type="IA3")
    async with app_factory(adapter_roots=(tmp_path / "adapters",)) as running:
        call = running.client.post
        url, off = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        response = await call(url, json=load("org/sql:1", first))
        assert (response.status_code, response.text) == (
            200,
            "Success: LoRA adapter 'org/sql:1' added successfully.",
        )
        card = (await running.client.get("/v1/models/org/sql:1")).json()
        assert (card["root"], card["parent"]) == (str(first), BASE)
        again = await call(url, json=load("org/sql:1", second))
        assert again.status_code == 400
        assert again.json()["error"] == {
            "message": "The lora adapter 'org/sql:1' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True.",
            "type": "InvalidUserInput",
            "param": None,
            "code": 400,
        }
        assert (await call(url, json=load("org/sql:1", second, load_inplace=True))).status_code == 200
        assert await answer(running.client, "org/sql:1") == "Hello from org/sql:1@2."
        for body, status in (
            (load("", first), 400),
            (load(BASE, first), 400),
            (load("x", broken), 400),
            (load("x", tmp_path / "adapters" / "none"), 404),
            (load("x", "/etc"), 403),
            ({"lora_name": "x"}, 400),
        ):
            assert (await call(url, json=body)).status_code == status, body
        response = await call(off, json={"lora_name": "org/sql:1"})
        assert (response.status_code, response.text) == (
            200,
            "Success: LoRA adapter 'org/sql:1' removed successfully.",
        )
        gone = await call(off, json={"lora_name": "org/sql:1"})
        assert (gone.status_code, gone.json()["error"]["type"]) == (404, "NotFoundError")
        assert (await call(off, json={"lora_name": ""})).status_code == 400


async def test_scopes(app_factory: AppFactory, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    async with app_factory(api_key="root", adapter_roots=(tmp_path,)) as running:
        keys = running.services.keys
        infer, _ = await keys.create("i", scopes=["infer"])
        tune, _ = await keys.create("t", scopes=["tune"], allowed_models=["mine"])
        client = running.client

        async def status(method: str, path: str, key: str, **extra: Any) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (await client.request(method, path, headers=headers, **extra)).status_code

        upload = {"data": {"name": "mine"}, "files": {"file": ("a", tar_gz(make_adapter()))}}
        other = {"data": {"name": "other"}, "files": {"file": ("a", tar_gz(make_adapter()))}}
        assert await status("POST", "/v1/adapters", infer, **upload) == 403
        assert await status("POST", "/v1/adapters", tune, **upload) == 200
        assert await status("POST", "/v1/adapters", tune, **other) == 403
        assert await status("GET", "/v1/adapters", infer) == 200
        assert await status("POST", "/v1/load_lora_adapter", tune, json=load("x", tmp_path)) == 403
        assert await status("DELETE", "/v1/adapters/mine", infer) == 403
        assert await status("DELETE", "/v1/adapters/mine", "root") == 200
        assert (await client.get("/v1/adapters")).status_code == 401
        assert json.loads((await client.get("/v1/adapters")).text)["error"]["type"] == "authentication_error"
