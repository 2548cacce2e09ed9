"""TRL's SFTTrainer on a folder's rows.json and task.json: float32, no checkpointing of activations, no padding.

Measured on two cores, `padding_free` takes half the CPU time of padded batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from steps import Steps  # type: ignore[import-not-found]  # beside this file, which runs as a script
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

LONGEST = 512


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text("utf-8"))
    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    steps = Steps(task["batch"])
    config = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=task["batch"],
        max_steps=task["steps"],
        max_length=None,  # not taken together with padding_free: `shortened` does it
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        seed=task["seed"],
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=False,
        padding_free=True,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([conversation(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[steps],
    )
    trainer.train_dataset = trainer.train_dataset.map(shortened)
    trainer.train()
    steps.write(folder)


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Alpaca as LLaMA-Factory reads it: instruction and input, joined by a line break."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """Token ids and masks of a row, cut off at the end as `max_length` does."""
    return {name: value[:LONGEST] if isinstance(value, list) else value for name, value in row.items()}


if __name__ == "__main__":
    main()
