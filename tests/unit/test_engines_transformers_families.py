"""Tiny random checkpoints of many architectures: the engine's greedy tokens equal `generate()`'s, token for token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tuneloop.engines.transformers.config import TransformersConfig
from tuneloop.engines.transformers.executor import FlatExecutor, GroupExecutor
from tuneloop.engines.transformers.model import load_model

from tests.support.engine import TINY, VOCAB, engine_core, greedy, make_checkpoint, submit


def _gemma(**extra: Any) -> dict[str, Any]:
    return {**TINY, "head_dim": 16, "sliding_window": 12, **extra}


FAMILIES: dict[str, tuple[Callable[[], Any], type]] = {
    "llama": (lambda: hf.LlamaConfig(**TINY), FlatExecutor),
    "llama-tied-bias": (
        lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        FlatExecutor,
    ),
    "qwen2": (lambda: hf.Qwen2Config(**TINY), FlatExecutor),
    "qwen3": (lambda: hf.Qwen3Config(**TINY, head_dim=16), FlatExecutor),
    "mistral-window": (lambda: hf.MistralConfig(**TINY, sliding_window=10), FlatExecutor),
    "gemma2": (lambda: hf.Gemma2Config(**_gemma(query_pre_attn_scalar=16)), FlatExecutor),
    "gemma3": (lambda: hf.Gemma3TextConfig(**_gemma(query_pre_attn_scalar=16)), FlatExecutor),
    "gpt-neox": (
        lambda: hf.GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
        FlatExecutor,
    ),
    "gpt2": (lambda: hf.GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=48, n_layer=3, n_head=4), FlatExecutor),
    "bloom": (lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=3, n_head=4), GroupExecutor),
    "falcon-alibi": (
        lambda: hf.FalconConfig(
            vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, alibi=True, multi_query=True
        ),
        GroupExecutor,
    ),
    "mixtral": (lambda: hf.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2), FlatExecutor),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeConfig(
            **TINY, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
        ),
        FlatExecutor,
    ),
    "gpt-oss": (
        lambda: hf.GptOssConfig(**TINY, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        FlatExecutor,
    ),
    "phi3": (lambda: hf.Phi3Config(**TINY), FlatExecutor),
    "glm": (lambda: hf.GlmConfig(**TINY, head_dim=16), FlatExecutor),
    "llama-dynamic-rope": (
        lambda: hf.LlamaConfig(
            **{**TINY, "max_position_embeddings": 64},
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        GroupExecutor,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str, tmp_path: Path) -> None:
    make, executor = FAMILIES[family]
    path = make_checkpoint(make(), tmp_path)
    reference = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 2, 5, 17, 33, 40)]
    expected = {}
    for number, prompt in enumerate(prompts):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected[f"r{number}/0"] = out[0, len(prompt) :].tolist()

    model = load_model(path, TransformersConfig(weights="float32"))
    assert isinstance(model.executor, executor)
    submits = [submit(f"r{i}", p, greedy(16)) for i, p in enumerate(prompts)]
    with engine_core(model, max_num_batched_tokens=24, max_num_seqs=8) as crank:
        # two at once, then one at a time while the others decode: chunks, mixed batches and lanes are all met
        for arrivals in (submits[:2], [], submits[2:3], submits[3:4], []):
            crank.turn(*arrivals)
        crank.run(*submits[4:])
        assert not crank.failed and crank.texts() == expected


def test_kv_cannot_be_served_is_refused(tmp_path: Path) -> None:
    """A recurrent architecture is refused by name, not served wrongly."""
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"recurrent|cannot serve|cannot be loaded"):
        load_model(tmp_path, TransformersConfig())
