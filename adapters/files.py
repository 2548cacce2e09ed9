"""The two files of a PEFT adapter, and how their bytes get into a folder. It knows nothing of what they mean."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..storage.errors import InvalidInput, TooLarge

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)
CHUNK = 1024 * 1024

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
_ARCHIVE_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!")


class Readable(Protocol):
    """What bytes are copied from: a file, a member of an archive, an object in a bucket."""

    def read(self, size: int, /) -> bytes: ...


def write_new(path: Path, source: Readable, *, max_bytes: int, spent: Callable[[int], None] | None = None) -> int:
    """Copy `source` to a file that must not exist yet, and return its size in bytes.

    Raises TooLarge past `max_bytes`. `spent` is told the size of every chunk and may raise to stop the copy.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    total = 0
    with os.fdopen(descriptor, "wb") as target:
        while chunk := source.read(CHUNK):
            total += len(chunk)
            if total > max_bytes:
                raise too_many_bytes(path.name, max_bytes)
            if spent is not None:
                spent(len(chunk))
            target.write(chunk)
    return total


def copy_adapter(source: Path, target: Path) -> None:
    """The two files of an adapter into a folder that exists, and nothing else that lies beside them."""
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)


def too_many_bytes(what: str, max_bytes: int) -> TooLarge:
    """The error for a file or archive past the limit of an adapter."""
    return TooLarge(
        f"{shown(what)} is larger than the {max_bytes} bytes that an adapter may have on this server; lower the rank "
        "or target fewer modules.",
        param="file",
    )


def pickle_name(name: str) -> bool:
    """Whether a file's name says that it holds a pickle."""
    return Path(name).suffix.lower() in PICKLE_SUFFIXES


def pickle_content(head: bytes) -> bool:
    """Whether a file's first bytes are a pickle's (protocol 2 and later) or PyTorch's zip of pickles.

    A safetensors file may begin with the same two bytes as a pickle (a header of 640 bytes does), but has `{` at 8.
    """
    if head[:4] == b"PK\x03\x04":
        return True
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[8:9] != b"{"


def refuse_pickle(name: str) -> InvalidInput:
    """The error for a pickle, which could run code when it is opened."""
    return InvalidInput(
        f"{shown(name)} is a pickle, which can run code when it is opened, so it is not accepted. Save the weights as "
        f"safetensors (PEFT: `model.save_pretrained(folder, safe_serialization=True)`) and send only {CONFIG_NAME} "
        f"and {WEIGHTS_NAME}.",
        param="file",
        code="pickle_refused",
    )


def refuse_harmful(name: str, head: bytes) -> None:
    """Raise InvalidInput if a file that nobody asked for is a pickle or one more archive."""
    if pickle_name(name) or pickle_content(head):
        raise refuse_pickle(name)
    if head.startswith(_ARCHIVE_MAGICS) or head[257:262] == b"ustar":
        raise InvalidInput(
            f"{shown(name)} is an archive inside the archive, which is not opened. Pack {CONFIG_NAME} and "
            f"{WEIGHTS_NAME} themselves.",
            param="file",
        )


def shown(name: str) -> str:
    """A name from outside as a message may hold it: quoted, without control characters, not too long."""
    text = repr(name)
    return text if len(text) <= 160 else f"{text[:120]}...{text[-36:]}"
