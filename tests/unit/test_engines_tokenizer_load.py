"""Loading a checkpoint's tokenizer: what its files say, what is refused, and that torch stays out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tuneloop.engines.fake_checkpoint import CHATML, write_fake_checkpoint
from tuneloop.engines.sampling_defaults import SamplingDefaults
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage.errors import InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_checkpoint(tmp_path / "checkpoint")


def configure(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_text_and_ids_go_round(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(folder)
    text = "What is the capital of France? 北京 🤗\n"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < tokenizer.vocab_size
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_special_tokens_have_their_ids(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(folder)
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.all_special_ids == {0, 1, 2}
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def test_a_token_that_is_part_of_a_character_keeps_its_bytes(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(folder)
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    assert [tokenizer.token_bytes(i) for i in ids] == [b"\xc3", b"\xa9"]
    assert tokenizer.token_text(ids[0]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused_by_number(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(folder)
    with pytest.raises(InvalidInput, match="Token id 99999 is outside"):
        tokenizer.decode([1, 99999], skip_special_tokens=False)
    with pytest.raises(InvalidInput, match="Token id -1 is outside"):
        tokenizer.check_ids([-1])


def test_lone_surrogates_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate"):
        ChatTokenizer.load(folder).encode("a\ud800", add_special_tokens=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"add_bos_token": True}, [1, 290]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 290, 2]),
        ({"add_bos_token": False}, [290]),
        ({}, [290]),
    ],
)
def test_the_configuration_says_what_goes_around_a_text(
    folder: Path, flags: dict[str, bool], expected: list[int]
) -> None:
    configure(folder, **flags)
    tokenizer = ChatTokenizer.load(folder)
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello", add_special_tokens=True) == [hello[0] if i == 290 else i for i in expected]
    assert len(hello) == 1


def test_tokens_that_only_the_configuration_knows_are_added(folder: Path) -> None:
    added = {"339": {"content": "<tool>", "special": False}, "340": {"content": "<think>", "special": True}}
    before = ChatTokenizer.load(folder).vocab_size
    configure(
        folder,
        added_tokens_decoder={str(before): added["339"], str(before + 1): added["340"]},
        additional_special_tokens=["<extra>"],
    )
    tokenizer = ChatTokenizer.load(folder)
    ids = tokenizer.encode("<tool><think><extra>", add_special_tokens=False)
    assert ids == [before, before + 1, before + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"


def test_templates_come_from_a_file_of_their_own_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("main")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = ChatTokenizer.load(folder)
    assert tokenizer.chat_template() == "main"
    assert tokenizer.chat_template(has_tools=True) == "tools"
    assert tokenizer.chat_template("tool_use") == "tools"
    assert tokenizer.chat_template("{{ 1 }}") == "{{ 1 }}"


def test_templates_may_be_a_list_in_the_configuration(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "default", "template": CHATML}, {"name": "rag", "template": "r"}])
    tokenizer = ChatTokenizer.load(folder)
    assert (tokenizer.chat_template(), tokenizer.chat_template("rag")) == (CHATML, "r")


def test_a_model_without_a_template_says_what_to_use(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(write_fake_checkpoint(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidInput, match="use /v1/completions instead"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_sampling_defaults_come_with_the_tokenizer(folder: Path) -> None:
    assert ChatTokenizer.load(folder).sampling_defaults == SamplingDefaults()
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "max_new_tokens": 5}')
    assert ChatTokenizer.load(folder).sampling_defaults == SamplingDefaults(temperature=0.6, top_k=20)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InvalidInput, match=name):
        ChatTokenizer.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no tokenizer"):
        ChatTokenizer.load(tmp_path)


def test_loading_imports_neither_torch_nor_transformers(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tuneloop.engines.tokenizer import ChatTokenizer\n"
        "ChatTokenizer.load(Path(sys.argv[1])).render_chat([{'role': 'user', 'content': 'Hi'}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


def test_both_ways_of_loading_agree_with_transformers(folder: Path, tmp_path: Path) -> None:
    """The same checkpoint read by the tokenizers library, by AutoTokenizer through us, and by AutoTokenizer alone."""
    from transformers import AutoTokenizer

    configure(folder, tokenizer_class="PreTrainedTokenizerFast")
    reference = AutoTokenizer.from_pretrained(str(folder))
    light = ChatTokenizer.load(folder)
    converted = tmp_path / "without-json"
    shutil.copytree(folder, converted)
    slow = json.loads((folder / "tokenizer.json").read_text())["model"]
    (converted / "tokenizer.json").unlink()
    (converted / "vocab.json").write_text(json.dumps(slow["vocab"]))
    (converted / "merges.txt").write_text("\n".join(" ".join(pair) for pair in slow["merges"]))
    configure(converted, tokenizer_class="GPT2Tokenizer", add_bos_token=False)
    heavy = ChatTokenizer.load(converted)
    messages = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "Héllo <|im_end|> 🤗"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert light.render_chat(messages) == expected
    assert heavy.render_chat(messages) == expected
    assert light.decode(expected, skip_special_tokens=True) == reference.decode(expected, skip_special_tokens=True)
    assert heavy.eos_token_id == light.eos_token_id == reference.eos_token_id
