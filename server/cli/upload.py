"""Packs a local adapter for an upload: a PEFT folder becomes a tar.gz of its two files, an archive goes as it is."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .console import CliError

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextmanager
def packed(source: Path) -> Iterator[Path]:
    """The archive to send; it lives as long as the block. Raises CliError for a folder that is no adapter."""
    if source.is_file():
        yield source
        return
    missing = [name for name in _FILES if not (source / name).is_file()]
    if missing:
        raise CliError(
            f"{source} is no adapter: it has no {' and no '.join(missing)}. Point to the folder that PEFT's "
            "save_pretrained() wrote; weights must be safetensors."
        )
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        archive = Path(folder) / "adapter.tar.gz"
        # Weights hardly compress; level 1 is for the configuration and the reader's sake.
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for name in _FILES:
                tar.add(source / name, arcname=name)
        yield archive
