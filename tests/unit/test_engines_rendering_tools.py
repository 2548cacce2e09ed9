"""Tools in chat templates: those that know them get them as they read them, the others get plain messages."""

import json
from typing import Any

import pytest
from tuneloop.engines.fake_checkpoint import CHATML, write_fake_checkpoint
from tuneloop.engines.rendering import render_text
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.finetune.data.base import Place, Row
from tuneloop.finetune.data.render import Renderer
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.storage.errors import InvalidInput

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "2+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "three"}]},
    {"role": "assistant", "content": "3."},
]
OBJECTS = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
)
TEXTS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ '<' + c.function.arguments + '>' }}{% endfor %}{% endfor %}"  # noqa: E501
NULLS = "{% for m in messages %}{% if m.content is none %}{{ m['tool_calls'][0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"  # noqa: E501


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_fake_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def text(tokenizer: ChatTokenizer, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_text(tokenizer, messages, chat_template=template, add_generation_prompt=False, **options)


def test_a_template_without_tools_gets_plain_messages(tokenizer: ChatTokenizer) -> None:
    shown = text(tokenizer, CHATML, MESSAGES, tools=[TOOL])
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 1}}\n</tool_call>'
    assert shown.startswith("<|im_start|>system\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in shown
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n" in shown
    assert (
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\nthree\n</tool_response><|im_end|>\n"
    ) in shown
    assert shown.endswith("<|im_start|>assistant\n3.<|im_end|>\n")


def test_the_system_message_keeps_its_text(tokenizer: ChatTokenizer) -> None:
    shown = text(tokenizer, CHATML, [{"role": "developer", "content": "Be brief."}, *MESSAGES], tools=[TOOL])
    assert shown.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert shown.count("<|im_start|>system") == 1


def test_a_template_that_knows_tools_stays_untouched(tokenizer: ChatTokenizer) -> None:
    shown = text(tokenizer, OBJECTS, MESSAGES, tools=[TOOL])
    assert shown.startswith(json.dumps([TOOL]) + "[user]2+1?[assistant]22[tool]3")


def test_arguments_come_as_the_template_reads_them(tokenizer: ChatTokenizer) -> None:
    as_object = [{**MESSAGES[1], "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": "é"}}}]}]
    assert text(tokenizer, TEXTS, MESSAGES[:2]) == '2+1?<{"a": 2, "b": 1}><{"a": 2, "b": 1}>'
    assert text(tokenizer, TEXTS, as_object) == '<{"a": "é"}>'
    assert text(tokenizer, NULLS, MESSAGES) == '2+1?{"a": 2, "b": 1}3three3.'


def test_arguments_that_are_no_json_are_refused(tokenizer: ChatTokenizer) -> None:
    bad = {**CALL, "function": {"name": "add", "arguments": "{"}}
    for template in (CHATML, OBJECTS):
        with pytest.raises(InvalidInput, match="call of 'add' are not valid JSON"):
            text(tokenizer, template, [{"role": "assistant", "content": None, "tool_calls": [bad]}])


def test_what_a_template_knows_of_tools_is_left_to_it(tokenizer: ChatTokenizer) -> None:
    """As LFM2's: it lists tools and shows results, but has no place for calls."""
    template = (
        "{{ (tools or []) | tojson }}{% for m in messages %}[{{ m.role }}]"
        "{{ '<result>' if m.role == 'tool' else '' }}{{ m.content }}{% endfor %}"
    )
    shown = text(tokenizer, template, MESSAGES, tools=[TOOL])
    assert shown.startswith(json.dumps([TOOL]) + "[user]2+1?[assistant]<tool_call>")
    assert "[tool]<result>3[tool]<result>three[assistant]3." in shown
    assert shown.startswith(text(tokenizer, template, MESSAGES[:1], tools=[TOOL]))


def test_tools_stand_in_the_first_turn_where_system_messages_are_refused(tokenizer: ChatTokenizer) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + CHATML
    shown = text(tokenizer, template, MESSAGES, tools=[TOOL])
    assert shown.startswith("<|im_start|>user\n# Tools\n") and "</tool_call>\n\n2+1?<|im_end|>" in shown


def test_without_tools_nothing_changes(tokenizer: ChatTokenizer) -> None:
    plain = [MESSAGES[0], MESSAGES[4]]
    assert "# Tools" not in text(tokenizer, CHATML, plain)


def test_calls_are_learned(tokenizer: ChatTokenizer) -> None:
    row = Row(place=Place("a", 1), messages=MESSAGES, tools=[TOOL])
    render = Renderer(tokenizer, Recipe(model_name_or_path="m"))
    learned = [piece for piece, supervised in render.spans(row) if supervised]
    assert len(learned) == 2 and learned[0].startswith("<tool_call>\n") and learned[1] == "3.<|im_end|>\n"
    [sequence] = render.sequences(row)
    prompt = tokenizer.render_chat(MESSAGES[:4], tools=[TOOL])
    assert list(sequence.ids[: len(prompt)]) == prompt
