"""The first phase of a run, from files to stores: reports, cutoffs, the cache, bad rows, and a kill at any moment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.data.prepare import load_prepared, prepare
from tuneloop.finetune.data.stream import stream_sequences
from tuneloop.finetune.data.token_store import TokenStore
from tuneloop.finetune.events import Event, EventWriter, read_events
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import DataFile, RunFolder, RunSpec
from tuneloop.storage.errors import InvalidInput

from .conftest import write_checkpoint

WORKER = [sys.executable, "-c"]
KILLED = """
import os, signal, sys
from pathlib import Path
from tuneloop.finetune.data import prepare as phase
from tuneloop.storage import staging
from tuneloop.finetune.events import EventWriter
from tuneloop.finetune.run_folder import RunFolder

moment = sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "tokenising":
    phase.Tokenise.check = die
elif moment == "linking":
    phase.TokenStore.link_to = die
elif moment == "prepared.json":
    phase.write_atomic = die
else:
    phase._say = die
run = RunFolder(Path(sys.argv[1]))
phase.prepare(run, EventWriter(run.events))
"""


def conversation(number: int, words: int = 3) -> dict[str, Any]:
    answer = " ".join(["Paris"] * words)
    return {"messages": [{"role": "user", "content": f"Q{number}?"}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[Any]) -> DataFile:
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows))
    return DataFile(path=str(path), name=path.name)


def make_run(folder: Path, rows: list[Any], *, name: str = "run", auto: tuple[str, ...] = (), **keys: Any) -> RunFolder:
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    file = write_rows(folder / f"{name}.jsonl", rows)
    run = RunFolder(folder / name)
    recipe = Recipe(model_name_or_path="tiny", **keys)
    run.create(
        RunSpec(
            recipe=recipe, auto=auto, base_name="tiny", model_path=checkpoint, train_files=(file,),
            cache=folder / "cache",
        )
    )  # fmt: skip
    return run


def run_prepare(run: RunFolder) -> list[Event]:
    events = EventWriter(run.events)
    try:
        prepare(run, events)
    finally:
        events.close()
    return list(read_events(run.events))


def test_from_rows_to_a_store(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, [conversation(i) for i in range(10)], auto=("num_train_epochs",), per_device_train_batch_size=2,
        val_size=2,
    )  # fmt: skip
    [event] = run_prepare(run)
    prepared = load_prepared(run)
    train, evaluation = TokenStore.open(run.data / "train"), TokenStore.open(run.data / "eval")
    assert (len(train), len(evaluation)) == (8, 2)
    assert prepared.digest == train.digest == event.data["digest"]
    assert prepared.total_steps == event.data["total_steps"] == 4 * prepared.recipe.num_train_epochs
    assert event.kind == "prepared" and event.data["rows"] == 8 and event.data["eval_rows"] == 2
    assert event.data["tokens"] == int(train.lengths.sum())
    assert event.data["supervised_tokens"] == sum(int(train.supervised(i).sum()) for i in range(8))
    assert list(event.data["hyperparameters"]) == ["num_train_epochs"]
    assert run_prepare(run) == [event]  # again: nothing is left to do


def test_the_cache_is_shared_and_keyed_by_content(tmp_path: Path) -> None:
    rows = [conversation(i) for i in range(4)]
    first = make_run(tmp_path, rows, name="a")
    same = make_run(tmp_path, rows, name="b", learning_rate=1.0)
    other = make_run(tmp_path, [*rows, conversation(9)], name="c")
    masked = make_run(tmp_path, rows, name="d", train_on_prompt=True)
    for run in (first, same, other, masked):
        run_prepare(run)
    inodes = [(run.data / "train" / "ids.bin").stat().st_ino for run in (first, same, other, masked)]
    assert inodes[0] == inodes[1] and len(set(inodes)) == 3
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    changed = make_run(tmp_path, rows, name="e")
    run_prepare(changed)
    assert load_prepared(changed).digest != load_prepared(first).digest


def test_every_bad_line_is_named_before_anything_trains(tmp_path: Path) -> None:
    run = make_run(tmp_path, [conversation(1), "{", conversation(2), {"messages": []}])
    with pytest.raises(InvalidInput, match=r"run\.jsonl, line 2"):
        run_prepare(run)
    [other] = read_events(run.events)
    assert other.kind == "message" and other.level == "error" and other.data["line"] == 4
    assert not run.data.exists()


def test_rows_that_the_template_refuses_are_all_named(tmp_path: Path) -> None:
    greeting = {"messages": [{"role": "assistant", "content": "Hi"}]}
    run = make_run(tmp_path, [conversation(1), greeting, conversation(2), greeting])
    with pytest.raises(InvalidInput, match=r"run\.jsonl, line 2: .*no prompt"):
        run_prepare(run)
    [other] = read_events(run.events)
    assert other.data["line"] == 4


LONG = [conversation(1), conversation(2, 60), conversation(3), conversation(4, 90)]


def test_too_long_rows_are_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, LONG, cutoff_len=64)
    with pytest.raises(InvalidInput, match=r"2 examples .* 64 tokens: run\.jsonl, line 2 \(\d+ tokens\)") as caught:
        run_prepare(run)
    assert "line 4" in caught.value.message and "cutoff: drop" in caught.value.message
    assert caught.value.param == "cutoff_len"


@pytest.mark.parametrize(("cutoff", "left"), [("drop", 2), ("truncate", 4)])
def test_too_long_rows_are_cut_or_dropped_and_reported(tmp_path: Path, cutoff: str, left: int) -> None:
    run = make_run(tmp_path, LONG, cutoff_len=64, cutoff=cutoff)
    notice, event = run_prepare(run)
    store = TokenStore.open(run.data / "train")
    assert len(store) == left and store.lengths.max() <= 64
    assert event.data["too_long"] == 2
    assert (event.data["truncated"], event.data["dropped"]) == ((2, 0) if cutoff == "truncate" else (0, 2))
    assert "2 examples" in notice.message and notice.level == "warn"


def test_answers_beyond_the_cutoff_leave_nothing(tmp_path: Path) -> None:
    long_prompt = {
        "messages": [{"role": "user", "content": "Q " * 200}, {"role": "assistant", "content": "A"}],
    }
    run = make_run(tmp_path, [long_prompt, conversation(1)], cutoff_len=64, cutoff="truncate")
    run_prepare(run)
    assert len(TokenStore.open(run.data / "train")) == 1
    none = make_run(tmp_path, [long_prompt], name="none", cutoff_len=64, cutoff="truncate")
    with pytest.raises(InvalidInput, match="No example is left"):
        run_prepare(none)


@pytest.mark.parametrize("moment", ["tokenising", "linking", "prepared.json", "saying"])
def test_a_killed_phase_is_completed_by_the_next(tmp_path: Path, moment: str) -> None:
    run = make_run(tmp_path, [conversation(i) for i in range(5)])
    killed = subprocess.run([*WORKER, KILLED, str(run.path), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    events = run_prepare(run)
    assert [event.kind for event in events] == ["prepared"]
    assert len(TokenStore.open(run.data / "train")) == 5
    assert not list(tmp_path.rglob("*.partial"))


def test_the_phase_imports_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path, [conversation(i) for i in range(5)])
    code = (
        "import sys; from tuneloop.finetune.__main__ import main; status = main([sys.argv[1], 'prepare']); "
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([*WORKER, code, str(run.path)], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_a_stream_is_endless_and_the_same_again(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, [conversation(i) for i in range(20)], streaming=True, max_steps=5, buffer_size=8, save_strategy="no"
    )
    spec = run.spec()

    def first(count: int) -> list[list[int]]:
        stream = stream_sequences(spec, spec.recipe)
        return [list(next(stream).ids) for _ in range(count)]

    taken = first(40)
    assert taken == first(40)
    assert sorted(taken[:20]) == sorted(taken[20:]) and taken[:20] != taken[20:]
