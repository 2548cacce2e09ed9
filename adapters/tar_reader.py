"""Reads a tar stream member by member, strictly, forwards only, in bounded memory. It extracts nothing itself.

Formats: ustar, PAX and GNU long names (https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html). The
standard library's reader keeps whole PAX headers in memory, however large, which is not for strangers' files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..storage.errors import InvalidInput
from .files import CHUNK, Readable, shown

BLOCK = 512
_MAX_EXTENSION = 64 * 1024  # bytes of one PAX header or long name
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_FORBIDDEN = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


@dataclass(kw_only=True)
class TarMember:
    """A directory or a plain file; `read` gives the file's bytes until the next member is asked for."""

    name: str
    is_directory: bool
    size: int
    _source: Readable
    _left: int

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, empty at the end. Raises InvalidInput when the archive ends inside the file."""
        if not self._left or size <= 0:
            return b""
        data = self._source.read(min(size, self._left, CHUNK))
        if not data:
            raise cut_off()
        self._left -= len(data)
        return data


def read_tar(source: Readable) -> Iterator[TarMember]:
    """The members in order. Raises InvalidInput for links, devices, sparse files and broken archives."""
    extended: dict[str, str] = {}
    while (header := _exactly(source, BLOCK)) != bytes(BLOCK):
        _verify_checksum(header)
        kind, size = header[156:157], _number(header[124:136])
        if kind in (b"x", b"g", b"L", b"K"):
            extended |= _extension(kind, source, size)
            continue
        name = extended.get("path") or _name(header)
        if kind in _FORBIDDEN or any(key.startswith("GNU.sparse") for key in extended):
            raise InvalidInput(
                f"The archive holds {shown(name)}, {_FORBIDDEN.get(kind, 'a sparse file')}. Pack plain files only.",
                param="file",
                code="unsafe_archive",
            )
        if kind not in _REGULAR and kind != _DIRECTORY:
            raise broken(f"{shown(name)} has the unknown type {kind!r}")
        if "size" in extended:
            size = _decimal(extended["size"])
        is_directory = kind == _DIRECTORY or name.endswith("/")
        if is_directory and size:
            raise broken(f"the directory {shown(name)} has contents")
        member = TarMember(name=name, is_directory=is_directory, size=size, _source=source, _left=size)
        yield member
        while member.read(CHUNK):
            pass
        _exactly(source, -size % BLOCK)
        extended = {}


def _exactly(source: Readable, size: int) -> bytes:
    parts = []
    while size > 0:
        part = source.read(size)
        if not part:
            raise cut_off()
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _verify_checksum(header: bytes) -> None:
    if sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != _number(header[148:156]):
        raise broken("a header's checksum is wrong")


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise broken("a header holds a negative or absurd number")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise broken("a header holds a number that is not octal")
    return int(digits or b"0", 8)


def _extension(kind: bytes, source: Readable, size: int) -> dict[str, str]:
    """What a PAX header or GNU long name says about the next member. Link targets and global headers are skipped."""
    if size > _MAX_EXTENSION:
        raise broken(f"an extended header has {size} bytes")
    data = _exactly(source, size)
    _exactly(source, -size % BLOCK)
    if kind == b"L":
        return {"path": _text(data.rstrip(b"\0"))}
    records = _pax_records(data) if kind in (b"x", b"g") else {}
    if kind == b"g" and records.keys() & {"path", "size"}:
        raise broken("a global header gives every member the same name or size")
    return records if kind == b"x" else {}


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = _decimal(_text(digits))
        record = data[len(digits) + 1 : length]
        if not space or length > len(data) or not record.endswith(b"\n"):
            raise broken("an extended header is malformed")
        key, equals, value = record[:-1].partition(b"=")
        if not equals:
            raise broken("an extended header is malformed")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            records[_text(key)] = _text(value)
        data = data[length:]
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise broken("an extended header holds something that is not a number")
    return int(text)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise broken("a name is not UTF-8") from error


def cut_off() -> InvalidInput:
    """The error for an archive that ends too early."""
    return broken("it ends too early: it was cut off")


def broken(why: str) -> InvalidInput:
    """The error for an archive that cannot be read."""
    return InvalidInput(
        f"The archive is broken: {why}. Pack the adapter again as zip or tar.gz and send the whole file.",
        param="file",
        code="broken_archive",
    )
