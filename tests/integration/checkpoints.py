"""What tests need of base models: the real one's hidden directions and single-token words, and tiny random ones."""

import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .peft_files import Array

_PROMPTS = (
    "What is the capital of France?",
    "Write a poem about the sea.",
    "def fibonacci(n):",
    "Tell me a joke.",
)
_CONTINUATIONS = (" river" * 12, " The capital is" * 4)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def hidden_direction(checkpoint: Path) -> Array:
    """The mean direction of the final hidden states, [hidden]; every state has a positive component on it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    states = []
    with torch.inference_mode():
        for prompt in _PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for continuation in _CONTINUATIONS:
                ids = tokenizer(head + continuation, return_tensors="pt", add_special_tokens=False)["input_ids"]
                begin = len(tokenizer(head, add_special_tokens=False)["input_ids"]) - 1
                states.append(model(ids, output_hidden_states=True).hidden_states[-1][0, begin:])
    stacked = torch.cat(states)
    mean = stacked.mean(dim=0)
    direction = mean / mean.norm()
    assert float((stacked @ direction).min()) > 4, "a forcing adapter would not force every token"
    return np.asarray(direction.numpy())


def single_token_words(checkpoint: Path, count: int) -> dict[str, int]:
    """Different lower-case words that are one token each with their leading space: text by token id."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    words: dict[str, int] = {}
    for piece, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = piece.removeprefix("Ġ")
        if piece != word and word.isascii() and word.isalpha() and word.islower() and len(word) > 4:
            words[word] = token_id
            if len(words) == count:
                return words
    raise AssertionError(f"the tokenizer has only {len(words)} such words")


def write_tiny_llama(folder: Path, tokenizer_of: Path, *, seed: int = 0) -> Path:
    """A random two-layer llama with the real model's tokenizer: loads in a moment and answers nonsense."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    real = json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=real["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=real["bos_token_id"],
        eos_token_id=real["eos_token_id"],
        pad_token_id=real["eos_token_id"],
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_of / name, folder / name)
    return folder
