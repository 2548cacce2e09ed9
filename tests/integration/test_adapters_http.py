"""Adapters over HTTP with the real model: every way in, versions, aliases, vLLM's calls, and downloads."""

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tuneloop.adapters.base import ModuleShape

from .conftest import Forcing
from .peft_files import CONFIG, WEIGHTS, PeftFiles, random_adapter
from .serving import MODEL, Server, chat, error_of

Files = list[tuple[str, tuple[str, bytes]]]


@pytest.fixture
def name(server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """An adapter name of this test's own, free again afterwards."""
    name = f"http/{request.node.name.partition('[')[0].removeprefix('test_')}"
    yield name
    server.http.delete(f"/v1/adapters/{name}")


@pytest.fixture(scope="module")
def two(forcing: Forcing, words: Mapping[str, int]) -> tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]]:
    """Two adapters with the words that they force."""
    first, second = list(words)[100:102]
    return (first, forcing(first)), (second, forcing(second, rank=4))


def archive(content: bytes) -> Files:
    return [("file", ("adapter", content))]


def create(server: Server, name: str, files: Files, **fields: str) -> dict[str, Any]:
    """POST /v1/adapters as a form."""
    answer = server.http.post("/v1/adapters", data={"name": name, "base": MODEL, **fields}, files=files)
    assert answer.status_code == 200, answer.text
    card: dict[str, Any] = answer.json()
    return card


def says(server: Server, model: str) -> str:
    """The word that a forcing adapter repeats."""
    answer = server.http.post("/v1/chat/completions", json=chat(model=model, max_completion_tokens=3))
    assert answer.status_code == 200, answer.text
    (word,) = set(answer.json()["choices"][0]["message"]["content"].split())
    return str(word)


FORMS: dict[str, Callable[[PeftFiles], Files]] = {
    "tar.gz": lambda files: archive(files.tar_gz()),
    "zip": lambda files: archive(files.zip()),
    "two files": lambda files: [("file", item) for item in files.files().items()],
    "two fields": lambda files: [
        ("adapter_config", (CONFIG, files.files()[CONFIG])),
        ("adapter_model", (WEIGHTS, files.files()[WEIGHTS])),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_upload_is_live_when_it_is_answered(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], ...], form: str
) -> None:
    (word, files), _ = two
    card = create(server, name, FORMS[form](files))
    assert (card["id"], card["base"], card["version"], card["versions"]) == (name, MODEL, 1, [1])
    assert says(server, name) == word
    listed = server.http.get("/v1/adapters").json()
    assert listed["object"] == "list" and card in listed["data"]
    with server.sdk() as client:
        model = client.models.retrieve(name)
        extra = model.model_extra or {}
        assert extra["parent"] == MODEL and extra["root"]


def test_versions_aliases_and_rollback(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]]
) -> None:
    (first, files), (second, other) = two
    create(server, name, archive(files.tar_gz()))
    url = f"/v1/adapters/{name}"
    replaced = server.http.put(url, files=archive(other.zip()))
    assert (replaced.json()["version"], replaced.json()["versions"]) == (2, [1, 2])
    assert [says(server, f"{name}{suffix}") for suffix in ("", "@1", "@2")] == [second, first, second]

    assert server.http.put(f"{url}/aliases/prod", json={"version": 1}).json()["version"] == 1
    assert says(server, f"{name}@prod") == first
    assert server.http.post(f"{url}/rollback").json()["version"] == 1
    assert says(server, name) == first
    again = server.http.put(url, files=archive(files.zip()))
    assert again.json()["versions"] == [1, 2], "the same files are the version that is live already"

    assert error_of(server.http.delete(f"{url}/versions/1"), 409)["code"]
    assert server.http.delete(f"{url}/versions/2").status_code == 200
    for missing in ("@2", "@9", "@nobody"):
        answer = server.http.post("/v1/chat/completions", json=chat(model=name + missing))
        assert missing[1:] in error_of(answer, 404)["message"]
    assert server.http.delete(f"{url}/aliases/prod").status_code == 200
    assert error_of(server.http.put(f"{url}/aliases/prod", json={"version": 7}), 404)

    assert server.http.delete(url).json() == {"id": name, "object": "adapter", "deleted": True}
    assert error_of(server.http.post("/v1/chat/completions", json=chat(model=name)), 404)["code"] == "model_not_found"
    assert error_of(server.http.get(url), 404)


def test_an_alias_splits_its_traffic_by_weight(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]]
) -> None:
    (first, files), (second, other) = two
    create(server, name, archive(files.zip()))
    server.http.put(f"/v1/adapters/{name}", files=archive(other.zip()))
    split = {"weights": {"1": 3, "2": 1}}
    alias = server.http.put(f"/v1/adapters/{name}/aliases/split", json=split).json()
    assert (alias["weights"], alias["version"]) == ({"1": 0.75, "2": 0.25}, None)

    # The bound is six standard deviations below 75: this fails by chance once in a billion runs.
    drawn = Counter(
        server.http.post(
            "/v1/completions", json={"model": f"{name}@split", "prompt": "Hi", "max_tokens": 1, "temperature": 0}
        )
        .json()["choices"][0]["text"]
        .strip()
        for _ in range(100)
    )
    assert set(drawn) == {first, second}
    assert 49 < drawn[first] < 100


