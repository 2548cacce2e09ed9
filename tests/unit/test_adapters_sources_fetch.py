"""Sources of adapters: paths under allowed roots, a hub (a small real HTTP server), ModelScope and buckets."""

import hashlib
import os
import sys
import threading
import types
import zipfile
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tuneloop.adapters.base import AdapterLimits
from tuneloop.adapters.sources import fetch
from tuneloop.storage.errors import InvalidInput, NotFound, PermissionDenied, TooLarge, TuneloopError, Unavailable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: b"weights"}
LIMITS = AdapterLimits(max_bytes=1000)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    folder = tmp_path / "dest"
    folder.mkdir()
    return folder


def adapter(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def found(dest: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dest.iterdir()}


def clear(dest: Path) -> None:
    for path in dest.iterdir():
        path.unlink()


async def get(source: str, dest: Path, roots: Sequence[Path] = (), token: str | None = None) -> tuple[str, str]:
    return await fetch(source, dest, roots=roots, limits=LIMITS, hub_token=token)


class TestPaths:
    async def test_a_folder(self, tmp_path: Path, dest: Path) -> None:
        folder = adapter(tmp_path / "root" / "my adapter", FILES | {"README.md": b"", "optimizer.pt": b"never read"})
        for source in (str(folder), folder.as_uri(), f"file://localhost{folder.as_uri()[7:]}"):
            assert await get(source, dest, [tmp_path / "root"]) == ("path", str(folder))
            assert found(dest) == FILES
            clear(dest)

    async def test_an_archive(self, tmp_path: Path, dest: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
        assert await get(str(tmp_path / "a.zip"), dest, [tmp_path]) == ("path", str(tmp_path / "a.zip"))
        assert found(dest) == FILES

    @pytest.mark.parametrize("source", ["{}/outside", "{}/root/../outside", "{}/root/link", "{}/missing", "/etc", "/"])
    async def test_outside_the_roots(self, tmp_path: Path, dest: Path, source: str) -> None:
        """Refused alike, whether it exists or not."""
        adapter(tmp_path / "outside")
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
        for roots in ([tmp_path / "root"], []):
            with pytest.raises(PermissionDenied, match="TUNELOOP_ADAPTER_ROOTS") as caught:
                await get(source.format(tmp_path), dest, roots)
            assert caught.value.param == "source"
        assert found(dest) == {}

    async def test_a_file_that_links_outside(self, tmp_path: Path, dest: Path) -> None:
        folder = adapter(tmp_path / "root" / "a", {CONFIG: b"{}"})
        (tmp_path / "secret").write_bytes(b"secret")
        (folder / WEIGHTS).symlink_to(tmp_path / "secret")
        with pytest.raises(PermissionDenied):
            await get(str(folder), dest, [tmp_path / "root"])

    async def test_links_inside_the_roots(self, tmp_path: Path, dest: Path) -> None:
        """A hub's cache is made of them; the root may be a link too."""
        blobs = adapter(tmp_path / "root" / "blobs")
        folder = adapter(tmp_path / "root" / "snapshot", {})
        for name in FILES:
            (folder / name).symlink_to(f"../blobs/{name}")
        (tmp_path / "alias").symlink_to(tmp_path / "root")
        assert (await get(f"{tmp_path}/alias/snapshot", dest, [tmp_path / "alias"]))[1] == str(folder)
        assert found(dest) == FILES
        assert blobs.is_dir()

    async def test_what_is_no_adapter(self, tmp_path: Path, dest: Path) -> None:
        roots = [tmp_path]
        with pytest.raises(NotFound, match="does not exist"):
            await get(f"{tmp_path}/none", dest, roots)
        with pytest.raises(NotFound, match=f"has no {CONFIG}"):
            await get(str(adapter(tmp_path / "empty", {})), dest, roots)
        with pytest.raises(InvalidInput, match=r"'adapter_model\.bin' is a pickle"):
            await get(str(adapter(tmp_path / "old", {CONFIG: b"{}", "adapter_model.bin": b""})), dest, roots)
        (dest / CONFIG).unlink()
        with pytest.raises(InvalidInput, match="give the adapter's folder"):
            await get(str(adapter(tmp_path / "one") / WEIGHTS), dest, roots)
        with pytest.raises(TooLarge, match="1000 bytes"):
            await get(str(adapter(tmp_path / "big", FILES | {WEIGHTS: bytes(1001)})), dest, roots)

    async def test_a_named_pipe_does_not_block(self, tmp_path: Path, dest: Path) -> None:
        folder = adapter(tmp_path / "a", {WEIGHTS: b""})
        os.mkfifo(folder / CONFIG)
        with pytest.raises(InvalidInput, match="not a plain file"):
            await get(str(folder), dest, [tmp_path])

    async def test_a_loop_of_links(self, tmp_path: Path, dest: Path) -> None:
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(TuneloopError):
            await get(f"{tmp_path}/loop", dest, [tmp_path])


NO_NAMES = ["", "name", "./a/b", "../a/b", "a/b/c", "~/a", "hf:", "hf:a", "a/b@", "a/..b", "a/b@x..y", "ms:a", "-a/b"]
NO_URLS = ["http://h/a", "https://h/a", "ftp://h/a", "memory://a", "github://a", "S4://a", "s3://k:secret@b/a"]
NO_CHAINS = ["s3://a::file:///etc", "simplecache::s3://a/b", "a/b\n", "x" * 5000]
NO_FILES = ["file://host/a", "file:a", "file:///a?b", "file:///a%00b"]


@pytest.mark.parametrize("source", [*NO_NAMES, *NO_URLS, *NO_CHAINS, *NO_FILES])
async def test_sources_of_no_known_kind(source: str, dest: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        await get(source, dest, [Path("/")])
    assert caught.value.param == "source"
    assert "secret" not in caught.value.message


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs: HEAD and GET of /org/name/resolve/revision/file."""

    commit = "c" * 40
    repositories: dict[str, dict[str, bytes]]
    tokens: list[str | None]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        parts = self.path.strip("/").split("/")
        repository = self.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", body)
        if parts[0] == "gated":
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
        if parts[0] == "down":
            return self._send(500, {}, b"", body)
        if parts[3] not in ("main", "v1", self.commit):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        content = repository.get(parts[4])
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b"", body)
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}, content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silence."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repositories = {"org/lora": dict(FILES), "gated/lora": dict(FILES), "down/lora": {}}
    Hub.tokens = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


class TestHub:
    @pytest.mark.parametrize("source", ["org/lora", "hf:org/lora", "org/lora@v1"])
    async def test_both_files_of_one_commit(self, hub: type[Hub], dest: Path, source: str) -> None:
        assert await get(source, dest) == ("hub", f"hf:org/lora@{hub.commit}")
        assert found(dest) == FILES
        assert set(hub.tokens) == {None}

    async def test_the_token_is_sent(self, hub: type[Hub], dest: Path) -> None:
        await get("org/lora", dest, token="hf_secret")
        assert set(hub.tokens) == {"Bearer hf_secret"}

    async def test_refusals(self, hub: type[Hub], dest: Path) -> None:
        with pytest.raises(NotFound, match="does not exist"):
            await get("org/none", dest)
        with pytest.raises(NotFound, match="does not exist"):
            await get("org/lora@v9", dest)
        with pytest.raises(PermissionDenied, match="credentials"):
            await get("gated/lora", dest)
        with pytest.raises(Unavailable, match="could not be fetched"):
            await get("down/lora", dest)
        hub.repositories["org/lora"][WEIGHTS] = bytes(1001)
        with pytest.raises(TooLarge, match="1000 bytes"):
            await get("org/lora", dest)

    async def test_a_repository_with_a_pickle_only(self, hub: type[Hub], dest: Path) -> None:
        hub.repositories["org/lora"] = {CONFIG: b"{}", "adapter_model.bin": b"x"}
        with pytest.raises(InvalidInput, match="is a pickle"):
            await get("org/lora", dest)
        hub.repositories["org/lora"] = {CONFIG: b"{}"}
        (dest / CONFIG).unlink()
        with pytest.raises(NotFound, match=f"has no {WEIGHTS}"):
            await get("org/lora", dest)

    async def test_nobody_answers(self, hub: type[Hub], dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(Unavailable):
            await get("org/lora", dest)


class TestModelScope:
    async def test_the_missing_extra_is_named(self, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "modelscope", None)
        with pytest.raises(InvalidInput, match=r"pip install 'tuneloop\[modelscope\]'"):
            await get("ms:org/lora", dest)

    async def test_both_files(self, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """modelscope itself is optional: its one function is stood in for, with the signature that is called."""
        asked = []

        def download(*, model_id: str, file_path: str, local_dir: str, revision: str = "master") -> str:
            asked.append((model_id, file_path, revision))
            path = Path(local_dir) / file_path
            path.write_bytes(FILES[file_path])
            return str(path)

        module = types.ModuleType("modelscope.hub.file_download")
        module.model_file_download = download  # type: ignore[attr-defined]
        for name in ("modelscope", "modelscope.hub"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "modelscope.hub.file_download", module)
        assert await get("ms:org/lora@v2", dest) == ("modelscope", "ms:org/lora@v2")
        assert asked == [("org/lora", CONFIG, "v2"), ("org/lora", WEIGHTS, "v2")]
        assert found(dest) == FILES


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """fsspec's memory file system under the name of a real protocol."""

    class Bucket(MemoryFileSystem):  # type: ignore[misc]
        protocol = "oss"
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(MemoryFileSystem._strip_protocol(path.replace("oss://", "memory://")))

    monkeypatch.setitem(sys.modules["fsspec.registry"].__dict__["_registry"], "oss", Bucket)
    return Bucket(skip_instance_cache=True)


class TestBuckets:
    async def test_a_folder(self, bucket: MemoryFileSystem, dest: Path) -> None:
        for name, content in FILES.items():
            bucket.pipe(f"/b/lora/{name}", content)
        for source in ("oss://b/lora", "oss://b/lora/"):
            assert await get(source, dest) == ("bucket", source)
            assert found(dest) == FILES
            clear(dest)

    async def test_an_archive(self, bucket: MemoryFileSystem, dest: Path) -> None:
        with bucket.open("/b/lora.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
        assert await get("oss://b/lora.zip", dest) == ("bucket", "oss://b/lora.zip")
        assert found(dest) == FILES

    async def test_refusals(self, bucket: MemoryFileSystem, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(NotFound, match="does not exist"):
            await get("oss://b/none", dest)
        bucket.pipe(f"/b/big/{CONFIG}", bytes(1001))
        with pytest.raises(TooLarge, match="1000 bytes"):
            await get("oss://b/big", dest)

        def denied(*arguments: Any, **options: Any) -> None:
            raise PermissionError

        monkeypatch.setattr(type(bucket), "info", denied)
        with pytest.raises(PermissionDenied, match="credentials"):
            await get("oss://b/big", dest)
        assert found(dest) == {}

    @pytest.mark.parametrize(("url", "package"), [("s3://b/a", "tuneloop[s3]"), ("gs://b/a", "gcsfs")])
    async def test_the_missing_package_is_named(
        self, url: str, package: str, dest: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("s3fs", "gcsfs"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InvalidInput) as caught:
            await get(url, dest)
        assert f"pip install '{package}'" in caught.value.message
