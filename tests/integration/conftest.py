"""Real servers with the real model, and the adapters and checkpoints that their tests send them."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI
from tuneloop.adapters.base import ModuleShape
from tuneloop.engines.sources import find_model

from .checkpoints import hidden_direction, single_token_words, write_tiny_llama
from .peft_files import Array, PeftFiles, forcing_adapter, linear_shapes
from .serving import MODEL, TUNELOOP, Server, clean_environment

_LOG_LINES = 60
_running = pytest.StashKey[list[Server]]()

StartServer = Callable[..., Server]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_running] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failed test shows the last log lines of every server that was up."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        for server in item.config.stash.get(_running, []):
            lines = server.log_text().splitlines()[-_LOG_LINES:] if server.log.exists() else []
            report.sections.append((f"log of the server on port {server.port}", "\n".join(lines)))  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home into which `tuneloop pull` has fetched the real model; TUNELOOP_TEST_HOME names one to keep."""
    kept = os.environ.get("TUNELOOP_TEST_HOME")
    home = Path(kept).absolute() if kept else tmp_path_factory.mktemp("model-home")
    if find_model(MODEL, home) is None:
        command = [str(TUNELOOP), "pull", MODEL, "--home", str(home)]
        pulled = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
        assert pulled.returncode == 0, pulled.stdout + pulled.stderr
    return home


@pytest.fixture(scope="session")
def model_path(model_home: Path) -> Path:
    """The real model's checkpoint folder."""
    found = find_model(MODEL, model_home)
    assert found is not None
    return found.path


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Starts servers, each on a home of its own that shares the fetched model."""

    folder: Path
    model_home: Path
    running: list[Server]

    def start(
        self, *arguments: str, home: Path | None = None, env: Mapping[str, str] | None = None, ready: bool = True
    ) -> Server:
        number = len(list(self.folder.glob("*.log")))
        if home is None:
            home = self.folder / f"home-{number}"
            home.mkdir()
            (home / "models").symlink_to(self.model_home / "models")
        server = Server(home, self.folder / f"{number}.log", *arguments, env=env)
        self.running.append(server)
        server.start()
        return server.wait_ready() if ready else server

    def stop(self) -> None:
        for server in self.running:
            server.stop()


def _servers(config: pytest.Config, folder: Path, model_home: Path) -> Iterator[StartServer]:
    servers = Servers(folder=folder, model_home=model_home, running=[])
    shown = config.stash[_running]

    def start(*arguments: str, **options: object) -> Server:
        try:
            return servers.start(*arguments, **options)  # type: ignore[arg-type]
        finally:
            shown.extend(server for server in servers.running if server not in shown)

    yield start
    servers.stop()
    for server in servers.running:
        shown.remove(server)


@pytest.fixture
def start_server(pytestconfig: pytest.Config, tmp_path: Path, model_home: Path) -> Iterator[StartServer]:
    """`start_server(*arguments, home=, env=, ready=True)`: a server that ends with the test."""
    yield from _servers(pytestconfig, tmp_path, model_home)


@pytest.fixture(scope="module")
def start_module_server(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, model_home: Path
) -> Iterator[StartServer]:
    """The same for a server that all tests of a module share."""
    yield from _servers(pytestconfig, tmp_path_factory.mktemp("servers"), model_home)


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the session's server may load adapters."""
    return tmp_path_factory.mktemp("adapter-root")


@pytest.fixture(scope="session")
def server(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, model_home: Path, adapter_root: Path
) -> Iterator[Server]:
    """One server with the real model for all tests that leave it as it was (adapters under names of their own)."""
    servers = _servers(pytestconfig, tmp_path_factory.mktemp("server"), model_home)
    start = next(servers)
    yield start(MODEL, "--adapter-roots", str(adapter_root))
    next(servers, None)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """The official SDK on the session's server."""
    with server.sdk() as client:
        yield client


@pytest.fixture(scope="session")
def shapes(model_path: Path) -> dict[str, ModuleShape]:
    """The real model's linear modules, as adapters name them."""
    return linear_shapes(model_path)


@pytest.fixture(scope="session")
def words(model_path: Path) -> dict[str, int]:
    """Two hundred words that are one token each."""
    return single_token_words(model_path, 200)


@dataclass(frozen=True, kw_only=True)
class Forcing:
    """Makes adapters under which the model says one word again and again."""

    direction: Array
    vocab_size: int
    words: Mapping[str, int]

    def __call__(self, word: str, *, rank: int = 1) -> PeftFiles:
        return forcing_adapter(self.direction, self.vocab_size, self.words[word], rank=rank)


@pytest.fixture(scope="session")
def forcing(model_path: Path, shapes: Mapping[str, ModuleShape], words: Mapping[str, int]) -> Forcing:
    return Forcing(direction=hidden_direction(model_path), vocab_size=shapes["lm_head"].out_features, words=words)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> dict[str, Path]:
    """Three different tiny checkpoints by name."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_llama(folder / name, model_path, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
