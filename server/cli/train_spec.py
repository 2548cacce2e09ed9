"""What a trainer on this machine is told: models and adapters fetched, paths absolute. It starts nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .local import open_database
from .progress import fetch_bar

if TYPE_CHECKING:
    from ...finetune.recipe.recipe import Recipe
    from ...finetune.run_folder import RunSpec
    from ...storage import Database
    from ..settings import Settings


async def local_spec(
    recipe: "Recipe", auto: Sequence[str], settings: "Settings", *, output: Path, device: str | None
) -> "RunSpec":
    """Everything that was relative becomes absolute, and everything that is elsewhere is fetched."""
    from ...finetune.run_folder import RunSpec

    async with open_database(settings) as database:
        name, model = await _model(recipe.model_name_or_path, settings, database)
        adapter = _folder(recipe.adapter_name_or_path)
        if recipe.adapter_name_or_path is not None and adapter is None:
            adapter = await _adapter(recipe.adapter_name_or_path, settings, database)
    return RunSpec(
        recipe=_absolute(recipe, output),
        auto=tuple(auto),
        base_name=name,
        model_path=model,
        adapter_path=adapter,
        cache=settings.home / "cache" / "tokens",
        home=settings.home,
        result=output,
        device=device,
        threads=recipe.threads,
    )


async def _model(name: str, settings: "Settings", database: "Database") -> tuple[str, Path]:
    """What adapters will call the base model, and its checkpoint folder, fetched if it is missing."""
    from ...engines.catalog import ModelCatalog
    from ...engines.sources import fetch_model, parse_model_argument

    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    catalog = ModelCatalog(database, settings.home, hub_token=token)
    await catalog.start()
    with fetch_bar() as progress:
        if catalog.known(name):
            return name, await catalog.path(name, progress)
        name, source = parse_model_argument(name)
        return name, (await fetch_model(source, settings.home, progress, hub_token=token)).path


async def _adapter(name: str, settings: "Settings", database: "Database") -> Path:
    """The PEFT folder of an adapter version that this home knows."""
    from ...adapters.store import AdapterStore
    from ...storage import ObjectStore

    store = AdapterStore(
        database,
        ObjectStore(settings.resolved_storage_url),
        home=settings.home,
        limits=settings.adapter_limits(),
    )
    try:
        await store.start()
        return await store.materialise(store.resolve(name))
    finally:
        await store.close()


def _absolute(recipe: "Recipe", output: Path) -> "Recipe":
    """The trainer stands in the run's folder, so that what is local has to be named from the root."""
    changed: dict[str, object] = {"output_dir": str(output)}
    for key in ("dataset", "eval_dataset"):
        changed[key] = tuple(str(_expanded(name) or name) for name in getattr(recipe, key))
    for key in ("dataset_dir", "logging_dir"):
        value = getattr(recipe, key)
        if value is not None and value != "ONLINE" and not value.startswith("REMOTE:"):  # LLaMA-Factory's
            changed[key] = str(Path(value).expanduser().absolute())
    return recipe.model_copy(update=changed)


def _expanded(name: str) -> Path | None:
    """The path, if `name` is one here. A bare word is so only as a file: else it is a name of dataset_info.json."""
    path = Path(name).expanduser()
    return path.absolute() if path.is_file() or (path.is_dir() and "/" in name) else None


def _folder(name: str | None) -> Path | None:
    path = None if name is None else Path(name).expanduser()
    return path.absolute() if path is not None and path.is_dir() else None
