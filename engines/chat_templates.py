"""Compiles and runs chat templates, and finds out what a template reads by trying it. It knows no tokenizer.

Templates are Jinja as transformers documents it ("Writing a chat template"), in a sandbox that can change nothing.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..storage.errors import InvalidInput

# Variables that `{% generation %}` prints before and after its output; undefined, as in serving, they print nothing.
GENERATION_START, GENERATION_END = "tuneloop_generation_start", "tuneloop_generation_end"
_PROBE = "\ue0f2probe\ue0f3"


def run_template(source: str, variables: Mapping[str, Any]) -> str:
    """Raises InvalidInput for a template that cannot be compiled or refuses what it is given."""
    template = _compile(source)
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
def marks_generation(source: str) -> bool:
    """Whether the template says by `{% generation %}` blocks what the assistant wrote."""
    return any(name.name == GENERATION_START for name in _parsed(source).find_all(nodes.Name))


@lru_cache(maxsize=64)
def reads_tools(source: str) -> bool:
    """Whether the template shows the tools that a request offers."""
    return "tools" in meta.find_undeclared_variables(_parsed(source))


@lru_cache(maxsize=64)
def reads_tool_calls(source: str) -> bool:
    """Whether the template shows the calls that the assistant made."""
    return "tool_calls" in source


@lru_cache(maxsize=64)
def reads_tool_results(source: str) -> bool:
    """Whether the template has a form of its own for messages of the role `tool`."""
    return '"tool"' in source or "'tool'" in source


@lru_cache(maxsize=64)
def takes_system(source: str) -> bool:
    """Whether the template shows a system message."""

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if wants_parts(source) else text}

    return _shows(source, [message("system", _PROBE), message("user", "x")])


@lru_cache(maxsize=64)
def wants_parts(source: str) -> bool:
    """Whether the template shows a message's text only if it comes as a list of parts, not as a string."""

    def shows(content: object) -> bool:
        return _shows(source, [{"role": "user", "content": content}])

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


@lru_cache(maxsize=64)
def call_form(source: str) -> tuple[bool, bool]:
    """How calls must be given for the template to show them: arguments as JSON text, and content as null.

    Most read objects beside any content; some (DeepSeek's) join text, or skip the calls of messages with content.
    """
    forms: tuple[tuple[bool, bool], ...] = ((False, False), (True, False), (False, True), (True, True))
    return next((form for form in forms if _shows(source, _calling(source, *form))), forms[0])


def _calling(source: str, as_text: bool, null_content: bool) -> list[dict[str, Any]]:
    arguments = {"x": _PROBE}
    function = {"name": "f", "arguments": to_json(arguments) if as_text else arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    asked = [{"type": "text", "text": "x"}] if wants_parts(source) else "x"
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": None if null_content else "", "tool_calls": [call]},
    ]


def _shows(source: str, messages: list[dict[str, Any]]) -> bool:
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "",
        "eos_token": "",
    }
    try:
        return _PROBE in run_template(source, variables)
    except InvalidInput:
        return False


@lru_cache(maxsize=64)
def _compile(source: str) -> Template:
    _parsed(source)
    return _environment().from_string(source)


def _parsed(source: str) -> nodes.Template:
    try:
        return _environment().parse(source)
    except TemplateSyntaxError as error:
        raise InvalidInput(
            f"The chat template is not valid Jinja, line {error.lineno}: {error.message}.", param="chat_template"
        ) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` holds what the assistant wrote; rendering just shows it.

    The body stays in its scope, so that what it sets is seen behind it whether somebody asked for marks or not.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def printed(name: str) -> nodes.Node:
            return nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)

        return [printed(GENERATION_START), *body, printed(GENERATION_END)]


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: Jinja's own escapes HTML, which the models have never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
