"""Run folders whose first phase is done, on tiny random checkpoints: what tests of the second phase begin with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tuneloop.finetune.data.base import Place, TokenSequence
from tuneloop.finetune.data.prepare import Prepared
from tuneloop.finetune.data.token_store import TokenStore
from tuneloop.finetune.events import Event, read_events
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import RunFolder, RunSpec

VOCABULARY = 97


def write_model(folder: Path) -> Path:
    """A two-layer llama in float32, with a file that stands for a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    """Random lengths, and contents that can be learnt: each token follows from the one before it."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(5, 24))
        first = int(random.integers(0, VOCABULARY))
        ids = [(first + 7 * i) % VOCABULARY for i in range(length)]
        made.append(TokenSequence(ids=ids, supervised=[i > 1 for i in range(length)], place=Place("made up", number)))
    return made


def prepared_run(
    folder: Path,
    model: Path,
    *,
    rows: int = 24,
    eval_rows: int = 0,
    total_steps: int = 6,
    adapter: Path | None = None,
    result: Path | None = None,
    **recipe: Any,
) -> RunFolder:
    """A run with `rows` sequences and four of them a step, unless the recipe says something else."""
    values = {"model_name_or_path": "tiny", "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 7}
    made = Recipe.model_validate(values | recipe)
    run = RunFolder(folder)
    run.create(
        RunSpec(
            recipe=made,
            base_name="tiny",
            model_path=model,
            adapter_path=adapter,
            device="cpu",
            threads=1,
            result=result,
        )
    )
    store = TokenStore.write(run.data / "train", sequences(rows))
    if eval_rows:
        TokenStore.write(run.data / "eval", sequences(eval_rows, seed=1))
    prepared = Prepared(
        recipe=made,
        report={"longest": int(store.lengths.max())},
        digest=store.digest,
        total_steps=total_steps,
    )
    (run.data / "prepared.json").write_text(prepared.model_dump_json())
    return run


def events_of(run: RunFolder, kind: str | None = None) -> list[Event]:
    return [event for event in read_events(run.events) if kind in (None, event.kind)]


def losses_of(run: RunFolder) -> dict[int, float]:
    """The training loss of each step; a step that was done twice counts as it was last."""
    return {int(e.data["step"]): e.data["train_loss"] for e in events_of(run, "metrics") if "train_loss" in e.data}


def adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config
