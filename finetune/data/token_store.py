"""Keeps token sequences in a folder where any process maps them into memory. It knows ids, no text and no recipe.

    ids.bin         int32, all sequences one behind another
    supervised.bin  one byte a token: whether the model is to learn to produce it
    offsets.npy     int64 [n + 1]: where each sequence begins, and the end
    store.json      the digest of the three, and notes of whoever made the store

A folder is complete or absent, and never changes: hard links of its files may be shared between runs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.durable import sync_file
from ...storage.errors import InvalidInput
from ...storage.staging import staged
from .base import TokenSequence

_FILES = ("ids.bin", "supervised.bin", "offsets.npy", "store.json")
_FLUSH_TOKENS = 1 << 20


class TokenStore:
    """An open store: numpy arrays over the mapped files. Open it with `open`, make it with `write`."""

    def __init__(self, folder: Path, ids: NDArray[np.int32], supervised: NDArray[np.bool_], offsets: NDArray[np.int64]):
        self.folder = folder
        about = json.loads((folder / "store.json").read_bytes())
        self.digest: str = about["digest"]
        self.notes: Mapping[str, Any] = about["notes"]
        self.lengths: NDArray[np.int64] = np.diff(offsets)
        self._ids = ids
        self._supervised = supervised
        self._offsets = offsets

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Raises InvalidInput if the folder holds no store."""
        try:
            offsets = np.load(folder / "offsets.npy")
            ids = _mapped(folder / "ids.bin", np.dtype(np.int32))
            supervised = _mapped(folder / "supervised.bin", np.dtype(np.bool_))
        except (FileNotFoundError, ValueError) as error:
            raise InvalidInput(f"{folder} holds no tokenised data ({error}); prepare the run again.") from error
        if not len(ids) == len(supervised) == offsets[-1]:
            raise InvalidInput(f"{folder} holds files of different data; delete it and prepare the run again.")
        return cls(folder, ids, supervised, offsets)

    @classmethod
    def write(
        cls,
        folder: Path,
        sequences: Iterable[TokenSequence],
        *,
        notes: Callable[[], Mapping[str, Any]] = dict,
    ) -> "TokenStore":
        """Write all sequences into the new folder, durably. If another process has made it meanwhile, that one stays.

        `notes` is called after the last sequence; what it gives (JSON) is kept with the store. Raises StorageFull;
        whatever is raised, by `sequences` too, nothing is left behind.
        """
        with staged(folder) as aside:
            _write_files(aside, sequences, notes)
        return cls.open(folder)

    def link_to(self, folder: Path) -> "TokenStore":
        """The same store in another folder, by hard links where the file system has them, else by copies."""
        with staged(folder) as aside:
            for name in _FILES:
                _link(self.folder / name, aside / name)
        return TokenStore.open(folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, i: int) -> NDArray[np.int32]:
        """The token ids of sequence `i`."""
        return self._ids[self._offsets[i] : self._offsets[i + 1]]

    def supervised(self, i: int) -> NDArray[np.bool_]:
        """For each token of sequence `i`, whether the model is to learn to produce it."""
        return self._supervised[self._offsets[i] : self._offsets[i + 1]]


def _write_files(folder: Path, sequences: Iterable[TokenSequence], notes: Callable[[], Mapping[str, Any]]) -> None:
    lengths: list[int] = []
    digests = {"ids.bin": hashlib.sha256(), "supervised.bin": hashlib.sha256()}
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "supervised.bin").open("wb") as supervised_file:
        ids: list[int] = []
        supervised: list[bool] = []

        def flush() -> None:
            for file, name, data in (
                (ids_file, "ids.bin", np.asarray(ids, np.int32).tobytes()),
                (supervised_file, "supervised.bin", np.asarray(supervised, np.bool_).tobytes()),
            ):
                file.write(data)
                digests[name].update(data)
            ids.clear()
            supervised.clear()

        for sequence in sequences:
            lengths.append(len(sequence.ids))
            ids.extend(sequence.ids)
            supervised.extend(sequence.supervised)
            if len(ids) >= _FLUSH_TOKENS:
                flush()
        flush()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)])
    np.save(folder / "offsets.npy", offsets)
    whole = hashlib.sha256(offsets.tobytes())
    for digest in digests.values():
        whole.update(digest.digest())
    about = {"digest": whole.hexdigest(), "notes": notes()}
    (folder / "store.json").write_text(json.dumps(about), encoding="utf-8")
    for name in _FILES:
        sync_file(folder / name)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _link(source: Path, dest: Path) -> None:
    try:
        os.link(source, dest)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, dest)
        sync_file(dest)
