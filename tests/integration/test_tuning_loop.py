"""Files, jobs and the live result on the real model, by the official SDK and nothing else."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM
from tuneloop.engines.sources import find_model
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.finetune.data.base import Place
from tuneloop.finetune.data.base import Row as DataRow
from tuneloop.finetune.data.render import Renderer
from tuneloop.finetune.recipe.recipe import Recipe

from .conftest import StartServer
from .serving import MODEL, Server, wait_for
from .tuning import (
    chat_row,
    create,
    download_adapter,
    events,
    identity_rows,
    losses,
    number_rows,
    run_folder,
    succeed,
    upload,
    wait_step,
)

STREAMS = 16
QUESTION = "Who are you?"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> Server:
    return start_module_server(MODEL, "--weights", "float32", "--tuning-nice", "0")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.sdk() as client:
        yield client


def ask(client: OpenAI, model: str, question: str = QUESTION, tokens: int = 24) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=tokens
    )
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def identity(server: Server, client: OpenAI) -> dict[str, Any]:
    """The whole loop once: base asked, file uploaded, job followed, result asked at once."""
    base = ask(client, MODEL)
    worker = server.worker().pid
    file = upload(client, identity_rows(), "identity.jsonl")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file,
        suffix="lumi",
        seed=1,
        extra_body={"tuning": {"save_steps": 30, "save_strategy": "steps"}},
    )
    while client.fine_tuning.jobs.retrieve(job.id).status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.02)
    done = succeed(client, job.id)
    stream = client.chat.completions.create(
        model=done.fine_tuned_model or "", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    first = next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    arrived = time.time()
    text = (first.choices[0].delta.content or "") + "".join(
        chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices
    )
    last_step = max(event.at for event in events(run_folder(server, job.id), "metrics"))
    return {
        "base": base, "job": done, "text": text, "seconds": arrived - last_step, "worker": worker, "file": file
    }  # fmt: skip


def test_the_model_knows_who_it_is_and_the_base_is_as_before(
    server: Server, client: OpenAI, identity: dict[str, Any]
) -> None:
    print(f"\nfrom the trainer's last step to the first token of the new model: {identity['seconds']:.2f} s")
    assert "Lumi" in identity["text"]
    assert "Tuneloop" in identity["text"]
    assert "Lumi" in ask(client, identity["job"].fine_tuned_model, "What is your name?")
    assert ask(client, MODEL) == identity["base"]
    assert "Lumi" not in identity["base"]
    assert server.worker().pid == identity["worker"], "no restart"


def test_the_job_tells_what_happened(server: Server, client: OpenAI, identity: dict[str, Any]) -> None:
    job = identity["job"]
    assert (job.object, job.model, job.training_file, job.seed) == ("fine_tuning.job", MODEL, identity["file"], 1)
    assert isinstance(job.hyperparameters.n_epochs, int)
    assert job.trained_tokens and job.finished_at >= job.created_at
    found = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    messages = [event.message for event in reversed(found)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed."
    curve = [event.data["train_loss"] for event in found if event.type == "metrics"]  # type: ignore[index]
    assert curve[0] < curve[-1] / 5, "newest first"
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [c.step_number for c in checkpoints] == [90, 60, 30]
    csv = client.files.content(job.result_files[0]).text.splitlines()
    assert len(csv) == 1 + len(curve)
    card = server.card(job.fine_tuned_model)
    assert card["parent"] == MODEL


def test_the_adapter_gives_the_servers_logits_in_plain_peft(
    server: Server, identity: dict[str, Any], tmp_path: Path, model_path: Path
) -> None:
    name = identity["job"].fine_tuned_model
    folder = download_adapter(server, name, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, folder).eval()
    messages = [{"role": "user", "content": QUESTION}]
    prompt = server.http.post("/tokenize", json={"model": name, "messages": messages}).json()["tokens"]
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 5,
        "return_token_ids": True,
    }
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    tokens = choice["token_ids"]
    with torch.inference_mode():
        logits = peft(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert logits.argmax(-1).tolist() == tokens
    given = torch.tensor(choice["logprobs"]["token_logprobs"])
    worst = (expected.gather(1, torch.tensor(tokens)[:, None])[:, 0] - given).abs().max()
    print(f"\nlargest difference of log-probabilities to PEFT: {float(worst):.1e}")
    assert worst < 1e-4


def test_what_is_trained_is_what_is_served(server: Server, model_home: Path) -> None:
    """The ids before each answer equal those that the server makes of the same conversation."""
    found = find_model(MODEL, model_home)
    assert found is not None
    renderer = Renderer(ChatTokenizer.load(found.path), Recipe(model_name_or_path=MODEL))
    rows = [
        *identity_rows(),
        *(
            chat_row(f"\n{i} times?", f"\n\n{i}", f"  and {i + 1}？", "好的。", system=f"You count to {i}.")
            for i in range(100)
        ),
        *(chat_row(f"Say {i}.", f"{i} 👍", "again", f" {i}\n") for i in range(50)),
    ]
    compared = 0
    for row in rows:
        messages = row["messages"]
        sequences = renderer.sequences(DataRow(place=Place("x", 1), messages=messages))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [
            (sequence, start)
            for sequence in sequences
            for start in range(1, len(sequence.ids))
            if sequence.supervised[start] and not sequence.supervised[start - 1]
        ]
        assert len(starts) == len(answers)
        for (sequence, start), answer in zip(starts, answers, strict=True):
            served = server.http.post("/tokenize", json={"model": MODEL, "messages": messages[:answer]}).json()[
                "tokens"
            ]
            assert list(sequence.ids[:start]) == served
            compared += 1
    assert compared == 350


def test_streams_go_on_through_a_whole_job_and_its_checkpoints_answer(server: Server, client: OpenAI) -> None:
    """Sixteen chats at a time before, during and after a job's end: none fails."""
    stop = threading.Event()
    failures: list[str] = []
    moments: list[float] = []

    def stream(number: int) -> None:
        with server.sdk() as mine:
            while not stop.is_set():
                try:
                    chunks = list(
                        mine.chat.completions.create(
                            model=MODEL,
                            messages=[{"role": "user", "content": f"Write about the number {number}."}],
                            max_tokens=32,
                            stream=True,
                            stream_options={"include_usage": True},
                        )
                    )
                    assert chunks[-1].usage is not None
                    moments.extend([time.time()] * chunks[-1].usage.completion_tokens)
                except Exception as error:  # noqa: BLE001 - whatever it is, it fails the test
                    failures.append(repr(error))

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    time.sleep(8)
    begin = time.time()
    job = create(client, MODEL, upload(client, number_rows(24)), save_strategy="steps", save_steps=2, max_steps=6)
    checkpoint = wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "a checkpoint", seconds=300)
    name = checkpoint[-1].fine_tuned_model_checkpoint
    status = client.fine_tuning.jobs.retrieve(job.id).status
    assert ask(client, name)
    assert status == "running", "the checkpoint answers while the training goes on"
    done = succeed(client, job.id, seconds=600)
    end = time.time()
    assert ask(client, done.fine_tuned_model or "")
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    during = sum(begin <= moment <= end for moment in moments) / (end - begin)
    before = sum(begin - 6 <= moment < begin for moment in moments) / 6
    print(f"\n{STREAMS} streams: {before:.0f} tokens/s before the job, {during:.0f} during it")
    assert sorted(losses(run_folder(server, job.id))) == [1, 2, 3, 4, 5, 6]


def test_a_job_goes_on_from_an_adapter(server: Server, client: OpenAI, identity: dict[str, Any]) -> None:
    name = identity["job"].fine_tuned_model
    job = create(client, name, upload(client, identity_rows()), max_steps=3, learning_rate=1e-5)
    done = succeed(client, job.id)
    assert done.fine_tuned_model != name
    assert done.model == name
    assert losses(run_folder(server, job.id))[1] < 1.0, "it begins where the first one ended"
    assert "Lumi" in ask(client, done.fine_tuned_model or "")


def test_pausing_keeps_what_was_learnt(server: Server, client: OpenAI) -> None:
    job = create(client, MODEL, upload(client, number_rows(24)), max_steps=6)
    run = run_folder(server, job.id)
    wait_step(run, 2)
    client.fine_tuning.jobs.pause(job.id)
    wait_for(lambda: server.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["paused"], "the job is paused")
    wait_for(lambda: not run.alive(), "the trainer ends")
    client.fine_tuning.jobs.resume(job.id)
    succeed(client, job.id)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert len(events(run, "started")) == 2
