"""How a job begins: its folder with everything that its processes read, then its row. It starts no process."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from ...adapters.files import copy_adapter
from ...adapters.store import AdapterStore
from ...engines.catalog import ModelCatalog
from ...storage.errors import InvalidInput
from ...storage.files import FileStore, StoredFile
from ...storage.full_disk import full_disk_named
from ..recipe.recipe import Recipe
from ..run_folder import DataFile, RunFolder, RunSpec
from .records import NewJob

_NAME_LIMIT = 128
_ROOM_FOR_CHECKPOINT = len(":ckpt-step-") + 9


def output_name(base: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<suffix>:<id>`, as OpenAI names results. Raises InvalidInput if that is longer than a name may be."""
    name = f"ft:{base}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"
    if len(name) + _ROOM_FOR_CHECKPOINT > _NAME_LIMIT:
        raise InvalidInput(
            f"The result would be named {name!r}, which is too long together with a checkpoint's step; "
            "give a shorter suffix.",
            param="suffix",
        )
    return name


class JobFolders:
    """Makes the run folders of jobs, below `home`/runs."""

    def __init__(
        self, home: Path, *, files: FileStore, catalog: ModelCatalog, adapters: AdapterStore, nice: int
    ) -> None:
        self._home = home
        self._files = files
        self._catalog = catalog
        self._adapters = adapters
        self._nice = nice

    def of(self, job_id: str) -> RunFolder:
        return RunFolder(self._home / "runs" / job_id)

    @asynccontextmanager
    async def making(self, job_id: str, new: NewJob) -> AsyncIterator[RunSpec]:
        """The folder with its data, adapter and spec, for a block that makes the job's row.

        If the block or anything before it fails, nothing is left. Raises StorageFull.
        """
        run = self.of(job_id)
        lock: int | None = None
        try:
            with full_disk_named(self._home):
                await asyncio.to_thread(run.path.mkdir, parents=True)
                lock = await asyncio.to_thread(run.take_lock)
                await asyncio.to_thread(self._unborn(run).touch)
                spec = await self._spec(run, new, job_id)
                await asyncio.to_thread(run.create, spec)
            yield spec
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, run.path, ignore_errors=True)
            raise
        else:
            with suppress(OSError):  # the job has its row: the next start looks again
                await asyncio.to_thread(self._unborn(run).unlink)
        finally:
            if lock is not None:
                os.close(lock)

    async def clear_unborn(self, known: Callable[[Collection[str]], Awaitable[set[str]]]) -> None:
        """Remove folders whose server was killed before their job had a row; `known` says which ids have one."""
        unborn = await asyncio.to_thread(self._find_unborn)
        born = await known([run.path.name for run in unborn])
        for run in unborn:
            if run.path.name in born:
                await asyncio.to_thread(self._unborn(run).unlink, missing_ok=True)
            else:
                await asyncio.to_thread(shutil.rmtree, run.path, ignore_errors=True)

    def _find_unborn(self) -> list[RunFolder]:
        runs = [RunFolder(path) for path in (self._home / "runs").glob("*") if self._unborn(RunFolder(path)).exists()]
        return [run for run in runs if not run.alive()]  # another server may be making one at this moment

    @staticmethod
    def _unborn(run: RunFolder) -> Path:
        return run.path / ".unborn"

    async def _spec(self, run: RunFolder, new: NewJob, job_id: str) -> RunSpec:
        train = [await self._data(run, new.training_file, "train")]
        evaluation = [await self._data(run, new.validation_file, "eval")] if new.validation_file else []
        adapter = None
        if new.adapter is not None:
            async with self._adapters.hold(new.adapter):
                source = await self._adapters.materialise(new.adapter)
                adapter = run.path / "adapter"
                await asyncio.to_thread(adapter.mkdir)
                await asyncio.to_thread(copy_adapter, source, adapter)
        recipe, trackers = _with_trackers(new.recipe, new.integrations)
        return RunSpec(
            recipe=recipe,
            auto=new.auto,
            learning_rate_multiplier=new.learning_rate_multiplier,
            base_name=new.base,
            model_path=await self._catalog.path(new.base),
            adapter_path=adapter,
            train_files=tuple(train),
            eval_files=tuple(evaluation),
            cache=self._home / "cache" / "tokens",
            home=self._home,
            nice=self._nice,
            metadata={
                "job": job_id,
                "training_file": new.training_file.id,
                "validation_file": None if new.validation_file is None else new.validation_file.id,
                "trackers": trackers,
            },
        )

    async def _data(self, run: RunFolder, file: StoredFile, name: str) -> DataFile:
        suffix = Path(file.filename).suffix
        path = await self._files.local_path(file, run.path / "files" / f"{name}{suffix}")
        return DataFile(path=str(path), name=file.filename)


def _with_trackers(
    recipe: Recipe, integrations: Sequence[Mapping[str, Any]]
) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    """OpenAI's integrations are trackers: `{"type": "wandb", "wandb": {"project": ...}}`."""
    options = {str(each["type"]): dict(each.get(str(each["type"])) or {}) for each in integrations}
    names = dict.fromkeys([*recipe.report_to, *options])
    return recipe.model_copy(update={"report_to": tuple(names)}), options
