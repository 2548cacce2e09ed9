"""What is refused before a job exists: each wrong field by its name, with a remedy."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tuneloop.adapters.base import AdapterVersion

from .conftest import BASE, AppFactory, MakeAdapter
from .fine_tuning_support import Tuning, extra, open_tuning, quicken


@pytest.fixture
async def tuning(app_factory: AppFactory, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tuning]:
    quicken(monkeypatch)
    async with open_tuning(app_factory) as tuning:
        yield tuning


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": ...}, "model", "missing"),
    ({"model": ""}, "model", "at least 1 character"),
    ({"training_file": ...}, "training_file", "missing"),
    ({"training_file": "file-none"}, "training_file", "POST /v1/files"),
    ({"validation_file": "file-none"}, "validation_file", "POST /v1/files"),
    ({"modle": BASE}, "modle", "Did you mean 'model'?"),
    ({"xyz": 1}, "xyz", "Known here: model, training_file"),
    ({"suffix": "a b"}, "suffix", "letters, digits"),
    ({"suffix": ""}, "suffix", "1 to 64"),
    ({"suffix": "a" * 65}, "suffix", "1 to 64"),
    ({"suffix": "a..b"}, "suffix", "'..'"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": "7"}, "seed", "integer"),
    ({"seed": 2**32}, "seed", "less than or equal"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"k" * 65: "x"}}, f"metadata.{'k' * 65}.[key]", "64 characters"),
    ({"metadata": {"k": "x" * 513}}, "metadata.k", "512 characters"),
    ({"metadata": {"k": 1}}, "metadata.k", "string"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "Did you mean 'hyperparameters.n_epochs'?"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "at least 1"),
    ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", "whole number"),
    ({"hyperparameters": {"batch_size": True}}, "hyperparameters.batch_size", "whole number"),
    ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", '"auto"'),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", "above 0"),
    (
        {"hyperparameters": {"n_epochs": 1}, "method": supervised(n_epochs=2)},
        "hyperparameters",
        "given twice",
    ),
    ({"method": {}}, "method.type", "missing"),
    ({"method": {"type": "sft"}}, "method.type", "Use supervised"),
    ({"method": {"type": "dpo"}}, "method.type", "not available"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type", "not available"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "Remove it"),
    ({"method": {"type": "supervised", "supervise": {}}}, "method.supervise", "'method.supervised'"),
    (
        {"method": {"type": "supervised", "supervised": {"hyper": {}}}},
        "method.supervised.hyper",
        "not known",
    ),
    ({"method": supervised(beta=0.1)}, "method.supervised.hyperparameters.beta", "not known"),
    ({"method": supervised(batch_size=-1)}, "method.supervised.hyperparameters.batch_size", "at least 1"),
    ({"tuning": {"lora_rnk": 8}}, "tuning.lora_rnk", "lora_rank"),
    ({"tuning": {"lora_rank": 0}}, "tuning.lora_rank", "1"),
    ({"tuning": {"output_dir": "/etc"}}, "tuning.output_dir", "cannot be set"),
    ({"tuning": {"model_name_or_path": "/etc"}}, "tuning.model_name_or_path", "`model`"),
    ({"tuning": {"trust_remote_code": True}}, "tuning.trust_remote_code", "Only who runs the server"),
    ({"tuning": {"learning_rate": 1e-4}, "method": supervised(learning_rate_multiplier=2)}, "tuning.learning_rate", ""),
    ({"tuning": {"num_train_epochs": 1}, "method": supervised(n_epochs=2)}, "tuning.num_train_epochs", "leave one"),
    ({"tuning": {"bf16": True, "fp16": True}}, "tuning.bf16", "different number formats"),
    ({"tuning": {"load_best_model_at_end": True}}, "tuning.load_best_model_at_end", "validation"),
    ({"tuning": {"create_new_adapter": True}}, "tuning.create_new_adapter", "Name an adapter"),
    ({"tuning": {"create_new_adapter": "x"}}, "tuning.create_new_adapter", "true or false"),
    ({"tuning": {"priority": 1.5}}, "tuning.priority", "whole number"),
    ({"tuning": {"priority": 1001}}, "tuning.priority", "-1000 to 1000"),
    ({"tuning": []}, "tuning", "dictionary"),
    ({"integrations": [{"type": "comet"}]}, "integrations.0.type", "'wandb'"),
    ({"integrations": [{"type": "wandb"}, {"type": "wandb"}]}, "integrations", "twice"),
    ({"integrations": [{"type": "mlflow", "wandb": {"project": "p"}}]}, "integrations.wandb", "of its own"),
    ({"integrations": [{"type": "wandb", "wandb": {"projet": "p"}}]}, "integrations.settings.projet", "project"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": 3}}]}, "integrations.0.wandb.project", "string"),
]


@pytest.mark.parametrize(
    ("fields", "param", "words"), WRONG, ids=[f"{n}-{param}" for n, (_, param, _) in enumerate(WRONG)]
)
async def test_a_wrong_field_is_named(tuning: Tuning, fields: dict[str, Any], param: str, words: str) -> None:
    status, found, message = await tuning.refused(**fields)
    assert (status, found) == (400, param), message
    assert words in message
    assert message.endswith((".", "?", ".)"))


async def test_an_unknown_model_is_not_found(tuning: Tuning) -> None:
    for model in ("gpt-4o-mini", "nothing@3"):
        status, param, message = await tuning.refused(model=model)
        assert (status, param) == (404, "model")
        assert BASE in message


async def test_a_file_must_be_one_to_train_on(tuning: Tuning) -> None:
    other = await tuning.upload(purpose="assistants")
    status, param, message = await tuning.refused(training_file=other)
    assert (status, param) == (400, "training_file")
    assert "purpose 'fine-tune'" in message
    status, param, _ = await tuning.refused(validation_file=other)
    assert (status, param) == (400, "validation_file")
    both = {"validation_file": tuning.file, "tuning": {"val_size": 0.1}}
    assert (await tuning.refused(**both))[:2] == (400, "tuning.val_size")


async def test_a_body_that_is_no_object(tuning: Tuning) -> None:
    for content in (b"", b"[]", b"{"):
        response = await tuning.running.client.post("/v1/fine_tuning/jobs", content=content)
        assert response.status_code == 400, response.text


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x"])
async def test_limits_are_checked(tuning: Tuning, query: str) -> None:
    response = await tuning.running.client.get(f"/v1/fine_tuning/jobs?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


async def test_a_name_that_would_be_too_long(tuning: Tuning) -> None:
    long = "b" * 60
    checkpoint = tuning.running.services.catalog.get(BASE).source
    await tuning.running.services.catalog.add(long, checkpoint)
    assert (await tuning.refused(model=long, suffix="s" * 60))[:2] == (400, "suffix")


class TestGoingOnFromAnAdapter:
    @pytest.fixture
    async def version(self, tuning: Tuning, make_adapter: MakeAdapter) -> AdapterVersion:
        return await publish(tuning, make_adapter, 1)

    async def test_the_job_takes_its_form(self, tuning: Tuning, version: AdapterVersion) -> None:
        job = await tuning.create(model="support")
        assert (job.model, extra(job, "base_model")) == ("support", BASE)
        shown = extra(job, "tuning")
        assert (shown["lora_rank"], shown["lora_alpha"], shown["use_dora"]) == (2, 4.0, False)
        inside = await tuning.running.services.jobs.get(job.id)
        assert inside.spec["adapter_path"] is not None
        assert inside.spec["recipe"]["adapter_name_or_path"] == "support@1"
        assert inside.output_name.startswith(f"ft:{BASE}::")

    async def test_a_new_one_on_top_has_its_own(self, tuning: Tuning, version: AdapterVersion) -> None:
        job = await tuning.create(model="support@1", tuning={"create_new_adapter": True, "lora_rank": 16})
        assert extra(job, "tuning")["lora_rank"] == 16
        assert extra(job, "tuning")["create_new_adapter"] is True

    @pytest.mark.parametrize(
        ("wish", "param"),
        [
            ({"lora_rank": 16}, "tuning.lora_rank"),
            ({"lora_alpha": 1}, "tuning.lora_alpha"),
            ({"use_dora": True}, "tuning.use_dora"),
            ({"use_rslora": True}, "tuning.use_rslora"),
            ({"finetuning_type": "full"}, "tuning.finetuning_type"),
            ({"finetuning_type": "freeze"}, "tuning.finetuning_type"),
            ({"create_new_adapter": True, "use_dora": True}, "tuning.create_new_adapter"),
        ],
        ids=str,
    )
    async def test_another_form_is_refused(
        self, tuning: Tuning, version: AdapterVersion, wish: dict[str, Any], param: str
    ) -> None:
        status, found, message = await tuning.refused(model="support", tuning=wish)
        assert (status, found) == (400, param), message
        assert "support@1" in message or param == "tuning.create_new_adapter"

    async def test_the_same_form_may_be_said(self, tuning: Tuning, version: AdapterVersion) -> None:
        await tuning.create(model="support", tuning={"lora_rank": 2, "lora_alpha": 4})

    async def test_an_unknown_version_or_alias(self, tuning: Tuning, version: AdapterVersion) -> None:
        for ref in ("support@7", "support@prod"):
            assert (await tuning.refused(model=ref))[0] == 404

    async def test_traffic_that_is_split_names_no_version(
        self, tuning: Tuning, version: AdapterVersion, make_adapter: MakeAdapter
    ) -> None:
        await publish(tuning, make_adapter, 2)
        await tuning.running.services.adapters.set_alias("support", "prod", {1: 0.5, 2: 0.5})
        status, param, message = await tuning.refused(model="support@prod")
        assert (status, param) == (400, "model")
        assert "support@2" in message


async def test_what_a_job_shows_of_its_tuning_makes_the_same_job_again(tuning: Tuning) -> None:
    wishes = {"lora_target": "q_proj,v_proj", "num_train_epochs": 0.5, "packing": True, "rank_pattern": {"q_proj": 4}}
    first = await tuning.create(tuning=wishes)
    assert first.hyperparameters.n_epochs is None  # half an epoch is none of OpenAI's numbers
    again = await tuning.create(tuning=extra(first, "tuning"), seed=first.seed)
    assert extra(again, "tuning") == extra(first, "tuning")
    jobs = tuning.running.services.jobs
    assert (await jobs.get(again.id)).spec["recipe"] == (await jobs.get(first.id)).spec["recipe"]


async def test_trackers_beside_wandb_stand_in_a_field_of_ours(tuning: Tuning) -> None:
    integrations = [{"type": "wandb"}, {"type": "tensorboard"}, {"type": "mlflow", "mlflow": {"project": "p"}}]
    job = await tuning.create(integrations=integrations)
    assert job.integrations is not None
    assert [each.wandb.project for each in job.integrations] == ["tuneloop"]
    assert extra(job, "trackers")[1:] == [
        {"type": "tensorboard", "tensorboard": {"project": "tuneloop"}},
        {"type": "mlflow", "mlflow": {"project": "p"}},
    ]


async def publish(tuning: Tuning, make_adapter: MakeAdapter, seed: int) -> AdapterVersion:
    from tuneloop.server.adapters.service import Target

    service = tuning.running.services.publisher
    async with service.staging() as folder:
        for file in make_adapter(seed).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return await service.add_folder(folder, Target(name="support", base=BASE))
