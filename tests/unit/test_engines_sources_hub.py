"""The Hugging Face source against a small hub on a local socket, and the ModelScope source against a stand-in SDK."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tuneloop.engines.sources.base import FetchContext, FetchProgress
from tuneloop.engines.sources.cache import ModelCache
from tuneloop.engines.sources.hub import HubSource
from tuneloop.engines.sources.modelscope import ModelScopeSource, Sdk
from tuneloop.storage.errors import InvalidInput, NotFound, PermissionDenied, TuneloopError, Unavailable

SHA = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": bytes(100_000),
    "README.md": b"not wanted",
    "onnx/model.safetensors": b"the weights again",
    "pytorch_model.bin": b"pickle",
}


@dataclass
class Hub:
    """What the hub holds; `token` is needed for all of it when set."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    status: int | None = None
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if self.status is not None:
            return self.status, {}, b"{}"
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo"}, b'{"error": "no"}'
        is_api = path.startswith("/api/models/")
        repo, rest = _split(path.removeprefix("/api/models"))
        files = self.repos.get(repo)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "no-such-revision" in rest:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if is_api and rest.startswith("tree/"):
            tree = [_tree_entry(name, content) for name, content in files.items()]
            return 200, {}, json.dumps(tree).encode()
        if is_api:
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings}).encode()
        name = rest.split("/", 2)[2]
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}, b""
        return 200, {"X-Repo-Commit": SHA, "ETag": f'"{_etag(files[name])}"'}, files[name]


def _split(path: str) -> tuple[str, str]:
    organisation, name, *rest = unquote(path.partition("?")[0]).strip("/").split("/")
    return f"{organisation}/{name}", "/".join(rest)


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}


def _etag(content: bytes) -> str:
    return sha256(content).hexdigest()[:40]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(repos={"org/model": dict(CHECKPOINT)})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Bench:
    hub: Hub
    folder: Path
    progress: list[FetchProgress] = field(default_factory=list)

    def fetch(self, location: str, *, token: str | None = None) -> Path:
        cache = ModelCache(self.folder / "home")
        context = FetchContext(cache=cache, progress=self.progress.append, hub_token=token)
        return HubSource(endpoint=self.hub.endpoint, cache_dir=self.folder / "hub").fetch(location, context)


@pytest.fixture
def bench(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("HF_TOKEN", "")
    return Bench(hub, tmp_path)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_snapshot_has_weights_configuration_and_tokenizer_only(bench: Bench) -> None:
    folder = bench.fetch("org/model")
    assert names(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == CHECKPOINT["model.safetensors"]
    assert bench.progress[-1].done_bytes == bench.progress[-1].total_bytes == 100_005
    assert not any("pytorch_model.bin" in path for path in bench.hub.asked)


def test_a_second_fetch_downloads_nothing(bench: Bench) -> None:
    first = bench.fetch("org/model")
    bench.hub.asked.clear()
    assert bench.fetch("org/model@main") == first
    assert not any("/resolve/" in path for path in bench.hub.asked)


def test_without_the_hub_a_complete_snapshot_is_still_found(bench: Bench) -> None:
    first = bench.fetch("org/model")
    bench.hub.endpoint = "http://127.0.0.1:9"  # nobody listens there
    assert bench.fetch("org/model") == first
    assert bench.progress[-1].message.startswith("The hub cannot be reached")
    with pytest.raises(Unavailable, match="cannot be reached, and org/other is not complete in the local cache"):
        bench.fetch("org/other")


@pytest.mark.parametrize(
    ("location", "kind", "message"),
    [
        ("org/nobody", NotFound, "has no model org/nobody"),
        ("org/model@no-such-revision", NotFound, "has no such revision"),
        ("org/model/nothing.gguf", NotFound, "has no such file"),
        ("org/adapter", InvalidInput, "holds an adapter, not a base model"),
        ("org/pickles", InvalidInput, "has no safetensors weights. It has pickle weights"),
        ("org/ggufs", InvalidInput, "It has GGUF files; name one of them instead: m.Q4.gguf"),
    ],
)
def test_what_cannot_be_fetched(bench: Bench, location: str, kind: type[TuneloopError], message: str) -> None:
    bench.hub.repos |= {
        "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b""},
        "org/ggufs": {"m.Q4.gguf": b"GGUF", "README.md": b""},
    }
    with pytest.raises(kind) as caught:
        bench.fetch(location)
    assert message in caught.value.message


def test_a_gated_repository_wants_a_token(bench: Bench) -> None:
    bench.hub.token = "hf_secret"
    with pytest.raises(PermissionDenied, match="set TUNELOOP_HUB_TOKEN"):
        bench.fetch("org/model")
    assert names(bench.fetch("org/model", token="hf_secret")) >= {"model.safetensors"}


def test_a_failing_hub_is_unavailable(bench: Bench) -> None:
    bench.hub.status = 400
    with pytest.raises(Unavailable, match="answered 400 for org/model"):
        bench.fetch("org/model")


def test_modelscope_gets_the_same_selection(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    calls: list[tuple[str, dict[str, Any]]] = []
    progress: list[FetchProgress] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        for name, size in (("a", 10), ("b", 5)):
            reporter = options["progress_callbacks"][0](name, size)
            reporter.update(size)
            reporter.end()
        return str(tmp_path)

    source = ModelScopeSource(sdk=lambda: Sdk(download=download, errors=(OSError,)))
    context = FetchContext(cache=ModelCache(tmp_path), progress=progress.append)
    assert source.fetch("org/model@v1", context) == tmp_path
    assert calls[0][0] == "org/model"
    assert calls[0][1]["revision"] == "v1"
    assert "*.safetensors" in calls[0][1]["allow_patterns"]
    assert progress[-1] == FetchProgress(message="Downloading org/model", done_bytes=15, total_bytes=15)


def test_modelscope_errors_are_unavailable(tmp_path: Path) -> None:
    def download(repo: str, **options: Any) -> str:
        raise ConnectionError("no route")

    source = ModelScopeSource(sdk=lambda: Sdk(download=download, errors=(OSError,)))
    with pytest.raises(Unavailable, match="ModelScope did not deliver org/model: no route"):
        source.fetch("org/model", FetchContext(cache=ModelCache(tmp_path), progress=print))
