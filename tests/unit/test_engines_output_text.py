"""A row's text: stop strings across token borders, what is held back, min_tokens, and a property test of all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneloop.engines.base import SamplingParams
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.output import OutputText
from tuneloop.engines.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_fake_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def letters(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """One token a byte, so that a test knows what each token adds."""
    return [i for character in text for i in tokenizer.encode(character, add_special_tokens=False)]


def output(tokenizer: ChatTokenizer, **sampling: object) -> OutputText:
    return OutputText(tokenizer, SamplingParams(**sampling), [])  # type: ignore[arg-type]


def test_text_without_stops_comes_as_it_is(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer)
    ids = letters(tokenizer, "né")
    assert [row.push([i]) for i in ids] == ["n", "", "é"]
    assert row.finish() == ""


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("END",))
    pieces = [row.push([i]) for i in letters(tokenizer, "xENENDy")]
    assert pieces == ["x", "", "", "EN", "", "", ""]
    assert row.stopped == "END"
    assert row.token_count_at_stop == 6
    assert row.finish() == ""


def test_what_was_held_back_comes_out_at_the_end(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("END",))
    assert row.push(letters(tokenizer, "xEN")) == "x"
    assert row.finish() == "EN"
    assert row.stopped is None


def test_the_stop_string_can_be_kept(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("END",), include_stop=True)
    assert row.push(letters(tokenizer, "xENDy")) == "xEND"


def test_the_stop_that_is_completed_first_wins(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("abcd", "bc"))
    assert row.push(letters(tokenizer, "xabcd")) == "xa"
    assert row.stopped == "bc"


def test_stops_before_min_tokens_do_not_count(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("a",), min_tokens=3)
    assert row.push(letters(tokenizer, "aab")) == "aab"
    assert row.push(letters(tokenizer, "xa")) == "x"
    assert row.token_count_at_stop == 5


def test_the_token_that_fulfils_min_tokens_may_stop(tokenizer: ChatTokenizer) -> None:
    row = output(tokenizer, stop=("a",), min_tokens=3)
    assert row.push(letters(tokenizer, "xxa")) == "xx"
    assert row.token_count_at_stop == 3


def test_special_tokens_show_only_on_wish(tokenizer: ChatTokenizer) -> None:
    assert output(tokenizer).push([2]) == ""
    assert output(tokenizer, skip_special_tokens=False).push([2]) == "<|im_end|>"


ALPHABET = st.sampled_from("abé")
STOPS = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple)


@given(
    text=st.text(alphabet=ALPHABET, max_size=25),
    stops=STOPS,
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
    cuts=st.lists(st.integers(1, 4), max_size=25),
)
def test_equals_a_search_in_the_whole_text(
    tokenizer: ChatTokenizer, text: str, stops: tuple[str, ...], include: bool, min_tokens: int, cuts: list[int]
) -> None:
    ids = letters(tokenizer, text)
    row = output(tokenizer, stop=stops, include_stop=include, min_tokens=min_tokens)
    released, start = [], 0
    for size in [*cuts, len(ids)]:
        released.append(row.push(ids[start : start + size]))
        start += size
    released.append(row.finish())
    expected, stop = reference(text, stops, include, min_tokens)
    assert "".join(released) == expected
    assert row.stopped == stop


def reference(text: str, stops: tuple[str, ...], include: bool, min_tokens: int) -> tuple[str, str | None]:
    """Character by character over the text so far, without holding anything back."""
    tokens = 0
    for end, character in enumerate(text, start=1):
        tokens += len(character.encode())
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending and tokens >= min_tokens:
            stop = max(ending, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None
