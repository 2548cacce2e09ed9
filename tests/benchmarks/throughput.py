"""Output tokens a second and time to first token at concurrency 1, 8 and 32, base and 8 mixed adapters, against peers.

Each runs alone: vLLM, then ours with float32 weights, as it comes (fp16-stored weights, float32 maths), and in int8.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .load import Load, chats, run_load
from .report import Report
from .servers import Running, tuneloop, vllm
from .setting import Setting

CONCURRENCY = (1, 8, 32)
REQUESTS = {1: 4, 8: 16, 32: 32}
ADAPTERS = 8
Figures = dict[str, Load]


async def measure(server: Running, report: Report, label: str) -> Figures:
    """All loads of one server, after a warm-up, by "base c=8" and "adapters c=8"."""
    figures: Figures = {}
    for kind in ("base", "adapters"):
        names = ["smollm2-135m"] if kind == "base" else [f"adapter{i}" for i in range(ADAPTERS)]
        model = lambda n, names=names: names[n % len(names)]  # noqa: E731
        await run_load(server.url, chats(ADAPTERS, seed=1, model=model, max_tokens=4), ADAPTERS)
        for concurrency in CONCURRENCY:
            bodies = chats(REQUESTS[concurrency], seed=10 + concurrency, model=model)
            load = await run_load(server.url, bodies, concurrency)
            assert load.tokens == 64 * len(bodies), f"{label} ended {len(bodies)} streams after {load.tokens} tokens"
            figures[f"{kind} c={concurrency}"] = load
            report.say(
                f"{label:22} {kind:9} c={concurrency:<3} {load.tokens_per_second:7.1f} tok/s, "
                f"first token {load.first_token:6.3f} s"
            )
    return figures


async def run(setting: Setting, report: Report) -> object:
    adapters = setting.adapters(ADAPTERS, "adapter")
    results: dict[str, Figures] = {}
    starts: dict[str, float] = {}
    memory: dict[str, int] = {}
    if setting.peer is not None:
        with vllm(setting.peer, setting.model, setting.scratch / "vllm.log", adapters) as server:
            starts["vLLM float32"] = server.start_seconds
            results["vLLM float32"] = await measure(server, report, "vLLM float32")
            memory["vLLM float32"] = server.resident_bytes
    for label, weights in (("ours float32", "float32"), ("ours", "auto"), ("ours int8", "int8")):
        home = setting.fresh_home(f"throughput-{weights}")
        with tuneloop(home, setting.scratch / f"{weights}.log", roots=setting.scratch, weights=weights) as server:
            starts[label] = server.start_seconds
            register(server, adapters)
            results[label] = await measure(server, report, label)
            memory[label] = server.resident_bytes
    generate = {rows: _generate(setting.model, rows) for rows in CONCURRENCY}
    _tables(report, results, generate)
    report.table(
        "start to ready, memory of all its processes at the end",
        ["server", "start s", "GiB"],
        [[name, f"{starts[name]:.1f}", f"{memory[name] / 2**30:.2f}"] for name in starts],
    )
    return {
        "servers": {n: {k: vars(v) for k, v in f.items()} for n, f in results.items()},
        "generate": generate,
        "start_seconds": starts,
        "resident_bytes": memory,
    }


def register(server: Running, adapters: Mapping[str, Path]) -> None:
    """Register adapters by path."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=120) as client:
        for name, path in adapters.items():
            body = {"name": name, "base": "smollm2-135m", "source": str(path)}
            client.post("/v1/adapters", json=body).raise_for_status()


def _generate(model: Path, rows: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.generate", str(model), str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figure: float = json.loads(done.stdout)["tokens_per_second"]
    return figure


def _tables(report: Report, results: Mapping[str, Figures], generate: Mapping[int, float]) -> None:
    peer = results.get("vLLM float32")
    columns = ["load", *results, *(f"{n} / vLLM" for n in results if peer and n != "vLLM float32")]
    keys = list(results["ours"])
    measures: list[tuple[str, Callable[[Load], float], bool]] = [
        ("output tokens/s", lambda x: x.tokens_per_second, True),
        ("median time to first token, s", lambda x: x.first_token, False),
    ]
    for title, value, higher in measures:
        rows = []
        for key in keys:
            row = [key, *(f"{value(f[key]):.{1 if higher else 3}f}" for f in results.values())]
            if peer:
                row += [f"{value(f[key]) / value(peer[key]):.2f}x" for n, f in results.items() if n != "vLLM float32"]
            rows.append(row)
        report.table(title, columns, rows)
    ours = [name for name in results if name != "vLLM float32"]
    report.table(
        "against transformers' generate(), one batch of that many rows, float32",
        ["rows", "generate() tok/s", *(f"{n} / generate()" for n in ours)],
        [
            [
                str(c),
                f"{generate[c]:.1f}",
                *(f"{results[n][f'base c={c}'].tokens_per_second / generate[c]:.2f}x" for n in ours),
            ]
            for c in CONCURRENCY
        ],
    )
    report.table(
        "8 mixed adapters against base only",
        ["server", *(f"c={c}" for c in CONCURRENCY)],
        [
            [
                n,
                *(
                    f"{f[f'adapters c={c}'].tokens_per_second / f[f'base c={c}'].tokens_per_second:.2f}"
                    for c in CONCURRENCY
                ),
            ]
            for n, f in results.items()
        ],
    )
