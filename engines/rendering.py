"""Turns a conversation into the token ids of a prompt, by the checkpoint's own chat template.

Serving and training both call `render_chat`, so that what was trained is what is served. It knows nothing of HTTP,
of engines, or of how a template's model was trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..storage.errors import InvalidInput
from .chat_templates import call_form, run_template, wants_parts
from .tool_prompts import content_text, fit_tools

Message = Mapping[str, Any]  # role, content (text, or a list of {"type": "text", "text": ...}), and what templates know

# Stands behind the final message's text while the template renders, to find where the text ends. Private-use
# characters: no template strips or splits them, and the space after them shows whether the template trims.
_CONTINUE_MARK = "\ue0f0tuneloop\ue0f1"


class TemplateTokenizer(Protocol):
    """What rendering needs of a tokenizer; `ChatTokenizer` says what its members mean."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    def chat_template(self, name_or_source: str | None = None, *, has_tools: bool = False) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def render_chat(
    tokenizer: TemplateTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    add_special_tokens: bool = False,
) -> list[int]:
    """The prompt's token ids. CPU-bound: call it in a thread for long conversations.

    `continue_final_message` leaves the last message open, for the model to go on with it. `chat_template` replaces
    the checkpoint's template. `add_special_tokens` lets the tokenizer add its BOS too; templates mostly write their
    own. Raises InvalidInput with `param` where a request field is to blame.
    """
    text = render_text(
        tokenizer,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
        chat_template=chat_template,
    )
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def render_text(
    tokenizer: TemplateTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> str:
    """The prompt as text, before tokenisation; the arguments are those of `render_chat`."""
    if not messages:
        raise InvalidInput("The list of messages is empty; send at least one message.", param="messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidInput(
            "continue_final_message goes on with the last message and add_generation_prompt opens a new one; "
            "set only one of them to true.",
            param="continue_final_message",
        )
    source = tokenizer.chat_template(chat_template, has_tools=bool(tools))
    fitted, shown_tools = fit_tools(messages, tools or (), source)
    conversation = [_fit(message, source) for message in fitted]
    final_text = ""
    if continue_final_message:
        final_text = _mark_final_message(conversation)
    rendered = run_template(
        source,
        {
            **tokenizer.special_tokens,
            **(template_kwargs or {}),
            "messages": conversation,
            "tools": shown_tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut_at_mark(rendered, final_text) if continue_final_message else rendered


def _fit(message: Message, source: str) -> dict[str, Any]:
    """A copy of the message in the form that this template reads."""
    fitted = dict(message)
    if fitted.get("role") == "developer" and "developer" not in source:
        fitted["role"] = "system"
    content = fitted.get("content")
    if not content and fitted.get("tool_calls") and call_form(source)[1]:
        fitted["content"] = None
    elif not wants_parts(source):
        fitted["content"] = content_text(content)
    elif isinstance(content, str):
        fitted["content"] = [{"type": "text", "text": content}]
    return fitted


def _mark_final_message(conversation: Sequence[dict[str, Any]]) -> str:
    """Put the mark behind the last message's text; returns that text."""
    final = conversation[-1]
    content = final["content"]
    if isinstance(content, str):
        final["content"] = content + _CONTINUE_MARK + " "
        return content
    if not content:
        raise InvalidInput(
            "continue_final_message needs a last message with text to continue.", param="continue_final_message"
        )
    text: str = content[-1]["text"]
    final["content"] = [*content[:-1], {**content[-1], "text": text + _CONTINUE_MARK + " "}]
    return text


def _cut_at_mark(rendered: str, final_text: str) -> str:
    position = rendered.rfind(_CONTINUE_MARK)
    if position < 0 or not rendered[:position].rstrip().endswith(final_text.strip()):
        raise InvalidInput(
            "continue_final_message cannot be used here: this model's chat template changes or leaves out the last "
            "message's text. Send it as a new turn instead.",
            param="continue_final_message",
        )
    trims = not rendered.startswith(_CONTINUE_MARK + " ", position)
    # A template may show the message more than once; only the last place is the open end.
    kept = rendered[:position].replace(_CONTINUE_MARK + " ", "").replace(_CONTINUE_MARK, "")
    return kept.rstrip() if trims else kept
