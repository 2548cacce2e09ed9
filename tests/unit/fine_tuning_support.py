"""A server whose trainers are scripts, and the official SDK on it, which checks every answer strictly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2  # the HTTP client that the official SDK brings
import pytest
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob

from ..support.scripted_trainer import ScriptedLauncher, jsonl
from .conftest import BASE, AppFactory, Running

ROWS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


@dataclass(kw_only=True)
class Tuning:
    """`sdk` talks to the app in this process; `launcher` holds the scripted trainers; `file` is good to train on."""

    running: Running
    launcher: ScriptedLauncher
    sdk: AsyncOpenAI
    file: str = ""

    async def upload(
        self, *, name: str = "data.jsonl", content: bytes | None = None, purpose: Any = "fine-tune"
    ) -> str:
        data = jsonl(ROWS) if content is None else content
        return (await self.sdk.files.create(file=(name, data), purpose=purpose)).id

    async def create(self, **fields: Any) -> FineTuningJob:
        """A job by the SDK; `tuning` goes where the SDK takes what it does not know."""
        values: dict[str, Any] = {"model": BASE, "training_file": self.file} | fields
        if "tuning" in values:
            values["extra_body"] = {"tuning": values.pop("tuning")}
        return await self.sdk.fine_tuning.jobs.create(**values)

    async def refused(self, **fields: Any) -> tuple[int, str | None, str]:
        """Status, param and message of the refusal of a job; no job is left. `...` leaves a field out."""
        body = {"model": BASE, "training_file": self.file} | fields
        body = {name: value for name, value in body.items() if value is not ...}
        response = await self.running.client.post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code >= 400, response.text
        assert (await self.get("/v1/fine_tuning/jobs"))["data"] == []
        error = response.json()["error"]
        return response.status_code, error["param"], error["message"]

    async def reach(self, job_id: str, *statuses: str) -> FineTuningJob:
        """The job, once it has one of these statuses; of an ended one also the process has been seen to end."""
        while True:
            inside = await self.running.services.jobs.get(job_id)
            found = await self.sdk.fine_tuning.jobs.retrieve(job_id)
            if found.status in statuses and (inside.launcher is None or found.status == "running"):
                return found
            await asyncio.sleep(0.01)

    async def get(self, path: str, **options: Any) -> Any:
        response = await self.running.client.get(path, **options)
        assert response.status_code == 200, response.text
        return response.json()


@asynccontextmanager
async def open_tuning(app_factory: AppFactory, *, admin_key: str | None = None) -> AsyncIterator[Tuning]:
    """A server with a file to train on; with `admin_key` it wants keys, and the SDK sends this one."""
    launcher = ScriptedLauncher()
    async with app_factory(launcher=launcher, api_key=admin_key) as running, asyncio.timeout(20):
        await running.services.registry.load(BASE)
        tuning = Tuning(running=running, launcher=launcher, sdk=sdk_of(running, admin_key or "none"))
        tuning.file = await tuning.upload()
        yield tuning


def sdk_of(running: Running, api_key: str = "none") -> AsyncOpenAI:
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(running.app))
    return AsyncOpenAI(
        base_url="http://test/v1",
        api_key=api_key,
        http_client=client,
        max_retries=0,
        _strict_response_validation=True,
    )


def extra(model: Any, name: str) -> Any:
    """One of our own fields of an SDK object."""
    return model.model_extra[name]


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches that look at their processes all the time."""
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._CHECK_SECONDS", 0.05)
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._POLL_SECONDS", 0.01)
    monkeypatch.setattr("tuneloop.finetune.jobs.watch._PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("tuneloop.finetune.jobs.service._RETRY_SECONDS", 0.1)