def test_a_download_is_what_was_uploaded(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]]
) -> None:
    (_, files), (_, other) = two
    create(server, name, archive(files.tar_gz()))
    server.http.put(f"/v1/adapters/{name}", files=archive(other.tar_gz()))

    def unpacked(path: str) -> tuple[dict[str, bytes], bytes]:
        answer = server.http.get(f"/v1/adapters/{name}{path}")
        assert answer.headers["content-type"] == "application/gzip"
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
            return {name: file.read() for name, file in members.items() if file is not None}, answer.content

    newest, content = unpacked("/download")
    assert newest == other.files()
    assert unpacked("/versions/1/download")[0] == files.files() == unpacked("/download?version=1")[0]
    copy = f"{name}-copy"
    try:
        card = create(server, copy, archive(content))
        assert card["digest"] == server.http.get(f"/v1/adapters/{name}/versions/2").json()["digest"]
    finally:
        server.http.delete(f"/v1/adapters/{copy}")


def test_a_source_is_read_below_the_allowed_roots_only(
    server: Server,
    name: str,
    two: tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]],
    adapter_root: Path,
    tmp_path: Path,
) -> None:
    (first, files), (second, other) = two
    inside = files.folder(adapter_root / "inside")
    outside = other.folder(tmp_path / "outside")
    (adapter_root / "link").symlink_to(outside)
    packed = adapter_root / "packed.tar.gz"
    packed.write_bytes(other.tar_gz())

    def post(source: object) -> httpx.Response:
        return server.http.post("/v1/adapters", json={"name": name, "base": MODEL, "source": str(source)})

    for refused in (outside, adapter_root / "link", f"{adapter_root}/../outside", "/etc"):
        assert error_of(post(refused), 403)["type"] == "permission_error"
    assert error_of(post(adapter_root / "missing"), 404)
    created = post(inside)
    assert created.status_code == 200, created.text
    assert says(server, name) == first
    replaced = server.http.put(f"/v1/adapters/{name}", json={"source": str(packed)})
    assert replaced.status_code == 200, replaced.text
    assert says(server, name) == second
    version = server.http.get(f"/v1/adapters/{name}/versions/1").json()
    assert (version["origin"], version["source"]) == ("path", str(inside))


def test_vllm_calls_load_replace_and_unload(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], tuple[str, PeftFiles]], adapter_root: Path
) -> None:
    (first, files), (second, other) = two
    old, new = files.folder(adapter_root / "vllm-1"), other.folder(adapter_root / "vllm-2")

    def load(path: Path, **fields: Any) -> httpx.Response:
        return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})

    loaded = load(old)
    assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    assert says(server, name) == first
    again = load(new)
    assert error_of(again, 400)["message"].startswith(f"The lora adapter '{name}' has already been loaded.")
    assert load(new, load_inplace=True).status_code == 200
    assert says(server, name) == second
    models = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
    assert (models[name]["parent"], models[name]["root"]) == (MODEL, str(new))

    unload = {"lora_name": name}
    assert server.http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
    assert error_of(server.http.post("/v1/unload_lora_adapter", json=unload), 404)["type"] == "NotFoundError"


def test_kinds_of_lora_are_served_in_one_batch(server: Server, name: str, shapes: Mapping[str, ModuleShape]) -> None:
    """rsLoRA and rank patterns change the answer as their plain twins do not."""
    targets = ("q_proj", "o_proj", "up_proj")
    adapters = {
        "plain": random_adapter(shapes, 1, targets=targets, size=0.04),
        "rslora": random_adapter(shapes, 1, targets=targets, size=0.04, use_rslora=True),
    }
    prompt = "Tell me about the sea."
    answers: dict[str, str] = {}
    for kind, files in adapters.items():
        create(server, f"{name}/{kind}", archive(files.zip()))
    for kind in (*adapters, MODEL):
        model = kind if kind == MODEL else f"{name}/{kind}"
        answer = server.http.post("/v1/chat/completions", json=chat(prompt, model=model, max_completion_tokens=16))
        answers[kind] = answer.json()["choices"][0]["message"]["content"]
    assert len(set(answers.values())) == 3
    for kind in adapters:
        assert server.http.delete(f"/v1/adapters/{name}/{kind}").status_code == 200


def test_names_that_cannot_be_and_adapters_that_exist(
    server: Server, name: str, two: tuple[tuple[str, PeftFiles], ...]
) -> None:
    (_, files), _ = two
    create(server, name, archive(files.zip()))
    refusals = {name: 409, MODEL: 409, "a@b": 400, "a//b": 400, "../up": 400, "": 400, "x/versions": 400}
    for refused, status in refusals.items():
        answer = server.http.post("/v1/adapters", data={"name": refused, "base": MODEL}, files=archive(files.zip()))
        assert error_of(answer, status)["param"] == "name", refused
    missing = server.http.put("/v1/adapters/http/nobody", files=archive(files.zip()))
    assert error_of(missing, 404)["param"] == "name"
    unknown = server.http.post("/v1/adapters", data={"name": "x", "base": "nobody"}, files=archive(files.zip()))
    assert error_of(unknown, 404)["param"] == "base"
