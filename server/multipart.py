"""Receives a multipart upload straight to disk: memory stays at about a megabyte, however large the file.

It knows form fields and files, not what they hold. Starlette's own form parser would spool everything into the system's
temporary folder first, on another file system, and only then hand it over.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..storage.errors import InvalidInput, TooLarge

_MAX_PARTS = 16
_MAX_FIELD_BYTES = 64 * 1024
_WRITE_BYTES = 1024 * 1024  # written at once, in a thread


@dataclass(frozen=True, kw_only=True)
class UploadedFile:
    """`filename` is the last part of what the client called it; the file lies at `path` under a name of ours."""

    field: str
    filename: str
    path: Path


@dataclass(kw_only=True)
class Upload:
    """What came in. Repeated fields are refused, so that no value is dropped in silence."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[UploadedFile] = field(default_factory=list)


async def receive_upload(chunks: AsyncIterator[bytes], content_type: str, folder: Path, *, instead: str = "") -> Upload:
    """Write the files of a multipart body into `folder` (which exists) and return them with the form fields.

    Raises InvalidInput for a body that is no complete multipart form, TooLarge for too many parts or a field over
    64 KiB. The size of the body as a whole is the body limit's business. `instead` tells what else may be sent.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInput(f"The body must be multipart/form-data with a boundary{instead}.")
    receiver = _Receiver(folder)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": receiver.on_part_begin,
                "on_part_data": receiver.on_part_data,
                "on_part_end": receiver.on_part_end,
                "on_header_field": receiver.on_header_field,
                "on_header_value": receiver.on_header_value,
                "on_header_end": receiver.on_header_end,
                "on_headers_finished": receiver.on_headers_finished,
                "on_end": receiver.on_end,
            },
        )
        async for chunk in chunks:
            parser.write(chunk)
            if receiver.pending_bytes >= _WRITE_BYTES:
                await asyncio.to_thread(receiver.flush)
        await asyncio.to_thread(receiver.flush)
        parser.finalize()
    except FormParserError as error:
        raise InvalidInput(f"The multipart body cannot be read: {error}.") from error
    finally:
        receiver.close()
    if not receiver.ended:
        raise InvalidInput("The multipart body ends before its closing boundary. Send it again, whole.")
    return receiver.upload


class _Receiver:
    """The parser's callbacks. They only collect: `flush` does the writing, outside the event loop."""

    def __init__(self, folder: Path) -> None:
        self.upload = Upload()
        self.ended = False
        self.pending_bytes = 0
        self._folder = folder
        self._pending: list[tuple[IO[bytes], bytes]] = []
        self._open = ExitStack()
        self._parts = 0
        self._reset()

    def _reset(self) -> None:
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._text = bytearray()
        self._file: IO[bytes] | None = None

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise TooLarge(
                f"The form has more than {_MAX_PARTS} parts. Send the files and the fields of this call only."
            )
        self._reset()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidInput("A part of the form has no name. Send Content-Disposition with `name`.")
        self._name = _text(options[b"name"])
        if b"filename" not in options:
            return
        filename = PurePath(PureWindowsPath(_text(options[b"filename"])).name).name
        path = self._folder / f"part-{self._parts}"
        self._file = self._open.enter_context(path.open("xb"))
        self.upload.files.append(UploadedFile(field=self._name, filename=filename, path=path))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._pending.append((self._file, data[start:end]))
            self.pending_bytes += end - start
            return
        if len(self._text) + end - start > _MAX_FIELD_BYTES:
            raise TooLarge(f"The form field is larger than {_MAX_FIELD_BYTES} bytes.", param=self._name)
        self._text += data[start:end]

    def on_part_end(self) -> None:
        if self._file is not None:
            return
        if self._name in self.upload.fields:
            raise InvalidInput(f"The form field '{self._name}' is given twice. Give it once.", param=self._name)
        self.upload.fields[self._name] = _text(bytes(self._text)).strip()

    def on_end(self) -> None:
        self.ended = True

    def flush(self) -> None:
        """Write what has come since the last time. Blocking."""
        for handle, data in self._pending:
            handle.write(data)
        self._pending.clear()
        self.pending_bytes = 0

    def close(self) -> None:
        self._open.close()


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("A name or value of the form is not UTF-8 text.") from error
