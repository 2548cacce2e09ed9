"""TRL's SFTTrainer on a folder's rows.json and task.json: float32, no checkpointing of activations."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from steps import Steps  # type: ignore[import-not-found]  # beside this file, which runs as a script
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text("utf-8"))
    rows = json.loads((folder / "rows.json").read_text("utf-8"))
    steps = Steps(task["batch"])
    config = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=task["batch"],
        max_steps=task["steps"],
        max_length=512,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        seed=task["seed"],
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=False,
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
    trainer.train()
    steps.write(folder)


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Alpaca as LLaMA-Factory reads it: instruction and input, joined by a line break."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


if __name__ == "__main__":
    main()
