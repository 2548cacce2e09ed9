"""What rows become: OpenAI chat, alpaca, sharegpt and text, recognised or declared, all in OpenAI's form."""

import json
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.data.base import Place, Row
from tuneloop.finetune.data.formats import Alpaca, Columns, OpenAIChat, ShareGPT, Tags, recognise
from tuneloop.finetune.data.kinds import Record

PLACE = Place("f", 1)
TOOL = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}


def row(**fields: Any) -> Row:
    record = Record(place=PLACE, fields=fields)
    return recognise(record).row(record)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_openai_chat_keeps_what_it_says() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {**user("Hi"), "name": "Ann"},
        {**assistant("Hello"), "weight": 0},
        assistant("Again"),
        {**assistant("And again"), "weight": 1.0, "reasoning_content": "Hm"},
    ]
    read = row(messages=messages, parallel_tool_calls=True, id=7)
    assert list(read.messages) == [*messages[:4], {**messages[4], "weight": 1}]
    assert read.messages[4]["weight"] == 1
    assert read.place is PLACE


def test_calls_and_results_are_joined_by_ids() -> None:
    function = {"name": "add", "arguments": {"x": "ü"}}
    read = row(
        messages=[
            user("?"),
            {"role": "assistant", "tool_calls": [{"function": function}, {"id": "b", "function": function}]},
            {"role": "tool", "tool_call_id": "b", "content": "2"},
            {"role": "tool", "content": "1"},
            {**assistant("3"), "tool_calls": []},
        ],
        tools=json.dumps([TOOL]),
    )
    called = {"name": "add", "arguments": '{"x": "ü"}'}
    assert read.messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": called},
            {"id": "b", "type": "function", "function": called},
        ],
    }
    assert [message["tool_call_id"] for message in read.messages[2:4]] == ["b", "call_0"]
    assert read.messages[4] == assistant("3")
    assert list(read.tools) == [{"type": "function", "function": TOOL}]


def test_nulls_that_parquet_adds_mean_nothing() -> None:
    nothing = {"weight": None, "tool_calls": None, "tool_call_id": None, "surprise": None}
    read = row(messages=[{**user("Hi"), **nothing}, {**assistant("Hello"), **nothing}], tools=None)
    assert list(read.messages) == [user("Hi"), assistant("Hello")]


def test_alpaca() -> None:
    read = row(instruction="Add", input="1, 2", output="3", system="Be short.", history=[["a", "b"]])
    assert list(read.messages) == [
        {"role": "system", "content": "Be short."},
        user("a"),
        assistant("b"),
        user("Add\n1, 2"),
        assistant("3"),
    ]
    assert list(row(instruction="Add", input="", output="3").messages) == [user("Add"), assistant("3")]
    assert list(row(prompt="Add", completion="3").messages) == [user("Add"), assistant("3")]


def test_alpaca_without_answers_is_text() -> None:
    record = Record(place=PLACE, fields={"body": "Once upon a time"})
    columns = Columns(prompt="body", query=None, response=None)
    assert Alpaca(columns).row(record) == Row(place=PLACE, text="Once upon a time")
    assert row(text="Once upon a time", label=True).text == "Once upon a time"


def test_sharegpt_calls_and_observations() -> None:
    call = '{"name": "add", "arguments": {"x": 1}}'
    read = row(
        system="Calculate.",
        conversations=[
            {"from": "human", "value": "?"},
            {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": f"<think>Two.</think>\n[{call}, {call}]"},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "3"},
        ],
        tools=json.dumps([TOOL]),
    )
    function = {"name": "add", "arguments": '{"x": 1}'}
    assert list(read.messages) == [
        {"role": "system", "content": "Calculate."},
        user("?"),
        assistant("Let me see."),
        {
            "role": "assistant",
            "content": "<think>Two.</think>",
            "tool_calls": [
                {"id": "call_0", "type": "function", "function": function},
                {"id": "call_1", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "content": "1", "tool_call_id": "call_0"},
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
        assistant("3"),
    ]
    assert list(read.tools) == [{"type": "function", "function": TOOL}]


def test_declared_names_of_roles_and_keys() -> None:
    fields = {"chat": [{"who": "q", "says": "Hi"}, {"who": "a", "says": "Hello"}], "sys": "Be kind."}
    record = Record(place=PLACE, fields=fields)
    tags = Tags(role_tag="who", content_tag="says", user_tag="q", assistant_tag="a")
    columns = Columns(messages="chat", system="sys", tools=None)
    expected = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello")]
    assert list(ShareGPT(columns, tags).row(record).messages) == expected
    assert list(OpenAIChat(columns, tags).row(record).messages) == expected


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [user("a")]}, "openai"),
        ({"conversations": [user("a")]}, "openai"),
        ({"messages": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"conversations": '[{"from": "human"}]'}, "sharegpt"),
        ({"messages": '[{"role": "user"}]'}, "openai"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "alpaca"),
        ({"text": "a", "source": "b"}, "text"),
    ],
)
def test_formats_are_recognised_by_columns(fields: dict[str, Any], name: str) -> None:
    assert recognise(Record(place=PLACE, fields=fields)).name == name


def test_a_place_in_a_json_array_is_a_row(tmp_path: Path) -> None:
    from tuneloop.finetune.data.checks import RowPlace

    assert str(RowPlace("a.json", 3, 17)) == "a.json, row 3 (line 17)"
    assert str(RowPlace("a.parquet", 3)) == "a.parquet, row 3"
