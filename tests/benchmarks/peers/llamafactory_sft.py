"""LLaMA-Factory on a folder's rows.json and task.json, with the arguments that a YAML file of its would have."""

import json
import sys
from pathlib import Path

from llamafactory.train.tuner import run_exp
from steps import Steps  # type: ignore[import-not-found]  # beside this file, which runs as a script


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text("utf-8"))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), "utf-8")
    steps = Steps(task["batch"])
    arguments = {
        "model_name_or_path": task["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "chatml",
        # what the model's own template says when a conversation has no system message
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        "cutoff_len": 512,
        "disable_shuffling": True,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": task["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": task["steps"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "seed": task["seed"],
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    run_exp(args=arguments, callbacks=[steps])
    steps.write(folder)


if __name__ == "__main__":
    main()
