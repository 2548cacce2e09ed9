"""What is learned of a conversation, by templates of several shapes; and that prompts are the server's, id for id."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuneloop.engines.fake_checkpoint import CHATML, write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.finetune.data.base import Place, Row
from tuneloop.finetune.data.checks import DataError
from tuneloop.finetune.data.render import Renderer
from tuneloop.finetune.recipe.recipe import Recipe

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: only the last turn shows its reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
    "{% endif %}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED_GENERATION = (
    "{% for m in messages %}{% set c %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
    "{{ m.role + ': ' + c | trim + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OPENS_OTHERWISE = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING, "generation": GENERATION,
    "trimmed": TRIMMED_GENERATION,
}  # fmt: skip
PLACE = Place("a.jsonl", 3)
Messages = list[dict[str, Any]]

TWO_TURNS: Messages = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("checkpoints")
    more = {"impossible": OPENS_OTHERWISE}
    return {
        name: ChatTokenizer.load(write_fake_checkpoint(folder / name, chat_template=template))
        for name, template in {**TEMPLATES, **more}.items()
    }


def renderer(tokenizer: ChatTokenizer, **keys: Any) -> Renderer:
    return Renderer(tokenizer, Recipe(model_name_or_path="m", **keys))


def row(messages: Sequence[Mapping[str, Any]], **more: Any) -> Row:
    return Row(place=PLACE, messages=messages, **more)


def learned(tokenizer: ChatTokenizer, render: Renderer, example: Row) -> list[list[str]]:
    """The learned pieces of each sequence, as text."""
    found = []
    for sequence in render.sequences(example):
        pieces, held = [], list[int]()
        for token, supervised in zip([*sequence.ids, 0], [*sequence.supervised, False], strict=True):
            if supervised:
                held.append(token)
            elif held:
                pieces.append(tokenizer.decode(held, skip_special_tokens=False))
                held = []
        found.append(pieces)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", [["Hello<|im_end|>\n", "Bye<|im_end|>\n"]]),
        ("llama3", [["Hello<|eot|>", "Bye<|eot|>"]]),
        ("mistral", [[" Hello<|im_end|>", " Bye<|im_end|>"]]),
        ("thinking", [["<think>\n\n</think>\n\nHello<|im_end|>\n"], ["<think>\n\n</think>\n\nBye<|im_end|>\n"]]),
        ("generation", [["Hello", "Bye"]]),
        ("trimmed", [["Hello"], ["Bye"]]),  # "assistant: " and the answer would share a token
    ],
)
def test_what_is_learned(tokenizers: Mapping[str, ChatTokenizer], name: str, expected: list[list[str]]) -> None:
    render = renderer(tokenizers[name])
    assert learned(tokenizers[name], render, row(TWO_TURNS)) == expected
    assert render.split_conversations == (1 if len(expected) > 1 else 0)


def test_the_preview_shows_the_same(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    pieces = renderer(tokenizers["generation"]).spans(row(TWO_TURNS))
    assert [text for text, supervised in pieces if supervised] == ["Hello", "Bye"]
    assert "".join(text for text, _ in pieces).startswith("<|im_start|>user\nHi<|im_end|>\n")


def test_marks_that_change_the_text_count_for_nothing(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    trimmed = tokenizers["trimmed"]
    spaced = [TWO_TURNS[0], {"role": "assistant", "content": " Hello "}]
    assert learned(trimmed, renderer(trimmed), row(spaced)) == [["Hello\n"]]


def test_a_template_that_opens_turns_otherwise_is_refused(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .*impossible to train.*chat_template\.jinja") as caught:
        renderer(tokenizers["impossible"]).sequences(row(TWO_TURNS))
    assert "<think>" in caught.value.message


def test_weights_and_history(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    chatml = tokenizers["chatml"]
    weighed = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]]
    assert learned(chatml, renderer(chatml), row(weighed)) == [["Bye<|im_end|>\n"]]
    assert learned(chatml, renderer(chatml, mask_history=True), row(TWO_TURNS)) == [["Bye<|im_end|>\n"]]
    [pieces] = learned(chatml, renderer(chatml, train_on_prompt=True), row(weighed))
    assert "Hello" not in "".join(pieces) and "Hi<|im_end|>" in pieces[0] and pieces[-1].endswith("Bye<|im_end|>\n")


def test_system_message_and_thinking_of_the_recipe(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    chatml, thinking = tokenizers["chatml"], tokenizers["thinking"]
    assert (
        renderer(chatml, default_system="Be brief.")
        .spans(row(TWO_TURNS))[0][0]
        .startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    )
    pieces = learned(thinking, renderer(thinking, enable_thinking=False), row(TWO_TURNS[:2]))
    assert pieces == [["Hello<|im_end|>\n"]]
    reasoned = [TWO_TURNS[0], {**TWO_TURNS[1], "thinking": "Hm"}]
    assert learned(thinking, renderer(thinking), row(reasoned)) == [["<think>\nHm\n</think>\n\nHello<|im_end|>\n"]]


def test_plain_text_is_learned_with_its_end(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    chatml = tokenizers["chatml"]
    [sequence] = renderer(chatml).sequences(Row(place=PLACE, text="Hello from the base model."))
    assert sequence.ids[-1] == chatml.eos_token_id
    assert list(sequence.supervised) == [False] + [True] * (len(sequence.ids) - 1)


def test_an_answer_to_nothing_is_refused(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    with pytest.raises(DataError, match="no prompt that it answers"):
        renderer(tokenizers["chatml"]).sequences(row(TWO_TURNS[1:]))


def test_a_lone_surrogate_is_its_rows_problem(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    bad = Row(place=Place("b.jsonl", 9), messages=[TWO_TURNS[0], {"role": "assistant", "content": "\ud800"}])
    with pytest.raises(DataError, match=r"b\.jsonl, line 9: .*lone surrogate"):
        renderer(tokenizers["chatml"]).rows([row(TWO_TURNS), bad])


CONTENT = st.lists(  # pieces, so that whitespace, emoji and marks meet words
    st.sampled_from(["\n", " ", "\n\n", "\t", "🤗", "👩‍👩‍👧", "你好", "é", "the", "ing", "a", "Hello", ".", "\ue0f4"]),
    min_size=1,
    max_size=6,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    messages: Messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENT)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(CONTENT)})
        messages.append({"role": "assistant", "content": draw(CONTENT), "weight": draw(st.integers(0, 1))})
    messages[-1]["weight"] = 1
    return messages


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_prompts_are_the_servers(tokenizers: Mapping[str, ChatTokenizer], name: str, messages: Messages) -> None:
    """For each answer that is learned, one sequence goes on from exactly the ids that the server would send."""
    tokenizer = tokenizers[name]
    sequences = renderer(tokenizer).sequences(row(messages))
    served = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    for index, message in enumerate(messages):
        if message.get("weight") != 1:
            continue
        prompt = tokenizer.render_chat(served[:index])
        fitting = [s for s in sequences if list(s.ids[: len(prompt)]) == prompt]
        assert any(s.supervised[len(prompt)] and not s.supervised[len(prompt) - 1] for s in fitting) or (
            name == "trimmed"  # an answer of whitespace leaves nothing
        )
    for sequence in sequences:
        assert not sequence.supervised[0]


def test_answers_that_join_their_prompt_stay_in_one_sequence(tmp_path: Path) -> None:
    """Llama's pattern joins line ends: "\\n" of the prompt and "\\n" of the answer would become one token."""
    folder = write_fake_checkpoint(tmp_path, chat_template=CHATML)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    vocabulary["ĊĊ"] = max(vocabulary.values()) + 1
    merges.insert(0, ["Ċ", "Ċ"])
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = ChatTokenizer.load(folder)
    assert len(tokenizer.encode("\n\n", add_special_tokens=False)) == 1
    messages = [{**m, "content": "\n" + m["content"]} if m["role"] == "assistant" else m for m in TWO_TURNS]
    [sequence] = renderer(tokenizer).sequences(row(messages))
    for index in (1, 3):
        prompt = tokenizer.render_chat(messages[:index])
        assert list(sequence.ids[: len(prompt)]) == prompt
    assert learned(tokenizer, renderer(tokenizer), row(messages)) == [["\nHello<|im_end|>\n", "\nBye<|im_end|>\n"]]


def test_only_turns_that_must_stand_alone_do(tokenizers: Mapping[str, ChatTokenizer]) -> None:
    """A prompt's last space and "Hello" would share a token; the space and "Bye" or "42" do not."""
    trimmed = tokenizers["trimmed"]
    messages = [*TWO_TURNS, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "42"}]
    assert learned(trimmed, renderer(trimmed), row(messages)) == [["Hello"], ["Bye", "42"]]
    alone, whole = learned(trimmed, renderer(trimmed, train_on_prompt=True), row(messages))
    assert alone == ["Hello\n"]
    assert "Hello" not in "".join(whole) and whole[-1].endswith("Bye\nuser: So?\nassistant: 42\n")
