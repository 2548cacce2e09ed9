"""`tuneloop chat`: a conversation in the terminal, streamed from a running server."""

import sys
from typing import Annotated, Any

import typer

from .client import DEFAULT_URL, Client, Key, Url, path_of
from .console import CliError, console, say

_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it."


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Ask this, print the answer and end.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model or adapter.", show_default="the server's first")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the server's")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", show_default="the server's")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Chat with a model or an adapter. Without MESSAGE: a conversation, or one question from stdin."""
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    with Client(url, api_key) as client:
        talk = Conversation(client, model or _first_model(client), system, options)
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read().strip()
        if message:
            talk.ask(message)
        else:
            _converse(talk)


class Conversation:
    """Messages so far; `ask` adds a question and its streamed answer."""

    def __init__(self, client: Client, model: str, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self._client = client
        self._system = [{"role": "system", "content": system}] if system else []
        self._options = options
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        self._messages = []

    def ask(self, text: str) -> None:
        """Print the answer as it comes. A question whose answer failed is forgotten, one that was cut is kept."""
        asked = [*self._messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": [*self._system, *asked], "stream": True, **self._options}
        answer = ""
        try:
            for event in self._client.stream_events(path_of("chat", "completions"), body):
                for choice in event.get("choices", ()):
                    piece = choice.get("delta", {}).get("content") or ""
                    answer += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            say(" (stopped)")  # closing the stream stops the server's work too
        sys.stdout.write("\n")
        self._messages = [*asked, {"role": "assistant", "content": answer}]


def _first_model(client: Client) -> str:
    models = client.call("GET", path_of("models"))["data"]
    if not models:
        raise CliError("The server has no models. Load one with `tuneloop models load`.")
    ready = (card for card in models if (card.get("status") or {}).get("state") == "ready")
    return str(next(ready, models[0])["id"])


def _converse(talk: Conversation) -> None:
    say(f"Chatting with {talk.model}. {_HELP}")
    while True:
        try:
            text = console(stderr=True).input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            talk.clear()
        elif text:
            try:
                talk.ask(text)
            except CliError as error:
                say(f"Error: {error}")
