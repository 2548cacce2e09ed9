"""An app with the scripted fake engine on a folder of its own: the fixtures of every test of the HTTP surface."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import save_file
from tuneloop.adapters.base import ModuleShape
from tuneloop.engines.fake import DEFAULT_MODULES, FakeConfig, FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.finetune.jobs.service import JobService
from tuneloop.finetune.launchers import Launcher
from tuneloop.server.app import create_app
from tuneloop.server.services import Services
from tuneloop.server.settings import Settings

from ..support.jobs_office import Office
from ..support.scripted_trainer import ScriptedLauncher

BASE = "tiny"  # the served name of the fake base model


@dataclass(kw_only=True)
class Running:
    """An open app: its client, services and the engines it has started, by model name (the newest of each)."""

    app: FastAPI
    client: httpx.AsyncClient
    engines: dict[str, FakeEngine]
    home: Path

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def engine(self) -> FakeEngine:
        """The base model's engine."""
        return self.engines[BASE]


def write_checkpoint(folder: Path) -> Path:
    """What the catalog takes for a base model, with a real tokenizer and no real weights. Returns the folder."""
    write_fake_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Fake"]}))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


AppFactory = Callable[..., AbstractAsyncContextManager[Running]]


@dataclass(kw_only=True)
class AppBuilder:
    """What `app_factory` calls; `config` and `reply` script engines, `launcher` trainers; the rest are settings."""

    folder: Path
    engines: dict[str, FakeEngine] = field(default_factory=dict)

    @asynccontextmanager
    async def __call__(
        self,
        *,
        config: FakeConfig | None = None,
        reply: Any = None,
        launcher: Launcher | None = None,
        **settings: Any,
    ) -> AsyncIterator[Running]:
        checkpoint = write_checkpoint(self.folder / "checkpoints" / BASE)
        engines = self.engines

        def build(name: str, path: Path, tokenizer: ChatTokenizer) -> FakeEngine:
            script = {} if reply is None else {"reply": reply}
            engines[name] = FakeEngine(tokenizer, config=config, **script)
            return engines[name]

        values = {"home": self.folder / "home", "models": (f"{BASE}={checkpoint}",), **settings}
        app = create_app(Settings(**values), engine_factory=build, launcher=launcher)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            yield Running(app=app, client=client, engines=engines, home=self.folder / "home")


@pytest.fixture
def app_factory(tmp_path: Path) -> AppFactory:
    """`async with app_factory(...) as running:`; two apps of one test share the home, as after a restart."""
    return AppBuilder(folder=tmp_path)


@pytest.fixture
async def running(app_factory: AppFactory) -> AsyncIterator[Running]:
    """An app with default settings whose base model is loaded."""
    async with app_factory() as running:
        await running.services.registry.load(BASE)
        yield running


MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> Iterator[MakeAdapter]:
    """Writes a PEFT folder that fits the fake base model; another `seed` gives other weights, so another version."""
    count = 0

    def make(
        seed: int = 0,
        *,
        rank: int = 2,
        modules: Mapping[str, ModuleShape] = DEFAULT_MODULES,
        base: str | None = BASE,
        **config: Any,
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / "adapters" / str(count)
        folder.mkdir(parents=True)
        generator = np.random.default_rng(seed)
        tensors = {}
        for name, shape in modules.items():
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = generator.normal(size=(rank, shape.in_features)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = generator.normal(size=(shape.out_features, rank)).astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = sorted({name.rsplit(".", 1)[-1] for name in modules})
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": targets,
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(values | config))
        return folder

    yield make


@pytest.fixture
def launcher() -> ScriptedLauncher:
    """Starts scripted trainers, which outlive the services that started them."""
    return ScriptedLauncher()


@pytest.fixture
def adapter(make_adapter: MakeAdapter) -> Path:
    """What a trainer leaves."""
    return make_adapter(1)


@pytest.fixture
def office(running: Running, launcher: ScriptedLauncher) -> Office:
    return Office(running, launcher)


@pytest.fixture
async def jobs(office: Office) -> AsyncIterator[JobService]:
    """A job service over scripted trainers."""
    async with office.open() as jobs:
        yield jobs


@pytest.fixture
def quick_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs look, wait and try again in hundredths of a second."""
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._CHECK_SECONDS", 0.05)
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._POLL_SECONDS", 0.01)
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("tuneloop.finetune.jobs.service._RETRY_SECONDS", 0.1)
