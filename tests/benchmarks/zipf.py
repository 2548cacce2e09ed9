"""Many registered adapters, requests drawn from them by Zipf's law: throughput against base only, and memory."""

import random
import time

from .load import chats, run_load
from .report import Report
from .servers import tuneloop
from .setting import Setting
from .throughput import register

CONCURRENCY = 32
REQUESTS = 192
EXPONENT = 1.0


async def run(setting: Setting, report: Report) -> object:
    names = list(setting.adapters(setting.many, "zipf", everything=False))
    draw = random.Random(11)
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(len(names))]
    chosen = draw.choices(names, weights, k=REQUESTS)
    with tuneloop(setting.fresh_home("zipf"), setting.scratch / "zipf.log", roots=setting.scratch) as server:
        began = time.perf_counter()
        register(server, {name: setting.scratch / "adapters" / name for name in names})
        registered = time.perf_counter() - began
        await run_load(server.url, chats(CONCURRENCY, seed=1, model=lambda _: "smollm2-135m"), CONCURRENCY)
        before = server.resident_bytes
        base = await run_load(server.url, chats(REQUESTS, seed=2, model=lambda _: "smollm2-135m"), CONCURRENCY)
        zipf = await run_load(server.url, chats(REQUESTS, seed=3, model=lambda n: chosen[n]), CONCURRENCY)
        again = await run_load(server.url, chats(REQUESTS, seed=4, model=lambda n: chosen[-n]), CONCURRENCY)
        after = server.resident_bytes
    ratios = [x.tokens_per_second / base.tokens_per_second for x in (zipf, again)]
    report.table(
        f"{len(names)} adapters (rank 8, q and v), {REQUESTS} requests to {len(set(chosen))} of them, c={CONCURRENCY}",
        ["load", "tok/s", "/ base only", "first token s", "GiB resident"],
        [
            ["base only", f"{base.tokens_per_second:.1f}", "1.00", f"{base.first_token:.2f}", f"{before / 2**30:.2f}"],
            ["zipf, cold", f"{zipf.tokens_per_second:.1f}", f"{ratios[0]:.2f}", f"{zipf.first_token:.2f}", ""],
            [
                "zipf, again",
                f"{again.tokens_per_second:.1f}",
                f"{ratios[1]:.2f}",
                f"{again.first_token:.2f}",
                f"{after / 2**30:.2f}",
            ],
        ],
    )
    report.say(f"registered {len(names)} adapters in {registered:.1f} s ({1000 * registered / len(names):.0f} ms each)")
    return {"ratios": ratios, "resident_bytes": [before, after], "register_seconds": registered, "base": vars(base)}
