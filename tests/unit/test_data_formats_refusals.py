"""Bad data files: every kind of mistake is refused with its line, its field and what to do."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.data.checks import DataError
from tuneloop.finetune.data.read import check_rows, read_rows
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import DataFile, RunSpec

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]})
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


def spec_of(*files: Path, **keys: Any) -> RunSpec:
    recipe = Recipe(model_name_or_path="m", **keys)
    named = tuple(DataFile(path=str(file), name=file.name) for file in files)
    return RunSpec(recipe=recipe, base_name="m", model_path=Path("/m"), train_files=named)


def refusal(folder: Path, content: bytes, name: str = "chat.jsonl") -> DataError:
    file = folder / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(spec_of(file), "train"))
    problems = check_rows(spec_of(file), "train")
    assert [str(problem) for problem in problems[:1]] == [str(caught.value)]
    assert caught.value.param == "training_file"
    return caught.value


def conversation(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": messages, **more})


def calling(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, **changes}]}


def tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "add", **function}}]


@pytest.mark.parametrize(
    ("row", "path", "what"),
    [
        (conversation(USER, {"content": "x"}), "messages[1].role", "no role"),
        (conversation(USER, {"role": "bot", "content": "x"}), "messages[1].role", "'bot' is unknown"),
        (conversation(USER, {"role": "function", "content": "x"}), "messages[1]", "old form"),
        (conversation(USER, {"role": "assistant"}), "messages[1].content", "has no content"),
        (conversation({"role": "user"}, ANSWER), "messages[0].content", "has no content"),
        (conversation(USER, {"role": "assistant", "content": " "}), "messages[1].content", "answer is empty"),
        (conversation(USER, {"role": "assistant", "content": 3}), "messages[1].content", "content is a number"),
        (conversation(USER, {"role": "assistant", "content": []}), "messages[1].content", "parts is empty"),
        (conversation(USER), "messages", "no assistant message"),
        (conversation(USER, ANSWER, USER), "messages[2]", "last message is of role user"),
        (conversation(), "messages", "conversation is empty"),
        (json.dumps({"messages": {"role": "user"}}), "messages", "messages are an object"),
        (conversation("Hi", ANSWER), "messages[0]", "a message is text"),
        (conversation(USER, {**ANSWER, "weight": 2}), "messages[1].weight", "2 is neither 0 nor 1"),
        (conversation(USER, {**ANSWER, "weight": True}), "messages[1].weight", "neither 0 nor 1"),
        (conversation({**USER, "weight": 1}, ANSWER), "messages[0].weight", "user message has a weight"),
        (conversation(USER, {**ANSWER, "weight": 0}), "messages", "weight 0, so nothing is learned"),
        (conversation(USER, {**ANSWER, "wieght": 0}), "messages[1].wieght", "Did you mean weight"),
        (conversation(USER, {**ANSWER, "function_call": {"name": "f"}}), "messages[1].function_call", "tool_calls"),
        (conversation(USER, {**ANSWER, "refusal": "No"}), "messages[1].refusal", "into content"),
        (conversation(USER, {**ANSWER, "tool_calls": "x"}), "messages[1].tool_calls", "are text"),
        (conversation({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0]", "user message has tool_calls"),
        (conversation(USER, calling(function=None)), "messages[1].tool_calls[0].function", "no function"),
        (conversation(USER, calling(type="code")), "messages[1].tool_calls[0].type", "type 'code'"),
        (
            conversation(USER, calling(function={"name": "add", "arguments": "{x"})),
            "messages[1].tool_calls[0].function.arguments",
            "should be JSON",
        ),
        (
            conversation(USER, calling(function={"name": "add", "arguments": "[1]"})),
            "messages[1].tool_calls[0].function.arguments",
            "are a list, not an object",
        ),
        (
            conversation(USER, calling(function={"arguments": "{}"})),
            "messages[1].tool_calls[0].function.name",
            "no name",
        ),
        (
            conversation(USER, {"role": "assistant", "tool_calls": [CALL, CALL]}),
            "messages[1].tool_calls",
            "the same id",
        ),
        (conversation(USER, {"role": "tool", "content": "3"}, ANSWER), "messages[1]", "answers no call"),
        (
            conversation(USER, calling(), {"role": "tool", "tool_call_id": "b", "content": "3"}, ANSWER),
            "messages[2].tool_call_id",
            "'b' is that of no earlier call",
        ),
        (conversation({**USER, "tool_call_id": "a"}, ANSWER), "messages[0]", "user message has a tool_call_id"),
        (conversation(USER, ANSWER, tools="nonsense"), "tools", "should be JSON"),
        (conversation(USER, ANSWER, tools=3), "tools", "a number, not a list"),
        (conversation(USER, ANSWER, tools=[{"type": "code"}]), "tools[0].name", "no name"),
        (conversation(USER, ANSWER, tools=tool(name="")), "tools[0].function.name", "no name"),
        (
            conversation(USER, ANSWER, tools=tool(parameters={"type": "list"})),
            "tools[0].function.parameters.type",
            "'list'",
        ),
        (
            conversation(USER, ANSWER, tools=tool(parameters={"properties": {"x": {"type": "int"}}})),
            "tools[0].function.parameters.properties.x.type",
            "'int' is not a type",
        ),
        (
            conversation(USER, ANSWER, tools=tool(parameters={"properties": {}, "required": "x"})),
            "tools[0].function.parameters.required",
            "not a list",
        ),
        (
            conversation({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
            "messages[0].content[0]",
            "'image_url', and this model reads text only",
        ),
        (conversation(USER, ANSWER, images=["a.png"]), "images", "reads text only"),
        (conversation(USER, ANSWER, functions=[{}]), "functions", "old form"),
        (json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"}]}), None, "no content"),
        (json.dumps({"conversations": [{"from": "x", "value": "Hi"}]}), "conversations[0].from", "unknown"),
        (
            json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "x"}]}),
            "conversations[1].value",
            "should be JSON",
        ),
        (json.dumps({"instruction": "Hi", "output": ""}), "output", "answer is empty"),
        (json.dumps({"instruction": "Hi", "output": ["x"]}), "output", "is a list"),
        (json.dumps({"instruction": "Hi"}), None, "'output' is missing"),
        (json.dumps({"instruction": "", "input": "", "output": "x"}), "instruction", "prompt is empty"),
        (json.dumps({"instruction": "Hi", "output": "x", "history": [["a"]]}), "history[0]", "question and an answer"),
        (json.dumps({"text": " "}), "text", "text is empty"),
        (json.dumps({"question": "Hi"}), None, "columns question are those of no format"),
        (conversation(USER, chosen=ANSWER, rejected=ANSWER), None, "preference data"),
        (conversation(USER, ANSWER, label=True), None, "KTO data"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, row: str, path: str | None, what: str) -> None:
    error = refusal(tmp_path, f"\n\n{row}\n".encode())
    assert error.place.line == 3
    assert str(error).startswith("chat.jsonl, line 3")
    assert what in str(error)
    assert path is None or error.path == path
    assert error.remedy.rstrip().endswith((".", "?", "]", "}", '"'))


@pytest.mark.parametrize(
    ("line", "column", "what"),
    [
        ('{"messages": [}', 15, "not valid JSON"),
        ('{"messages": []} x', 18, "Extra data"),
        ('{"messages": [], "messages": []}', None, "'messages' stands twice"),
        ("[1]", 1, "a list, not an object"),
        ('{"text": NaN}', None, "NaN is not JSON"),
        ('{"text": "a \\ud800 b"}', 13, "half of a character"),
        ("[" * 100_000, None, "nested too deeply"),
    ],
)
def test_broken_json_is_named_by_line_and_column(tmp_path: Path, line: str, column: int | None, what: str) -> None:
    error = refusal(tmp_path, f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n".encode())
    assert (error.place.line, error.column) == (3, column)
    assert what in str(error)


def test_other_encodings_are_named_by_byte_and_line(tmp_path: Path) -> None:
    bad = '{"text": "Grüße"}\n'.encode("latin-1")
    error = refusal(tmp_path, GOOD.encode() + b"\n" + bad)
    assert (error.place.line, error.column) == (2, 13)
    assert f"byte {len(GOOD) + 1 + 13} of the file (0xfc)" in str(error)
    assert "is UTF-16" in str(refusal(tmp_path, GOOD.encode("utf-16")))
    error = refusal(tmp_path, b'[{"text": "ok"},\n{"text": "' + b"\xff" + b'"}]', "a.json")
    assert (error.place.line, error.column) == (2, 11)
    assert "byte 28 of the file (0xff)" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.jsonl", b"", 1, "0 bytes"),
        ("a.jsonl", b" \n\n", 1, "nothing but blanks"),
        ("a.json", b"[]", 1, "no rows"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', 2, "not valid JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}', 2, "',' or ']'"),
        ("a.json", b'[{"text": "a"}] 1', 1, "follows the array's end"),
        ("a.json", b'[{"text": "a"}, 2]', 2, "the row is a number"),
        ("a.json", b'{\n"train": []}', 1, "one JSON object over several lines"),
        ("a.csv", b"text\na\n\nb,c\n", 4, "2 cells, but the header has 1"),
        ("a.csv", b"instruction,output\nHi\n", 2, "output is the first that is missing"),
        ("a.csv", b'text\n"a\n', 2, "not valid CSV"),
        ("a.csv", b"text,text\na,b\n", 1, "column 2 of the header is 'text' again"),
        ("a.csv", b"text,\na,b\n", 1, "has no name"),
        ("a.csv", b"text\n", 1, "no rows"),
        ("a.csv", b"question,answer\na,b\n", 2, "those of no format"),
        ("a.parquet", b"text\nx\n", 1, "named .parquet but is none"),
        ("a.parquet", b"PAR1 and more", 1, "Parquet file is broken"),
        ("a.zip", b"PK\x03\x04....", 1, "zip archive"),
        ("a.xyz", b"hello", 1, "neither by its name"),
        ("a.jsonl.gz", b"\x1f\x8bxx", 1, "gzip file is broken"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() + b"\n" + GOOD.encode() * 9)[:-12], 1, "gzip file is broken"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, line: int, what: str) -> None:
    error = refusal(tmp_path, content, name)
    assert what in str(error)
    assert error.place.line == line


def test_one_file_has_one_format(tmp_path: Path) -> None:
    error = refusal(tmp_path, f'{GOOD}\n{{"text": "a"}}\n'.encode())
    assert error.place.line == 2
    assert "in text format with other columns, but the file began in openai format" in str(error)


def test_a_line_may_not_be_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.finetune.data.kinds.lines.MAX_ROW_BYTES", 100)
    assert "longer than" in str(refusal(tmp_path, b'{"text": "' + b" " * 200))


def test_check_rows_collects_the_first_twenty(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(f"{GOOD}\n{{broken\n" for _ in range(30)))
    problems = check_rows(spec_of(file), "train")
    assert [problem.place.line for problem in problems] == list(range(2, 42, 2))


def test_a_good_file_has_no_problems(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{GOOD}\n{GOOD}")
    assert check_rows(spec_of(file), "train") == []
