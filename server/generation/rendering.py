"""Renders chats and encodes texts for the endpoints: long ones in a thread, so that running streams keep moving."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ...engines.tokenizer import ChatTokenizer
from ...storage.errors import InvalidInput

LONG_TEXT = 4_000  # characters; shorter ones take less time than the way to a thread and back


async def render_messages(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any] | None,
    chat_template: str | None,
    add_special_tokens: bool,
) -> list[int]:
    """The prompt's token ids. Raises InvalidInput for what the model's template cannot show."""
    _check_tool_calls(tokenizer, messages, chat_template)

    def render() -> list[int]:
        return tokenizer.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            chat_template=chat_template,
            add_special_tokens=add_special_tokens,
        )

    # A template of the request's own may compute for long however short the messages are.
    if chat_template is None and sum(_length(message["content"]) for message in messages) < LONG_TEXT:
        return render()
    return await asyncio.to_thread(render)


async def encode_text(tokenizer: ChatTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The text's token ids."""
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _length(content: str | list[dict[str, str]] | None) -> int:
    if isinstance(content, list):
        return sum(len(part["text"]) for part in content)
    return len(content or "")


def _check_tool_calls(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], chat_template: str | None
) -> None:
    """A template that does not know tool calls would leave them out in silence."""
    for place, message in enumerate(messages):
        if "tool_calls" in message and "tool_calls" not in tokenizer.chat_template(chat_template):
            raise InvalidInput(
                "This model's chat template has no place for tool calls; send the conversation without them.",
                param=f"messages.{place}.tool_calls",
            )
