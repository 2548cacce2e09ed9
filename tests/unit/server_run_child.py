"""Runs the real server process with a slow fake engine: `server_run_child.py CHECKPOINT HOME PORT GRACE_SECONDS`."""

import sys
from pathlib import Path

from tuneloop.engines.fake import FakeConfig, FakeEngine
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.server.run import serve
from tuneloop.server.settings import Settings


def build(name: str, path: Path, tokenizer: ChatTokenizer) -> FakeEngine:
    reply = "Hello " * 100 + "the end"
    return FakeEngine(tokenizer, reply=reply, config=FakeConfig(token_seconds=0.02))


def main() -> None:
    checkpoint, home, port, grace_seconds = sys.argv[1:]
    settings = Settings(
        home=Path(home),
        port=int(port),
        models=(f"tiny={checkpoint}",),
        grace_seconds=float(grace_seconds),
        log_format="json",
    )
    serve(settings, engine_factory=build)


if __name__ == "__main__":
    main()
