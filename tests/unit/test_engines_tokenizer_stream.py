"""Incremental decoding equals decoding everything at once, for each kind of tokenizer, and never splits a character."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tuneloop.engines.detokenizer import ByteDecoder, TextDecoder, WindowDecoder
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer

TEXTS = st.text(alphabet=st.sampled_from("ab é北🤗\n'~"), max_size=40)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_fake_checkpoint(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The form of LLaMA 2's and Gemma's vocabularies: pieces with ▁, bytes for what has no piece."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: place for place, piece in enumerate(["<unk>", *pieces, "▁", "a", "b", "▁a", "é", "'"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment, unused-ignore]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment, unused-ignore]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return save(tokenizer, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment, unused-ignore]
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # type: ignore[assignment, unused-ignore]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(["ab ba aab bba é 北 🤗 abab"], trainer)
    return save(tokenizer, tmp_path_factory.mktemp("wordpiece"))


def save(tokenizer: Tokenizer, folder: Path) -> ChatTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return ChatTokenizer.load(folder)


def stream(decoder: TextDecoder, ids: list[int]) -> list[str]:
    return [*map(decoder.push, ids), decoder.flush()]


@given(data=st.data())
def test_byte_level_random_ids(byte_level: ChatTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    pieces = stream(byte_level.text_decoder(skip_special_tokens=skip), ids)
    assert "".join(pieces) == byte_level.decode(ids, skip_special_tokens=skip)


@given(text=TEXTS)
def test_byte_level_never_splits_a_character(byte_level: ChatTokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    pieces = stream(byte_level.text_decoder(skip_special_tokens=True), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@given(text=TEXTS)
def test_sentencepiece(sentencepiece: ChatTokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special_tokens=False)
    decoder = sentencepiece.text_decoder(skip_special_tokens=True)
    assert isinstance(decoder, ByteDecoder)
    assert "".join(stream(decoder, ids)) == sentencepiece.decode(ids, skip_special_tokens=True)


def test_sentencepiece_after_a_prompt_keeps_the_space(sentencepiece: ChatTokenizer) -> None:
    ids = sentencepiece.encode("a", add_special_tokens=False)
    after_prompt = sentencepiece.text_decoder(skip_special_tokens=True, context=ids)
    assert "".join(stream(after_prompt, ids)) == " a"


@given(text=TEXTS)
def test_wordpiece_by_a_window(wordpiece: ChatTokenizer, text: str) -> None:
    ids = wordpiece.encode(text, add_special_tokens=False)
    decoder = wordpiece.text_decoder(skip_special_tokens=False)
    assert isinstance(decoder, WindowDecoder)
    assert "".join(stream(decoder, ids)) == wordpiece.decode(ids, skip_special_tokens=False)


@given(text=TEXTS)
def test_a_window_over_bytes_waits_for_whole_characters(byte_level: ChatTokenizer, text: str) -> None:
    """The window alone, on the hardest input: every character of several bytes is spread over several tokens."""
    ids = byte_level.encode(text, add_special_tokens=False)
    decoder = WindowDecoder(lambda part: byte_level.decode(part, skip_special_tokens=True))
    pieces = stream(decoder, ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_window_does_not_hold_invalid_bytes_for_ever(byte_level: ChatTokenizer) -> None:
    lone = byte_level.encode("é", add_special_tokens=False)[0]
    decoder = WindowDecoder(lambda part: byte_level.decode(part, skip_special_tokens=True))
    assert any(decoder.push(lone) for _ in range(8))


def test_an_incomplete_character_comes_out_at_the_end(byte_level: ChatTokenizer) -> None:
    lone = byte_level.encode("é", add_special_tokens=False)[0]
    decoder = byte_level.text_decoder(skip_special_tokens=True)
    assert decoder.push(lone) == ""
    assert decoder.flush() == "\ufffd"


def test_ids_of_a_padded_vocabulary_have_no_text(byte_level: ChatTokenizer) -> None:
    decoder = byte_level.text_decoder(skip_special_tokens=True)
    assert decoder.push(byte_level.vocab_size + 5) == ""
    assert byte_level.token_text(byte_level.vocab_size + 5) == ""
