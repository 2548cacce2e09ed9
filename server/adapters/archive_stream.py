"""Turns an adapter's folder into a tar.gz while it is being sent: nothing is written, memory stays small."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")
_READ_BYTES = 1024 * 1024
_GZIP = 31  # zlib's word for a gzip header and trailer
_LEVEL = 1  # weights hardly compress


def tar_gz(folder: Path, modified_at: int) -> Iterator[bytes]:
    """The two PEFT files of a folder as a gzipped tar. Blocking: to be iterated in a thread.

    Both files are opened at once, so that deleting the version meanwhile cannot cut the download.
    """
    handles = [(name, (folder / name).open("rb")) for name in FILES]
    try:
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        for name, handle in handles:
            info = tarfile.TarInfo(name)
            info.size = os.fstat(handle.fileno()).st_size
            info.mtime = modified_at
            yield packer.compress(info.tobuf(tarfile.PAX_FORMAT))
            while data := handle.read(_READ_BYTES):
                yield packer.compress(data)
            yield packer.compress(bytes(-info.size % tarfile.BLOCKSIZE))
        yield packer.compress(bytes(2 * tarfile.BLOCKSIZE))
        yield packer.flush()
    finally:
        for _, handle in handles:
            handle.close()
