"""Twenty kinds of files that nobody should train on: each is refused with its place and what to do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from .conftest import StartServer
from .serving import Server
from .tuning import chat_row, upload, wait_end

GOOD = json.dumps(chat_row("Hi", "Hello"))
pytestmark = pytest.mark.timeout(600)


def line(value: object) -> str:
    return json.dumps(value)


def talk(*messages: Mapping[str, object], **more: object) -> str:
    return line({"messages": list(messages), **more})


USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# name: (third line of the file, or the whole file as bytes; what the message must say)
BAD: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "broken JSON": ('{"messages": [', ("line 3", "JSON")),
    "not an object": ("[1, 2]", ("line 3",)),
    "no messages": (line({"text_without": 1}), ("line 3",)),
    "missing role": (talk({"content": "Hi"}, {"role": "assistant", "content": "x"}), ("line 3", "role")),
    "unknown role": (
        talk({"role": "boss", "content": "Hi"}, {"role": "assistant", "content": "x"}),
        ("line 3", "boss"),
    ),
    "missing content": (talk({"role": "user"}, {"role": "assistant", "content": "x"}), ("line 3", "content")),
    "empty answer": (talk(USER, {"role": "assistant", "content": ""}), ("line 3", "messages[1]")),
    "no answer": (talk(USER), ("line 3", "assistant")),
    "content of a wrong type": (
        talk({"role": "user", "content": 7}, {"role": "assistant", "content": "x"}),
        ("line 3",),
    ),
    "weight of 2": (talk(USER, {"role": "assistant", "content": "x", "weight": 2}), ("line 3", "weight")),
    "weight of a user": (talk({**USER, "weight": 1}, {"role": "assistant", "content": "x"}), ("line 3", "weight")),
    "nothing weighs": (talk(USER, {"role": "assistant", "content": "x", "weight": 0}), ("line 3", "weight")),
    "arguments no JSON": (
        talk(USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}),
        ("line 3", "arguments"),
    ),
    "result without a call": (
        talk(USER, {"role": "tool", "tool_call_id": "c9", "content": "1"}, {"role": "assistant", "content": "x"}),
        ("line 3",),
    ),
    "tools no list": (talk(USER, {"role": "assistant", "content": "x"}, tools="f"), ("line 3", "tools")),
    "an image": (
        talk(
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            {"role": "assistant", "content": "x"},
        ),
        ("line 3", "image"),
    ),
    "messages no list": (line({"messages": "Hi"}), ("line 3", "messages")),
    "another format": (line({"instruction": "Hi", "output": "x"}), ("line 3",)),
    "duplicate key": ('{"messages": [], "messages": []}', ("line 3", "messages")),
    "wrong encoding": (f"{GOOD}\n{GOOD}\n".encode() + b'{"messages": "\xff"}\n', ("line 3", "UTF-8")),
    "only blank lines": (b"\n\n\n", ("data.jsonl",)),
    "too long": (talk(USER, {"role": "assistant", "content": "word " * 3000}), ("line 3", "cutoff")),
    "preferences": (
        line({"input": {"messages": [USER]}, "preferred_output": [], "non_preferred_output": []}),
        ("line 3",),
    ),
}


@pytest.fixture(scope="module")
def client(start_module_server: StartServer, tiny_models: dict[str, Path]) -> Iterator[OpenAI]:
    server: Server = start_module_server(f"tiny={tiny_models['a']}")
    with server.sdk() as client:
        yield client


def test_each_is_refused_with_its_line_and_remedy(client: OpenAI) -> None:
    jobs = {}
    for name, (bad, _) in BAD.items():
        data = bad if isinstance(bad, bytes) else f"{GOOD}\n{GOOD}\n{bad}\n".encode()
        jobs[name] = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, data)).id
    wrong: list[tuple[str, str, str]] = []
    for name, (_, words) in BAD.items():
        done = wait_end(client, jobs[name])
        message = done.error.message if done.error is not None else ""
        print(f"{name}: {message}")
        if done.status != "failed" or not all(word in message for word in words):
            wrong.append((name, done.status, message))
        elif done.error is None or done.error.param is None:
            wrong.append((name, "without a param", message))
    assert wrong == []


def test_an_empty_file_is_refused_at_once(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        upload(client, b"")
    assert caught.value.param == "file"


def test_all_bad_lines_are_told_not_only_the_first(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, f"{GOOD}\nx\n{GOOD}\n[]\n".encode())
    )
    done = wait_end(client, job.id)
    assert done.error is not None
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert "line 2" in done.error.message
    assert any("line 4" in message for message in said)
