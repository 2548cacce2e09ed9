"""From an upload of a rank-8 adapter to its first token, and an in-place replacement, beside vLLM's load by path."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from .load import chats, stream_chat
from .report import Report
from .servers import Running, tuneloop, vllm
from .setting import Setting

ROUNDS = 7
FILES = ("adapter_config.json", "adapter_model.safetensors")


async def run(setting: Setting, report: Report) -> object:
    adapters = setting.adapters(2 * ROUNDS, "upload")
    folders = list(adapters.values())
    figures: dict[str, list[float]] = {}
    with tuneloop(setting.fresh_home("upload"), setting.scratch / "upload.log", roots=setting.scratch) as server:
        await stream_chat(server.url, _body("smollm2-135m"))
        figures["ours: upload of two files"] = [
            await _ours(server, "POST", f"fresh{n}", folder) for n, folder in enumerate(folders[:ROUNDS])
        ]
        figures["ours: replacement in place"] = [
            await _ours(server, "PUT", "fresh0", folder) for folder in folders[ROUNDS:]
        ]
    if setting.peer is not None:
        with vllm(setting.peer, setting.model, setting.scratch / "vllm-upload.log", {}) as server:
            await stream_chat(server.url, _body("smollm2-135m"))
            figures["vLLM: load_lora_adapter by path"] = [
                await _theirs(server, f"fresh{n}", folder) for n, folder in enumerate(folders[:ROUNDS])
            ]
    base = median(figures["vLLM: load_lora_adapter by path"]) if setting.peer is not None else None
    report.table(
        f"seconds to the new adapter's first token, median of {ROUNDS} (no other load)",
        ["way", "median", "least", "most", "/ vLLM"],
        [
            [
                way,
                *(f"{f(times):.3f}" for f in (median, min, max)),
                "" if base is None else f"{median(times) / base:.2f}x",
            ]
            for way, times in figures.items()
        ],
    )
    return figures


def _body(model: str) -> dict[str, Any]:
    return chats(1, seed=5, model=lambda _: model, max_tokens=1)[0]


async def _ours(server: Running, method: str, name: str, folder: Path) -> float:
    files = [("file", (f, (folder / f).read_bytes())) for f in FILES]
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        if method == "POST":
            answer = await client.post("/v1/adapters", data={"name": name, "base": "smollm2-135m"}, files=files)
        else:
            answer = await client.put(f"/v1/adapters/{name}", files=files)
        answer.raise_for_status()
    await stream_chat(server.url, _body(name))
    return time.perf_counter() - began


async def _theirs(server: Running, name: str, folder: Path) -> float:
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        body = {"lora_name": name, "lora_path": str(folder)}
        (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()
    await stream_chat(server.url, _body(name))
    return time.perf_counter() - began
