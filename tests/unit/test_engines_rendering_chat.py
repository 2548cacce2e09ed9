"""Chat templates: what they get, what they may not do, and that the result is what transformers makes of them."""

from pathlib import Path
from typing import Any

import pytest
from tuneloop.engines.fake_checkpoint import CHATML, write_fake_checkpoint
from tuneloop.engines.rendering import render_text
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage.errors import InvalidInput

USER = {"role": "user", "content": "Hi"}
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMMING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_fake_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def text(tokenizer: ChatTokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_text(tokenizer, messages, **options)


def test_a_conversation(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yes"}]
    assert text(tokenizer, messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
    )
    assert text(tokenizer, [USER]).endswith("<|im_start|>assistant\n")


def test_ids_are_those_of_the_text(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.render_chat([USER])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text(tokenizer, [USER])
    assert ids[0] == tokenizer.bos_token_id


def test_text_parts_are_joined_for_templates_that_read_strings(tokenizer: ChatTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in text(tokenizer, [{"role": "user", "content": parts}])


def test_strings_become_parts_for_templates_that_read_parts(tokenizer: ChatTokenizer) -> None:
    assert text(tokenizer, [USER], chat_template=PARTS) == "[user]Hi[assistant]"


def test_developer_is_system_where_the_template_does_not_know_it(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    assert text(tokenizer, messages).startswith("<|im_start|>system\nBe brief.")
    knowing = CHATML + "{# developer #}"
    assert text(tokenizer, messages, chat_template=knowing).startswith("<|im_start|>developer\n")


def test_the_callers_messages_stay_as_they_are(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y"}]
    text(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (CHATML, "So far ", "<|im_start|>assistant\nSo far "),
        (CHATML, "", "<|im_start|>assistant\n"),
        (TRIMMING, "So far ", "[assistant]So far"),
        (PARTS, "So far ", "[assistant]So far "),
        ("{{ messages | tojson }}" + CHATML, "So far ", '"So far "}]<|im_start|>user\nHi<|im_end|>\n'),
    ],
)
def test_the_last_message_is_left_open(tokenizer: ChatTokenizer, template: str, content: str, expected: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True, "chat_template": template}
    rendered = text(tokenizer, messages, **options)
    assert expected in rendered
    assert rendered.endswith(content.rstrip() if template == TRIMMING else content)
    assert "\ue0f0" not in rendered


def test_a_template_that_drops_the_last_message_cannot_continue_it(tokenizer: ChatTokenizer) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True, "chat_template": "nothing"}
    with pytest.raises(InvalidInput, match="cannot be used here") as caught:
        text(tokenizer, [USER], **options)
    assert caught.value.param == "continue_final_message"


def test_continue_and_generation_prompt_exclude_each_other(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidInput, match="set only one"):
        text(tokenizer, [USER], continue_final_message=True)


def test_template_arguments_and_surroundings(tokenizer: ChatTokenizer) -> None:
    template = (
        "{{ mood }}|{{ eos_token }}|{{ {'a': '<é>'} | tojson }}|{{ strftime_now('%Y') | length }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}|{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    rendered = text(tokenizer, [USER, USER], chat_template=template, template_kwargs={"mood": "calm"})
    assert rendered == 'calm|<|im_end|>|{"a": "<é>"}|4|Hi'


def test_tools_reach_the_template(tokenizer: ChatTokenizer) -> None:
    template = "{{ tools | length if tools else 'none' }}"
    assert text(tokenizer, [USER], chat_template=template, tools=[{"type": "function"}]) == "1"
    assert text(tokenizer, [USER], chat_template=template) == "none"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "refuses this conversation: Roles must alternate."),
        ("{{ messages[0].missing.more }}", "refuses this conversation"),
        ("{{ messages[0].content + 1 }}", "cannot render this conversation"),
        ("{% for %}", "not valid Jinja, line 1"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
    ],
)
def test_template_errors_are_the_requests(tokenizer: ChatTokenizer, template: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        text(tokenizer, [USER], chat_template=template)


def test_no_messages(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InvalidInput, match="at least one message"):
        text(tokenizer, [])


@pytest.mark.parametrize("template", [CHATML, TRIMMING, "{{ bos_token }}{{ tools | tojson }}" + CHATML])
def test_the_same_as_transformers(tmp_path: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_fake_checkpoint(tmp_path, chat_template=template)
    ours, theirs = ChatTokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [{"role": "system", "content": " a\n"}, {"role": "user", "content": "<|im_end|> é🤗"}]
    assert ours.render_chat(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours.render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    ) == theirs.apply_chat_template(messages, continue_final_message=True, return_dict=False)
