"""Turns a conversation into the token ids of a prompt, by the checkpoint's own chat template.

Serving and training both call `render_chat`, so that what was trained is what is served. It knows nothing of HTTP,
of engines, or of how a template's model was trained.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..storage.errors import InvalidInput

Message = Mapping[str, Any]  # role, content (text, or a list of {"type": "text", "text": ...}), and what templates know

# Stands behind the final message's text while the template renders, to find where the text ends. Private-use
# characters: no template strips or splits them, and the space after them shows whether the template trims.
_CONTINUE_MARK = "\ue0f0tuneloop\ue0f1"
_PROBE = "\ue0f2probe\ue0f3"


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
    conversation = [_fit(message, source) for message in messages]
    final_text = ""
    if continue_final_message:
        final_text = _mark_final_message(conversation)
    rendered = _run(
        _compile(source),
        {
            **tokenizer.special_tokens,
            **(template_kwargs or {}),
            "messages": conversation,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut_at_mark(rendered, final_text) if continue_final_message else rendered


def _fit(message: Message, source: str) -> dict[str, Any]:
    """A copy of the message in the form that this template reads."""
    fitted = copy.deepcopy(dict(message))
    if fitted.get("role") == "developer" and "developer" not in source:
        fitted["role"] = "system"
    content = fitted.get("content")
    if _wants_parts(source):
        if isinstance(content, str):
            fitted["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        fitted["content"] = "\n".join(part["text"] for part in content)
    elif content is None:
        fitted["content"] = ""
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
    content[-1]["text"] = text + _CONTINUE_MARK + " "
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


def _run(template: Template, variables: Mapping[str, Any]) -> str:
    try:
        return template.render(variables)
    except TemplateError as error:
        raise InvalidInput(
            f"The chat template refuses this conversation: {error.message or type(error).__name__}.".replace("..", "."),
            param="messages",
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise InvalidInput(
            f"The chat template cannot render this conversation ({type(error).__name__}: {error}); "
            "check the roles and the content of its messages.",
            param="messages",
        ) from error


@lru_cache(maxsize=64)
def _wants_parts(source: str) -> bool:
    """Whether the template shows a message's text only if it comes as a list of parts, not as a string."""
    return not _shows(source, _PROBE) and _shows(source, [{"type": "text", "text": _PROBE}])


def _shows(source: str, content: object) -> bool:
    variables = {
        "messages": [{"role": "user", "content": content}],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "",
        "eos_token": "",
    }
    try:
        return _PROBE in _run(_compile(source), variables)
    except InvalidInput:
        return False


@lru_cache(maxsize=64)
def _compile(source: str) -> Template:
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise InvalidInput(
            f"The chat template is not valid Jinja, line {error.lineno}: {error.message}.", param="chat_template"
        ) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect of their surroundings, as transformers documents it ("Writing a chat template")."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; rendering just shows it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which the models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
