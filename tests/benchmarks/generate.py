"""transformers' own `generate()` on the same model: one batch of `rows` chats, 64 new tokens, greedy. Prints JSON.

Run as a process of its own: python -m tests.benchmarks.generate MODEL ROWS
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .load import chats


def main() -> None:
    path, rows = sys.argv[1], int(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    texts = [
        tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        for body in chats(rows, seed=3, model=lambda _: "")
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(**inputs, max_new_tokens=2, **settings)
    began = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=64, **settings)
    seconds = time.perf_counter() - began
    tokens = out.shape[0] * (out.shape[1] - inputs["input_ids"].shape[1])
    sys.stdout.write(json.dumps({"tokens_per_second": tokens / seconds, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
