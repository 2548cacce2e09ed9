"""Adapters in one batch are what PEFT makes of each alone: every LoRA kind, other ranks and targets side by side."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tuneloop.engines.transformers.protocol import AdapterDone, LoadAdapter, ToWorker, UnloadAdapter

from tests.support.engine import VOCAB, Crank, checkpoint, engine_core, greedy, loaded, submit, temporary_folder

OUTPUT = 10
LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX_ALL = ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"]
LORAS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_ALL},
        "one-target": {"r": 2, "lora_alpha": 16, "target_modules": ["v_proj"]},
        "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "up_proj"]},
        "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LLAMA_ALL},
        "dora-part": {"r": 8, "lora_alpha": 4, "use_dora": True, "target_modules": ["k_proj", "gate_proj"]},
        "patterns": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": LLAMA_ALL,
            "rank_pattern": {"layers.1.self_attn.q_proj": 16, "down_proj": 2},
            "alpha_pattern": {r".*\.0\.mlp\.up_proj": 32, "o_proj": 1},
        },
        "dora-rslora-patterns": {
            "r": 3,
            "lora_alpha": 3,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"v_proj": 12},
        },
        "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]},
        "head-dora": {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": ["lm_head"]},
        "deep": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2]},
    },
    "llama-bias": {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_ALL},
        "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LLAMA_ALL},
    },
    "gpt-neox": {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": NEOX_ALL},
        "dora": {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": NEOX_ALL},
        "rslora": {"r": 20, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query_key_value"]},
        "head": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_out", "dense_h_to_4h"]},
    },
}


@cache
def make_adapter(kind: str, name: str) -> Path:
    """A random adapter saved by PEFT: B isn't zero, and DoRA's magnitudes aren't the norms they begin with."""
    folder = temporary_folder() / "adapters" / kind / name
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint(kind), dtype=torch.float32)
    torch.manual_seed(sum(name.encode()))
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORAS[kind][name]))
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in key:
                parameter.normal_(0.0, 0.15)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def prompts_for(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 7, 40)[:count]]


@cache
def peft_says(kind: str, name: str | None) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
    """PEFT's own greedy tokens of each prompt, and the log-probabilities of all tokens at each of them."""
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint(kind), dtype=torch.float32)
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, make_adapter(kind, name))
    model.eval()
    tokens: list[list[int]] = []
    logprobs: list[list[dict[int, float]]] = []
    for prompt in prompts_for(3):
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=OUTPUT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        steps = [torch.log_softmax(step[0].float(), -1).tolist() for step in out.logits]
        logprobs.append([dict(enumerate(step)) for step in steps])
    return tokens, logprobs


def agrees(crank: Crank, row: str, kind: str, name: str | None, prompt: int) -> None:
    tokens, logprobs = peft_says(kind, name)
    assert crank.ids(row) == tokens[prompt], f"{row}: other tokens than PEFT's"
    for token, whole in zip(crank.tokens[row], logprobs[prompt], strict=True):
        assert token.logprob is not None
        assert dict(token.logprob.top) == pytest.approx(whole, abs=1e-4)


def request(row: str, kind: str, name: str | None, prompt: int) -> ToWorker:
    adapter = make_adapter(kind, name) if name is not None else None
    return submit(row, prompts_for(3)[prompt], greedy(OUTPUT, logprobs=VOCAB), adapter=adapter)


@pytest.mark.filterwarnings("ignore:.*lm_head.*", "ignore:.*tie.*", "ignore:.*embed.*")
@pytest.mark.parametrize("kind", LORAS)
def test_a_mixed_batch_is_each_alone_is_peft(kind: str) -> None:
    names: list[str | None] = [None, *LORAS[kind]]
    rows = [(f"{n}-{p}", n, p) for p in range(3) for n in names]
    with engine_core(loaded(kind), max_num_batched_tokens=64) as crank:
        # arriving over several turns, so that prompt chunks of some adapters meet decoding rows of others
        for start in range(0, len(rows), 4):
            crank.turn(*(request(row, kind, name, prompt) for row, name, prompt in rows[start : start + 4]))
        while len(crank.finished) < len(rows) and not crank.failed:
            crank.turn()
        assert not crank.failed
        for row, name, prompt in rows:
            agrees(crank, f"{row}/0", kind, name, prompt)
    with engine_core(loaded(kind)) as crank:
        for row, name, prompt in rows[-len(names) :]:
            crank.run(request(row, kind, name, prompt))
            agrees(crank, f"{row}/0", kind, name, prompt)


