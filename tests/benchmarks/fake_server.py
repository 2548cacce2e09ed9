"""Our whole server over the scripted engine: python -m tests.benchmarks.fake_server HOME PORT."""

import sys
from pathlib import Path

from tuneloop.engines.base import Engine
from tuneloop.engines.fake import FakeConfig, FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.server.run import serve
from tuneloop.server.settings import Settings

REPLY = "the quick brown fox jumps over the lazy dog " * 200


def make_engine(_: str, __: Path, tokenizer: ChatTokenizer) -> Engine:
    return FakeEngine(tokenizer, reply=lambda request, index: REPLY, config=FakeConfig(token_seconds=0.001))


def main() -> None:
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    model = write_fake_checkpoint(home / "fake")
    serve(Settings(home=home, port=port, models=(f"fake={model}",), log_level="warning"), engine_factory=make_engine)


if __name__ == "__main__":
    main()
