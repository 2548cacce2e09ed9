"""Turns a request for a job into a NewJob, and refuses, before any job exists, what could not be trained.

It knows no HTTP. What only the data can tell (a broken line, a conversation that is too long) the job itself finds.
"""

from collections.abc import Mapping
from typing import Any

from ...adapters.base import AdapterVersion
from ...adapters.refs import parse_ref
from ...adapters.store import AdapterStore
from ...engines.catalog import ModelCatalog
from ...finetune.jobs.records import NewJob
from ...finetune.recipe.checks import require_data
from ...finetune.recipe.recipe import Recipe
from ...finetune.recipe.request import recipe_from_request
from ...storage.errors import InvalidInput, NotFound
from ...storage.files import FileStore, StoredFile
from .methods import check_method
from .protocol import MAX_PRIORITY, CreateJobRequest

PURPOSE = "fine-tune"


class JobIntake:
    """Checks requests against the models, adapters and files that there are."""

    def __init__(self, *, catalog: ModelCatalog, adapters: AdapterStore, files: FileStore) -> None:
        self._catalog = catalog
        self._adapters = adapters
        self._files = files

    async def new_job(self, body: CreateJobRequest) -> NewJob:
        """Raises NotFound for an unknown model or adapter, InvalidInput for everything else that is wrong."""
        method = body.method.type if body.method is not None else "supervised"
        check_method(method)
        _check_other_methods(body, method)
        base, adapter = await self._model(body.model)
        training = await self._file(body.training_file, "training_file")
        validation = None
        if body.validation_file is not None:
            validation = await self._file(body.validation_file, "validation_file")
        tuning = dict(body.tuning or {})
        priority = _priority(tuning.pop("priority", 0))
        on_top = _on_top(tuning.pop("create_new_adapter", False), adapter)
        recipe, auto, multiplier = recipe_from_request(
            base=base,
            method=None if body.method is None else body.method.given(),
            hyperparameters=None if body.hyperparameters is None else body.hyperparameters.given(),
            tuning=tuning,
            seed=body.seed,
        )
        _check_validation(recipe, validation is not None)
        if adapter is not None:
            recipe = _continued(recipe, adapter, tuning, on_top=on_top)
        return NewJob(
            model=body.model,
            base=base,
            method=method,
            request=body.given(),
            recipe=recipe,
            auto=auto,
            learning_rate_multiplier=multiplier,
            training_file=training,
            validation_file=validation,
            adapter=adapter,
            suffix=body.suffix,
            metadata=dict(body.metadata or {}),
            integrations=[integration.given() for integration in body.integrations or ()],
            priority=priority,
        )

    async def _model(self, name: str) -> tuple[str, AdapterVersion | None]:
        """The base model, and the adapter version to go on from if `name` means one."""
        if not self._catalog.known(name) and not self._adapters.known(name.partition("@")[0]):
            await self._catalog.refresh()  # another process may have pulled it
        if self._catalog.known(name):
            return name, None
        adapter = self._version(name)
        if not self._catalog.known(adapter.base):
            raise InvalidInput(
                f"The adapter '{name}' belongs to the base model '{adapter.base}', which is not known here any more. "
                "Make it known with POST /v1/models/load.",
                param="model",
            )
        return adapter.base, adapter

    def _version(self, name: str) -> AdapterVersion:
        ref = parse_ref(name)
        if not self._adapters.known(ref.name):
            known = ", ".join(entry.name for entry in self._catalog.list())
            raise NotFound(
                f"There is no model '{name}' to train. Base models are {known}; GET /v1/models lists adapters too.",
                param="model",
                code="model_not_found",
            )
        adapter = self._adapters.get(ref.name)
        alias = next((a for a in adapter.aliases if a.alias == (ref.selector or "default")), None)
        if alias is not None and len(alias.weights) > 1:
            raise InvalidInput(
                f"'{name}' stands for several versions at once ({_shares(alias.weights)}). "
                f"Name the one to go on from, as '{ref.name}@{max(alias.weights)}'.",
                param="model",
            )
        return self._adapters.resolve(name)

    async def _file(self, file_id: str, param: str) -> StoredFile:
        """As OpenAI answers it: a file that is not there is a wrong field (400), the job is not what was not found."""
        try:
            file = await self._files.get(file_id)
        except NotFound:
            raise InvalidInput(
                f"There is no file '{file_id}'. Upload it with POST /v1/files and purpose '{PURPOSE}'.",
                param=param,
                code="file_not_found",
            ) from None
        if file.purpose != PURPOSE:
            raise InvalidInput(
                f"The file '{file_id}' has the purpose '{file.purpose}'. Upload it with purpose '{PURPOSE}'.",
                param=param,
            )
        if file.size_bytes == 0:
            raise InvalidInput(f"The file '{file_id}' ({file.filename}) is empty. Upload one with rows.", param=param)
        return file