def test_more_adapters_than_slots_take_turns() -> None:
    names = list(LORAS["llama"])[:7]
    with engine_core(loaded("llama"), max_loras=2) as crank:
        crank.run(*(request(name, "llama", name, 1) for name in names))
        for name in names:
            agrees(crank, f"{name}/0", "llama", name, 1)
        assert len(crank.scheduler.adapters.on_device) <= 2


def test_an_adapter_is_unloaded_and_others_come_while_its_rows_run() -> None:
    with engine_core(loaded("llama"), max_loras=2) as crank:
        old = make_adapter("llama", "dora")
        crank.turn(request("old", "llama", "dora", 2))
        while len(crank.ids("old/0")) < 3:
            crank.turn()
        crank.turn(UnloadAdapter(str(old)), request("new", "llama", "plain", 2), request("third", "llama", "head", 2))
        crank.run()
        for row, name in (("old", "dora"), ("new", "plain"), ("third", "head")):
            agrees(crank, f"{row}/0", "llama", name, 2)
        assert str(old) not in crank.scheduler.adapters.on_device


def test_a_slot_is_clean_for_its_next_adapter() -> None:
    """A smaller adapter in the slot of a larger one, with fewer targets and without magnitudes."""
    with engine_core(loaded("llama"), max_loras=1) as crank:
        for name in ("dora", "one-target", "dora-part", "plain"):
            crank.run(request(name, "llama", name, 1))
            agrees(crank, f"{name}/0", "llama", name, 1)


def broken_adapter(value: float, module: str) -> Path:
    source = make_adapter("llama", "plain")
    folder = temporary_folder() / f"broken-{value}-{module}"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    for key in tensors:
        if module in key and "lora_B" in key:
            tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("module", ["k_proj", "v_proj", "layers.2.mlp.down_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_an_adapter_of_broken_numbers_fails_alone(value: float, module: str) -> None:
    bad = broken_adapter(value, module)
    with engine_core(loaded("llama"), max_num_batched_tokens=24) as crank:
        prompt = prompts_for(3)[2]
        crank.turn(request("before", "llama", "dora", 1), request("base", "llama", None, 2))
        crank.run(
            *(submit(f"bad{i}", prompt, greedy(OUTPUT, n=2), adapter=bad) for i in range(3)),
            request("beside", "llama", "plain", 2),
        )
        assert set(crank.failed) == {"bad0", "bad1", "bad2"}
        assert "not finite" in crank.failed["bad0"].problem.message
        crank.run(*(request(f"after{i}", "llama", None, i) for i in range(3)), request("again", "llama", "plain", 2))
        agrees(crank, "before/0", "llama", "dora", 1)
        agrees(crank, "base/0", "llama", None, 2)
        agrees(crank, "beside/0", "llama", "plain", 2)
        agrees(crank, "again/0", "llama", "plain", 2)
        for i in range(3):
            agrees(crank, f"after{i}/0", "llama", None, i)


def refusal(folder: Path, **settings: Any) -> str:
    with engine_core(loaded("llama"), **settings) as crank:
        crank.turn(LoadAdapter("sha256:x", str(folder)))
        done: list[AdapterDone] = []
        while not done:
            crank.turn()
            done = [m for m in crank.sent if isinstance(m, AdapterDone)]
        assert done[0].problem is not None and done[0].problem.kind in ("InvalidInput", "TooLarge")
        return done[0].problem.message


def test_an_adapter_of_another_base_is_refused_by_its_module() -> None:
    assert "'gpt_neox.layers.0" in refusal(make_adapter("gpt-neox", "plain"))


def test_a_rank_over_the_limit_is_refused() -> None:
    assert "is 16, over" in refusal(make_adapter("llama", "patterns"), max_lora_rank=8)


def test_an_adapter_whose_files_are_gone_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none")


def test_a_bad_pattern_is_the_adapters_fault(tmp_path: Path) -> None:
    source = make_adapter("llama", "plain")
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"(": 3}}))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    assert "alpha_pattern" in refusal(tmp_path)
