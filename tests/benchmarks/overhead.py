"""How many streamed tokens a second one server process carries: our HTTP path over the scripted engine, no model."""

import sys
from pathlib import Path

from .load import chats, run_load
from .report import Report
from .servers import free_port, running
from .setting import Setting

STREAMS = 64
TOKENS = 1000


async def run(setting: Setting, report: Report) -> object:
    home = setting.scratch / "overhead"
    home.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.fake_server", str(home), str(port)]
    log: Path = setting.scratch / "overhead.log"
    with running(command, {}, port, "/ready", log) as server:
        bodies = chats(STREAMS, seed=6, model=lambda _: "fake", max_tokens=TOKENS)
        await run_load(server.url, bodies, STREAMS)
        cpu = server.process.cpu_times()
        load = await run_load(server.url, bodies, STREAMS)
        used = server.process.cpu_times()
    seconds = used.user + used.system - cpu.user - cpu.system
    report.say(
        f"{STREAMS} streams of {TOKENS} tokens: {load.tokens_per_second:,.0f} tok/s carried by one server process, "
        f"{1e6 * seconds / load.tokens:.1f} us of its CPU a token (the client runs on the same machine)"
    )
    return {"tokens_per_second": load.tokens_per_second, "cpu_us_per_token": 1e6 * seconds / load.tokens}