def _check_other_methods(body: CreateJobRequest, method: str) -> None:
    for name in ("supervised", "dpo", "reinforcement"):
        if name != method and body.method is not None and getattr(body.method, name) is not None:
            raise InvalidInput(
                f"The method is '{method}', but 'method.{name}' is given. Remove it, or set method.type to '{name}'.",
                param=f"method.{name}",
            )


def _priority(value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_PRIORITY:
        raise InvalidInput(
            f"The field 'tuning.priority' must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY} "
            f"(higher ones are trained first), and is {value!r}.",
            param="tuning.priority",
        )
    return value


def _check_validation(recipe: Recipe, has_file: bool) -> None:
    if has_file and recipe.val_size:
        raise InvalidInput(
            "The fields 'validation_file' and 'tuning.val_size' both say what to validate on; give one of them.",
            param="tuning.val_size",
        )
    try:
        require_data(recipe, train=True, validation=has_file)
    except InvalidInput as error:
        raise InvalidInput(error.message, param=f"tuning.{error.param}") from error


def _on_top(value: Any, adapter: AdapterVersion | None) -> bool:
    """Whether a new adapter goes on top of the one that `model` names."""
    if not isinstance(value, bool):
        raise InvalidInput(
            f"The field 'tuning.create_new_adapter' must be true or false, and is {value!r}.",
            param="tuning.create_new_adapter",
        )
    if value and adapter is None:
        raise InvalidInput(
            "The field 'tuning.create_new_adapter' puts an adapter on top of another, and 'model' is a base model. "
            "Name an adapter as 'model', or remove the field.",
            param="tuning.create_new_adapter",
        )
    return value


def _continued(recipe: Recipe, adapter: AdapterVersion, tuning: Mapping[str, Any], *, on_top: bool) -> Recipe:
    """The recipe of a job that goes on from an adapter: its form is the adapter's, unless a new one goes on top."""
    if recipe.finetuning_type != "lora":
        raise InvalidInput(
            f"'{adapter.ref}' is an adapter, and '{recipe.finetuning_type}' tuning trains a base model. "
            f"Use finetuning_type 'lora', or train '{adapter.base}'.",
            param="tuning.finetuning_type",
        )
    lineage = {"adapter_name_or_path": adapter.ref, "create_new_adapter": on_top}
    if on_top and (adapter.use_dora or recipe.use_dora):
        raise InvalidInput(
            "The field 'tuning.create_new_adapter' joins two adapters, and DoRA's magnitudes cannot be joined. Go on "
            f"with '{adapter.ref}' itself, or put an adapter without DoRA on one without DoRA.",
            param="tuning.create_new_adapter",
        )
    if on_top:
        return recipe.model_copy(update=lineage)
    form = {
        "lora_rank": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
    }
    for name, value in form.items():
        if name in tuning and getattr(recipe, name) != value:
            raise InvalidInput(
                f"The field 'tuning.{name}' is {getattr(recipe, name)}, and the adapter '{adapter.ref}' that the job "
                f"goes on from has {value}. Remove the field, or set tuning.create_new_adapter to put a new adapter "
                "on top.",
                param=f"tuning.{name}",
            )
    return recipe.model_copy(update=lineage | form)


def _shares(weights: Mapping[int, float]) -> str:
    return ", ".join(f"@{version}: {share:.0%}" for version, share in weights.items())
