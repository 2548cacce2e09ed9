"""The facts that `tuneloop doctor` shows, as plain text by name. It prints nothing and changes nothing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from .console import readable_bytes

if TYPE_CHECKING:
    from ..settings import Settings

_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "huggingface-hub", "modelscope", "vllm")
_REACH_SECONDS = 5.0


def machine() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    flags = _cpu_flags()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _cpu_name(),
        "CPU flags": ", ".join(flag for flag in _FLAGS if flag in flags) or "unknown",
        "cores": f"{psutil.cpu_count(logical=False) or '?'} cores, {len(_usable_cpus())} usable threads",
        "memory": f"{readable_bytes(memory.total)}, {readable_bytes(memory.available)} available",
    }


def versions() -> dict[str, str]:
    found = {"tuneloop": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def engine(settings: "Settings") -> dict[str, str]:
    """Imports torch."""
    from ...engines.transformers.kernels import choose_kernel
    from ...engines.transformers.model import choose_device
    from ...storage.errors import InvalidInput

    facts = {"engine": "transformers: " + ("asked for" if settings.engine != "auto" else "the only one built in")}
    facts["accelerators"] = _accelerators()
    try:
        device = choose_device(settings.device)
        facts["device"] = str(device) + (": asked for" if settings.device else ": torch found it")
        for bits in (16, 32):
            facts[f"kernel, {bits} bits"] = choose_kernel(settings.weights, device, bits)[1]
    except InvalidInput as error:
        facts["problem"] = error.message
    facts["threads"] = str(settings.threads) if settings.threads else f"chosen by the worker from {len(_usable_cpus())}"
    return facts


def home(settings: "Settings") -> dict[str, str]:
    folder = settings.home
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = readable_bytes(shutil.disk_usage(existing).free)
    writable = "writable" if os.access(existing, os.W_OK) else "NOT WRITABLE: set TUNELOOP_HOME to another folder"
    from ...engines.sources import DEFAULT_MODEL, find_model

    default = find_model(DEFAULT_MODEL, folder)
    return {
        "folder": f"{folder} ({'exists' if folder.exists() else 'will be made'}, {writable}, {free} free)",
        DEFAULT_MODEL: str(default.path)
        if default
        else "not fetched yet: `tuneloop pull`, or the first `tuneloop serve`",
        "cache of hub": _hub_cache(),
    }


def sources() -> dict[str, str]:
    """Whether the places that models come from answer; asked at once, so that this takes seconds at most."""
    from huggingface_hub import constants

    places = {
        "Hugging Face": constants.ENDPOINT,
        "ModelScope": "https://www.modelscope.cn",
        "package index": _package_index(),
    }
    with ThreadPoolExecutor(len(places)) as threads:
        return dict(zip(places, threads.map(_reach, places.values()), strict=True))


def _reach(url: str) -> str:
    import httpx

    try:
        response = httpx.head(url, timeout=_REACH_SECONDS, follow_redirects=True)
    except httpx.HTTPError as error:
        return f"{url} cannot be reached ({type(error).__name__})"
    return f"{url} answers" if response.status_code < 500 else f"{url} answers with status {response.status_code}"


def _package_index() -> str:
    """The index that this interpreter's pip uses, wherever that is configured."""
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    found = re.findall(r"^\S*\.index-url='(.*)'$", answer.stdout, re.MULTILINE)
    return found[-1] if found else "https://pypi.org/simple"


def _accelerators() -> str:
    from torch import accelerator

    if not accelerator.is_available():
        return "none: torch.accelerator sees no device"
    return f"{accelerator.device_count()} x {accelerator.current_accelerator()}"


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _usable_cpus() -> set[int]:
    """The processors that this process may run on: fewer than the machine has, in a container."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_info() -> dict[str, str]:
    """Linux only; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or "unknown"


def _cpu_flags() -> set[str]:
    info = _cpu_info()
    return set((info.get("flags") or info.get("Features") or "").split())
