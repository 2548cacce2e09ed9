"""What the routes work with, built once an app and closed with it. It knows the order of things, not what they do."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import structlog
from fastapi import Request

from ..adapters.events import AdapterEvent
from ..adapters.store import AdapterStore
from ..engines.base import Engine
from ..engines.catalog import ModelCatalog
from ..engines.registry import EngineFactory, ModelRegistry, RegistryLimits
from ..engines.tokenizer import ChatTokenizer
from ..finetune.jobs.service import JobService
from ..finetune.launchers import Launcher, LocalLauncher
from ..storage import Database, ObjectStore
from ..storage.files import FileStore
from .adapters.service import AdapterService
from .adapters.trained import TrainedModels
from .drain import Drain
from .keys import Keys
from .metrics import Metrics
from .metrics_collector import EngineCollector
from .models.service import ModelService
from .quota import RequestQuota
from .settings import Settings

log = structlog.get_logger(__name__)

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Services:
    """One app's services; routes get them through `get_services`."""

    settings: Settings
    database: Database
    objects: ObjectStore
    files: FileStore
    adapters: AdapterStore
    catalog: ModelCatalog
    registry: ModelRegistry
    publisher: AdapterService
    jobs: JobService
    models: ModelService
    keys: Keys
    quota: RequestQuota
    metrics: Metrics
    collector: EngineCollector
    drain: Drain


def get_services(request: Request) -> Services:
    """FastAPI dependency: the services of the app that got this request."""
    return cast(Services, request.app.state.services)


@asynccontextmanager
async def open_services(
    settings: Settings,
    *,
    metrics: Metrics,
    drain: Drain,
    engine_factory: EngineFactory | None = None,
    launcher: Launcher | None = None,
) -> AsyncIterator[Services]:
    """Open everything in order of dependence; on exit (or on a failure halfway) close it in reverse.

    The models named in the settings load in the background: `/ready` tells when they can answer.
    """
    async with AsyncExitStack() as stack:
        database = Database(settings.resolved_database_url)
        stack.push_async_callback(database.close)
        await database.migrate()
        objects = ObjectStore(settings.resolved_storage_url)
        files = FileStore(database, objects, home=settings.home)
        stack.push_async_callback(files.close)
        await files.start()
        adapters = AdapterStore(database, objects, home=settings.home, limits=settings.adapter_limits())
        stack.push_async_callback(adapters.close)
        await adapters.start()
        hub_token = settings.hub_token.get_secret_value() if settings.hub_token else None
        catalog = ModelCatalog(database, settings.home, hub_token=hub_token)
        registry = ModelRegistry(
            catalog=catalog,
            adapters=adapters,
            engine_factory=engine_factory or default_engine_factory(settings),
            limits=RegistryLimits(
                memory_budget_bytes=settings.memory_budget_bytes, idle_seconds=settings.model_idle_seconds
            ),
            load_tokenizer=partial(ChatTokenizer.load, trust_remote_code=settings.trust_remote_code),
        )
        stack.push_async_callback(registry.close)
        collector = EngineCollector(registry.statuses, adapters.list)
        metrics.registry.register(collector)
        stack.callback(metrics.registry.unregister, collector)
        adapters.subscribe(lambda event: _forget_series(metrics, adapters, event))
        keys = Keys(database, admin_key=settings.api_key.get_secret_value() if settings.api_key else None)
        await registry.start(settings.models or (DEFAULT_MODEL,))
        if not settings.is_loopback and not await keys.required():
            log.warning(
                "anyone who reaches this address may use this server: it listens beyond loopback and has no API key; "
                "make one with `tuneloop keys create` or set TUNELOOP_API_KEY",
                host=settings.host,
            )
        launcher = launcher or LocalLauncher()
        jobs = JobService(
            database,
            files=files,
            catalog=catalog,
            adapters=adapters,
            publisher=TrainedModels(store=adapters, registry=registry, catalog=catalog),
            launchers={launcher.name: launcher},
            launcher=launcher.name,
            home=settings.home,
            devices=settings.tuning_devices,
            threads=settings.resolved_tuning_threads,
            nice=settings.tuning_nice,
            count_tokens=metrics.count_trained_tokens,
            may_start=lambda: not drain.draining,
        )
        stack.push_async_callback(jobs.close)
        await jobs.start()
        metrics.watch_tuning_jobs(jobs.counts)
        yield Services(
            settings=settings,
            database=database,
            objects=objects,
            files=files,
            adapters=adapters,
            catalog=catalog,
            registry=registry,
            publisher=AdapterService(
                store=adapters,
                registry=registry,
                catalog=catalog,
                limits=settings.adapter_limits(),
                roots=settings.adapter_roots,
                hub_token=hub_token,
            ),
            jobs=jobs,
            models=ModelService(catalog=catalog, registry=registry, adapters=adapters),
            keys=keys,
            quota=RequestQuota(),
            metrics=metrics,
            collector=collector,
            drain=drain,
        )


def default_engine_factory(settings: Settings) -> EngineFactory:
    """Builds the engine that the settings name; its heavy imports happen at the first model."""
    config = settings.transformers_config()

    def build(name: str, path: Path, tokenizer: ChatTokenizer) -> Engine:
        from ..engines.transformers import TransformersEngine

        return TransformersEngine(path, tokenizer, config)

    return build


def _forget_series(metrics: Metrics, adapters: AdapterStore, event: AdapterEvent) -> None:
    if event.kind == "deleted" and not adapters.known(event.adapter):
        metrics.forget_adapter(event.adapter)
