"""kill -9 of the trainer and of the server at different moments: the job ends at the loss of an undisturbed one."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from .conftest import StartServer
from .serving import Server, wait_for
from .tuning import create, events, losses, number_rows, run_folder, succeed, trainer, upload, wait_end, wait_step

STEPS = 40  # a few seconds, so that there is something to disturb
OPTIONS = {
    "save_strategy": "steps",
    "save_steps": 8,
    "max_steps": STEPS,
    "per_device_train_batch_size": 32,
    "lora_dropout": 0.05,
    "learning_rate": 1e-3,
}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(start_module_server: StartServer, tiny_models: dict[str, Path]) -> Server:
    return start_module_server(f"tiny={tiny_models['a']}", "--tuning-nice", "0")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.sdk() as client:
        yield client


@pytest.fixture(scope="module")
def file(client: OpenAI) -> str:
    return upload(client, number_rows(200))


@pytest.fixture(scope="module")
def undisturbed(server: Server, client: OpenAI, file: str) -> dict[int, float]:
    job = create(client, "tiny", file, **OPTIONS)
    succeed(client, job.id)
    return losses(run_folder(server, job.id))


@pytest.mark.parametrize("moment", ["loading", "before the first checkpoint", "after a checkpoint"])
def test_a_killed_trainer_goes_on_to_the_same_loss(
    server: Server, client: OpenAI, file: str, undisturbed: dict[int, float], moment: str
) -> None:
    job = create(client, "tiny", file, **OPTIONS)
    run = run_folder(server, job.id)
    if moment == "loading":
        wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", "the trainer starts")
        wait_for(lambda: (run.path / "control").exists() or (run.placement() == () and run.alive()), "it lives")
    else:
        wait_step(run, 1 if moment == "before the first checkpoint" else 4)
    victim = trainer(run)
    victim.kill()
    succeed(client, job.id)
    assert losses(run) == undisturbed
    assert len(events(run, "finished")) == 1
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("SIGKILL" in message for message in said)


def test_a_killed_server_finds_its_trainer_again(
    server: Server, client: OpenAI, file: str, undisturbed: dict[int, float]
) -> None:
    job = create(client, "tiny", file, **OPTIONS)
    run = run_folder(server, job.id)
    wait_step(run, 1)
    process = trainer(run)
    server.kill()
    assert process.is_running()
    server.start()
    with server.sdk() as again:
        done = succeed(again, job.id)
        assert losses(run) == undisturbed
        assert len(events(run, "started")) == 1, "the trainer never noticed"
        found = list(again.fine_tuning.jobs.list_events(job.id, limit=100))
        steps = [event.data["step"] for event in found if event.type == "metrics"]  # type: ignore[index]
        assert sorted(steps) == list(range(1, STEPS + 1)), "no event is lost or told twice"
        assert again.models.retrieve(done.fine_tuned_model or "").id == done.fine_tuned_model


def test_both_killed_at_once(server: Server, file: str, undisturbed: dict[int, float]) -> None:
    with server.sdk() as client:
        job = create(client, "tiny", file, **OPTIONS)
        run = run_folder(server, job.id)
        wait_step(run, 12)
        process = trainer(run)
        server.kill()
        process.kill()
    server.start()
    with server.sdk() as again:
        succeed(again, job.id)
    assert losses(run) == undisturbed


def test_sigterm_to_the_trainer_saves_and_goes_on(server: Server, file: str, undisturbed: dict[int, float]) -> None:
    with server.sdk() as client:
        job = create(client, "tiny", file, **OPTIONS)
        run = run_folder(server, job.id)
        wait_step(run, 1)
        trainer(run).send_signal(signal.SIGTERM)
        succeed(client, job.id)
        assert losses(run) == undisturbed
        assert events(run, "stopped")[0].data["reason"] == "interrupted"


def test_cancelling_ends_the_trainer_and_keeps_checkpoints(server: Server, file: str) -> None:
    with server.sdk() as client:
        job = create(client, "tiny", file, **(OPTIONS | {"max_steps": 4000}))
        run = run_folder(server, job.id)
        checkpoints = wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "a checkpoint")
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        wait_for(lambda: not run.alive(), "the trainer ends")
        name = checkpoints[-1].fine_tuned_model_checkpoint
        answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
        assert answer.usage is not None and answer.usage.completion_tokens == 2
        assert wait_end(client, job.id).fine_tuned_model is None


def test_a_full_run_becomes_a_base_model_that_answers(server: Server, file: str) -> None:
    with server.sdk() as client:
        job = create(client, "tiny", file, finetuning_type="full", max_steps=2, learning_rate=1e-4)
        done = succeed(client, job.id)
        name = done.fine_tuned_model or ""
        answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
        assert answer.model == name
        assert server.card(name)["status"]["state"] == "ready"
