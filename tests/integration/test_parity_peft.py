"""Greedy output over 64 prompts and 4 adapters: a mixed batch, each request alone, and PEFT give the same tokens.

PEFT's side is checked in two ways: its own `generate()` on some requests, and for all of them one forward over prompt
and answer, whose most likely token at every position must be the one the engine gave (which is what greedy `generate()`
would have chosen). Where PEFT's two best logits lie within 1e-4 of each other the choice is a tie and is listed.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from tuneloop.adapters.base import AdapterVersion
from tuneloop.engines.base import GenerateRequest, SamplingParams
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.engines.transformers import TransformersConfig, TransformersEngine

TOKENS = 8
TIE = 1e-4
ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    "pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 24, "layers.3.self_attn.o_proj": 2},
        "alpha_pattern": {"up_proj": 4},
    },
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
}
SUBJECTS = (
    "the capital of France", "photosynthesis", "a black hole", "the number seven", "a good breakfast", "the Moon",
    "TCP and UDP", "the French Revolution", "a haiku", "rust on iron", "chess openings", "the ocean", "bread",
    "gravity", "a Python list", "winter",
)  # fmt: skip
QUESTIONS = ("What is {}?", "Write one sentence about {}.", "Explain {} to a child.", "Name three facts about {}.")


def _adapter(model: Any, name: str, folder: Path) -> Path:
    """An untrained adapter that changes the output clearly: random A and B of moderate size."""
    torch.manual_seed(sum(map(ord, name)))
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[name]))
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                parameter.mul_(0.35)
            if "magnitude" in key:
                parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))
    peft.save_pretrained(folder)
    peft.unload()
    return folder


def _version(name: str, folder: Path) -> AdapterVersion:
    return AdapterVersion(
        name=name,
        version=1,
        base="smollm2-135m",
        digest=f"sha256:{name}",
        path=folder,
        rank=8,
        alpha=16,
        targets=(),
        use_dora=name == "dora",
        use_rslora=name == "rslora",
        size_bytes=0,
        origin="path",
        source=None,
        created_at=datetime.now(UTC),
    )


async def _answer(engine: TransformersEngine, key: str, prompt: Sequence[int], version: AdapterVersion) -> list[int]:
    request = GenerateRequest(
        request_id=key,
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        adapter=version,
    )
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


async def _engine_answers(
    model_path: Path, prompts: Sequence[Sequence[int]], versions: dict[str, AdapterVersion]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(all in mixed batches, each alone), by "adapter/prompt number". No prefix cache: nothing may hide behind it."""
    engine = TransformersEngine(
        model_path,
        ChatTokenizer.load(model_path),
        TransformersConfig(weights="float32", enable_prefix_caching=False, max_num_batched_tokens=256),
    )
    await engine.start()
    try:
        jobs = [(f"{name}/{i}", prompt, v) for i, prompt in enumerate(prompts) for name, v in versions.items()]
        answers = await asyncio.gather(*(_answer(engine, key, prompt, v) for key, prompt, v in jobs))
        mixed = {key: answer for (key, _, _), answer in zip(jobs, answers, strict=True)}
        alone = {key: await _answer(engine, key, prompt, v) for key, prompt, v in jobs}
    finally:
        await engine.close()
    return mixed, alone


def _disagreements(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[str]:
    """Positions where the model would have chosen otherwise; ties are printed and pass."""
    found: list[str] = []
    for first in range(0, len(prompts), 16):
        rows = [[*p, *a] for p, a in zip(prompts[first : first + 16], answers[first : first + 16], strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for n, answer in enumerate(answers[first : first + 16]):
            start = len(prompts[first + n]) - 1
            for step, token in enumerate(answer):
                row = logits[n, start + step]
                gap = float(row.max() - row[token])
                if gap > TIE:
                    found.append(f"prompt {first + n} step {step}: token {token} is {gap:.5f} below the best")
                elif gap > 0:
                    print(f"tie: prompt {first + n} step {step}: within {gap:.1e}")
    return found


@pytest.mark.timeout(1500)
async def test_mixed_batch_alone_and_peft_agree(model_path: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(model_path)
    prompts = [tokenizer.render_chat([{"role": "user", "content": q.format(s)}]) for s in SUBJECTS for q in QUESTIONS]
    assert len(prompts) == 64
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    versions = {name: _version(name, _adapter(base, name, tmp_path / name)) for name in ADAPTERS}

    mixed, alone = await _engine_answers(model_path, prompts, versions)
    differing = [key for key in mixed if mixed[key] != alone[key]]

    wrong: list[str] = []
    ties: list[str] = []
    for name, version in versions.items():
        peft = PeftModel.from_pretrained(base, version.path).eval()
        for kind, answers in (("mixed", mixed), ("alone", alone)):
            if kind == "mixed" or differing:
                mine = [answers[f"{name}/{i}"] for i in range(64)]
                wrong += [f"{name} {kind}: {d}" for d in _disagreements(peft, prompts, mine)]
        for i in range(0, 64, 16):
            out = peft.generate(
                input_ids=torch.tensor([prompts[i]]),
                attention_mask=torch.ones(1, len(prompts[i]), dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompts[i]) :].tolist()
            if out != alone[f"{name}/{i}"]:
                ties.append(f"{name}/{i}: generate() {out}, engine {alone[f'{name}/{i}']}")
        peft.unload()
    assert not wrong, "\n".join(wrong)
    assert len(ties) <= 1, ties  # both sides were greedy, so more than a rare tie is a fault
    for key in differing:  # both were shown to be greedy for PEFT, so this is a tie
        print(f"tie: {key}: mixed {mixed[key]}, alone {alone[key]}")
    assert len(differing) <= 3, differing
    outputs = {tuple(mixed[f"{name}/{i}"]) for name in ADAPTERS for i in range(64)}
    assert len(outputs) > 128, "the adapters hardly change the output, so this proves little"
