"""The second phase of a run on tiny models: what it leaves, how it stops, and that it goes on as if never stopped."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from tuneloop.adapters.base import AdapterLimits
from tuneloop.adapters.validate import inspect_folder
from tuneloop.finetune.run_folder import RunFolder
from tuneloop.finetune.training import checkpoints, control
from tuneloop.finetune.training.run import train

from ..support.run_folders import adapter_config, events_of, losses_of, prepared_run, write_model

WEIGHTS = "adapter_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def kinds(run: RunFolder) -> list[str]:
    return [event.kind for event in events_of(run) if event.kind not in ("metrics", "message")]


def assert_equal_weights(one: Path, other: Path) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_lora_run_learns_and_leaves_an_adapter_that_can_be_served(tmp_path: Path, model: Path) -> None:
    run = prepared_run(tmp_path / "run", model, total_steps=60, lora_rank=4, learning_rate=5e-2, save_strategy="no")
    assert train(run) == 0
    assert kinds(run) == ["started", "result", "finished"]
    losses = losses_of(run)
    assert sorted(losses) == list(range(1, 61))
    assert losses[60] < losses[1] - 0.3
    facts = inspect_folder(run.result, AdapterLimits())
    assert facts.rank == 4
    assert facts.base_model_name == "tiny"
    assert sorted(path.name for path in run.result.iterdir()) == ["adapter_config.json", WEIGHTS]
    result = events_of(run, "result")[0].data
    assert result["kind"] == "adapter"
    assert result["path"] == "result"
    assert result["trained_tokens"] > 0
    started = events_of(run, "started")[0].data
    assert started["trainable_parameters"] < started["parameters"] / 2


def test_the_loss_is_the_mean_over_all_supervised_tokens_however_a_step_is_cut(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared_run(tmp_path / "whole", model, total_steps=3)
    cut = prepared_run(tmp_path / "cut", model, total_steps=3)
    accumulated = prepared_run(
        tmp_path / "accumulated", model, total_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert train(whole) == 0
    monkeypatch.setattr("tuneloop.finetune.training.budget._CPU_TOKENS", 16)
    assert train(cut) == 0
    monkeypatch.undo()
    assert train(accumulated) == 0
    assert events_of(cut, "started")[0].data["micro_batch_tokens"] == 16
    expected = losses_of(whole)
    assert losses_of(cut) == pytest.approx(expected, rel=1e-5)
    assert losses_of(accumulated) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stop", ["pause", "interrupted"])
def test_a_run_that_stops_goes_on_to_the_same_bits(
    tmp_path: Path, model: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared_run(tmp_path / "whole", model, lora_dropout=0.1)
    assert train(whole) == 0
    run = prepared_run(tmp_path / "run", model, lora_dropout=0.1)
    looks = 0

    def look(wishes: control.Wishes) -> str | None:
        nonlocal looks
        looks += 1
        return stop if looks == 3 else None

    monkeypatch.setattr(control.Wishes, "look", look)
    assert train(run) == 0
    stopped = events_of(run)[-1]
    assert (stopped.kind, stopped.data) == ("stopped", {"reason": stop, "step": 3})
    assert run.steps() == [3]
    monkeypatch.undo()
    assert train(run) == 0
    assert events_of(run, "started")[-1].data["step"] == 3
    assert losses_of(run) == losses_of(whole)
    assert_equal_weights(run.result / WEIGHTS, whole.result / WEIGHTS)
    tokens = [events_of(each, "result")[0].data["trained_tokens"] for each in (run, whole)]
    assert tokens[0] == tokens[1]


def test_the_control_file_stops_and_a_cancelled_run_saves_nothing(tmp_path: Path, model: Path) -> None:
    run = prepared_run(tmp_path / "run", model)
    run.want("cancel")
    assert train(run) == 0
    assert events_of(run)[-1].data == {"reason": "cancel", "step": 1}
    assert run.steps() == []


def test_a_full_run_leaves_a_checkpoint_folder_in_the_bases_own_format(tmp_path: Path, model: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model).to(torch.float16).save_pretrained(half)
    shutil.copyfile(model / "tokenizer_config.json", half / "tokenizer_config.json")
    run = prepared_run(
        tmp_path / "run", half, finetuning_type="full", learning_rate=1e-3, save_strategy="steps", save_steps=2
    )
    assert train(run) == 0
    assert events_of(run, "result")[0].data["kind"] == "model"
    assert (run.result / "tokenizer_config.json").is_file()
    saved = AutoModelForCausalLM.from_pretrained(run.result)
    assert saved.dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(run.checkpoint(4)).dtype == torch.float32
    assert [e.data["kind"] for e in events_of(run, "checkpoint")] == ["model", "model"]
    assert losses_of(run)[6] < losses_of(run)[1]


def test_a_full_run_resumes_to_the_same_bits(tmp_path: Path, model: Path) -> None:
    options: dict[str, Any] = {"finetuning_type": "full", "save_strategy": "steps", "save_steps": 2}
    run = prepared_run(tmp_path / "run", model, **options)
    assert train(run) == 0
    expected = load_file(run.result / "model.safetensors")
    shutil.rmtree(run.result)
    assert train(run) == 0  # as after a kill between the last step and the result
    assert events_of(run, "started")[-1].data["step"] == 4
    found = load_file(run.result / "model.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_freeze_trains_the_last_layers_and_named_modules_only(tmp_path: Path, model: Path) -> None:
    run = prepared_run(
        tmp_path / "run",
        model,
        finetuning_type="freeze",
        freeze_trainable_layers=1,
        freeze_trainable_modules="mlp",
        freeze_extra_modules="norm",
    )
    assert train(run) == 0
    before, after = load_file(model / "model.safetensors"), load_file(run.result / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize(
    ("recipe", "param", "word"),
    [
        ({"lora_target": "q_proj,nothing"}, "lora_target", "'nothing'"),
        ({"lora_target": "embed_tokens"}, "lora_target", "no linear layer"),
        ({"lora_target": "(unclosed"}, "lora_target", "regular expression"),
        ({"additional_target": "nothing"}, "additional_target", "'nothing'"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 3}, "freeze_trainable_layers", "2 layers"),
        ({"finetuning_type": "freeze", "freeze_trainable_modules": "moe"}, "freeze_trainable_modules", "self_attn"),
        ({"fp16": True}, "fp16", "accelerator"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_model_cannot_do_is_refused_by_name(
    tmp_path: Path, model: Path, recipe: dict[str, Any], param: str, word: str
) -> None:
    run = prepared_run(tmp_path / "run", model, **recipe)
    assert train(run) == 1
    failed = events_of(run)[-1]
    assert failed.kind == "failed"
    assert failed.data["param"] == param
    assert word in failed.message


def test_patterns_and_targets_reach_the_adapter(tmp_path: Path, model: Path) -> None:
    run = prepared_run(
        tmp_path / "run",
        model,
        total_steps=2,
        lora_rank=4,
        lora_target=r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 6},
        use_rslora=True,
        use_dora=True,
    )
    assert train(run) == 0
    facts = inspect_folder(run.result, AdapterLimits())
    assert {name.rsplit(".", 1)[1] for name in facts.targets} == {"q_proj", "v_proj"}
    assert facts.use_dora
    assert facts.use_rslora
    assert (
        load_file(run.result / WEIGHTS)["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"].shape[0] == 2
    )


def test_additional_targets_make_a_merged_model(tmp_path: Path, model: Path) -> None:
    run = prepared_run(tmp_path / "run", model, total_steps=2, additional_target="norm")
    assert train(run) == 0
    assert events_of(run, "result")[0].data["kind"] == "model"
    before, after = load_file(model / "model.safetensors"), load_file(run.result / "model.safetensors")
    assert not np.array_equal(before["model.norm.weight"], after["model.norm.weight"])
    assert not np.array_equal(
        before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_run_goes_on_from_an_adapter(tmp_path: Path, model: Path) -> None:
    first = prepared_run(tmp_path / "first", model, lora_rank=4)
    assert train(first) == 0
    second = prepared_run(tmp_path / "second", model, adapter=first.result, lora_rank=2, learning_rate=1e-3)
    assert train(second) == 0
    assert losses_of(second)[1] < losses_of(first)[1] - 0.1
    assert adapter_config(second.result)["r"] == 4
    assert inspect_folder(first.result, AdapterLimits()).digest != inspect_folder(second.result, AdapterLimits()).digest


def test_a_new_adapter_on_top_of_an_old_one_is_saved_as_the_exact_sum(tmp_path: Path, model: Path) -> None:
    first = prepared_run(tmp_path / "first", model, lora_rank=4, use_rslora=True, lora_target="q_proj,v_proj")
    assert train(first) == 0
    second = prepared_run(
        tmp_path / "second",
        model,
        adapter=first.result,
        adapter_name_or_path="first",
        create_new_adapter=True,
        lora_rank=2,
        lora_target="q_proj,up_proj",
    )
    assert train(second) == 0
    facts = inspect_folder(second.result, AdapterLimits())
    assert facts.rank == 6
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(model)
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), second.result).eval()
    merged = PeftModel.from_pretrained(base, first.result).merge_and_unload()
    with torch.no_grad():
        together = served(ids).logits
        assert (together - merged(ids).logits).abs().max() > 1e-3
    assert losses_of(second)[6] < losses_of(first)[1]


def test_what_dora_has_learnt_is_never_lost_by_stacking(tmp_path: Path, model: Path) -> None:
    first = prepared_run(tmp_path / "first", model, total_steps=1, use_dora=True)
    assert train(first) == 0
    options: dict[str, Any] = {"adapter": first.result, "adapter_name_or_path": "first", "create_new_adapter": True}
    second = prepared_run(tmp_path / "second", model, **options)
    assert train(second) == 1
    failed = events_of(second)[-1]
    assert failed.data["param"] == "create_new_adapter"
    assert "DoRA" in failed.message


def test_validation_early_stopping_and_the_best_checkpoint(tmp_path: Path, model: Path) -> None:
    run = prepared_run(
        tmp_path / "run",
        model,
        total_steps=40,
        eval_rows=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        learning_rate=3e-1,
        early_stopping_steps=2,
        load_best_model_at_end=True,
        max_grad_norm=0,
    )
    assert train(run) == 0
    points = {int(e.data["step"]): e.data["valid_loss"] for e in events_of(run, "metrics") if "valid_loss" in e.data}
    best = min(points, key=lambda step: points[step])
    assert max(points) == best + 2, "two validations without a better loss end the run"
    assert max(points) < 40
    assert events_of(run, "result")[0].data["step"] == best
    assert best in run.steps()
    assert len(run.steps()) <= 3
    assert_equal_weights(run.result / WEIGHTS, run.checkpoint(best) / WEIGHTS)


def test_a_loss_that_is_no_number_ends_the_run_with_a_reason_and_keeps_checkpoints(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared_run(
        tmp_path / "run",
        model,
        finetuning_type="full",
        learning_rate=1e30,
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=1,
    )
    assert train(run) == 1
    failed = events_of(run)[-1]
    assert (failed.kind, failed.data["code"]) == ("failed", "diverged")
    assert "learning rate" in failed.message
    assert run.steps() == [1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), "storage_full"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
    ],
    ids=["disk", "allocator", "memory"],
)
def test_a_lack_of_room_is_a_reason_that_a_person_understands(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    run = prepared_run(tmp_path / "run", model, save_strategy="steps", save_steps=2)
    real = checkpoints.save_weights
    calls = 0

    def fail_the_second_time(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        real(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_weights", fail_the_second_time)
    assert train(run) == 1
    assert events_of(run)[-1].data["code"] == code
    assert run.steps() == [2], "what was saved stays, what was not complete is gone"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2"]
    monkeypatch.undo()
    assert train(run) == 0
    assert sorted(losses_of(run)) == [1, 2, 3, 4, 5, 6]


def test_a_result_folder_that_a_person_named_gets_the_result_and_the_curve(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "named"
    run = prepared_run(target / "run", model, total_steps=2, result=target, plot_loss=True)
    assert train(run) == 0
    assert {"adapter_config.json", WEIGHTS, "training_loss.svg", "run"} == {path.name for path in target.iterdir()}
    assert events_of(run, "result")[0].data["path"] == str(target)
