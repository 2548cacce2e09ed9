"""Talks to a running server over HTTP. Whatever goes wrong becomes one clear line (CliError)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Self
from urllib.parse import quote

import typer

from .console import CliError

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="TUNELOOP_URL", help="Base URL of the server.")]
Key = Annotated[
    str | None,
    typer.Option("--api-key", envvar="TUNELOOP_API_KEY", help="API key.", show_envvar=True, show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]

# Loading a model or an adapter may take minutes; connecting may not.
_CONNECT_SECONDS = 5.0


class Disconnected(CliError):
    """The server is not there, or not any more; the same again may work later."""


class Client:
    """A context manager around one connection pool."""

    def __init__(self, url: str, api_key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON answer. `options` are httpx's (`json`, `params`, `data`, `files`)."""
        with self._explained():
            response = self._http.request(method, path, **options)
        if response.is_error:
            raise CliError(_message(response.status_code, response.content))
        try:
            return response.json()
        except ValueError as error:
            raise CliError(f"{self.url} answered {path} with something that is no JSON. Is it Tuneloop?") from error

    def stream_bytes(self, path: str, **options: Any) -> Iterator[bytes]:
        """The body of a download, in pieces."""
        with self._explained(), self._http.stream("GET", path, **options) as response:
            if response.is_error:
                raise CliError(_message(response.status_code, response.read()))
            yield from response.iter_bytes()

    def stream_events(
        self, path: str, body: dict[str, Any] | None = None, *, params: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The `data:` objects of a server-sent event stream, until `[DONE]`; a GET without a body.

        An error event ends it as CliError, a connection that breaks or a stream that is cut as Disconnected.
        """
        method = "GET" if body is None else "POST"
        with self._explained(), self._http.stream(method, path, json=body, params=params) as response:
            if response.is_error:
                raise CliError(_message(response.status_code, response.read()))
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise CliError(str(event["error"].get("message", event["error"])))
                yield event
        raise Disconnected("The server ended the answer before it was complete.")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise Disconnected(
                f"No server answers at {self.url}. Start one with `tuneloop serve`, or name another with --url."
            ) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise CliError(f"--url {self.url} is no base URL; write one as {DEFAULT_URL}.") from error
        except httpx.HTTPError as error:
            raise Disconnected(f"The connection to {self.url} failed: {error or type(error).__name__}.") from error


def path_of(*parts: str) -> str:
    """A path below /v1 whose parts may hold any character; slashes of names stay as they are."""
    return "/v1/" + "/".join(quote(part, safe="/:@") for part in parts)


def _message(status: int, content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered with status {status} and no reason."
