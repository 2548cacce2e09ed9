"""A file's bytes as a response, whole or in part. It knows ranges of bytes, not who may read what."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from ...storage.files import FileStore, StoredFile

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


async def content(files: FileStore, file: StoredFile, headers: Mapping[str, str]) -> StreamingResponse:
    """The answer to a request with these headers. A file that is deleted from here on is still sent to its end.

    Raises NotFound if it is gone already, HTTPException (416) for a range that lies outside it.
    """
    etag = f'"{file.digest}"'
    wanted = headers.get("range") if headers.get("if-range", etag) == etag else None
    part = None if wanted is None else _part(wanted, file.size_bytes)
    start, end = part or (0, file.size_bytes)
    stream = files.open(file, offset=start)
    first = await anext(stream, b"")  # opens it: what fails up to here has a status
    answer = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "Content-Length": str(end - start),
        "ETag": etag,
    }
    if part is not None:
        answer["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
    return StreamingResponse(
        _cut(first, stream, end - start),
        status_code=200 if part is None else 206,
        media_type="application/octet-stream",
        headers=answer,
    )


def _part(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None for what we need not understand (several ranges, other units)."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None  # RFC 9110 calls it invalid, so it counts as not sent
    if start >= size:
        raise HTTPException(
            416,
            f"The range '{header}' lies outside the file, which has {size} bytes.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


async def _cut(first: bytes, rest: AsyncGenerator[bytes], length: int) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        chunk = first
        while chunk and length > 0:
            yield chunk[:length]
            length -= len(chunk)
            chunk = await anext(rest, b"")
