"""Archives from strangers: the two files come out, or a TuneloopError says why not; nothing lands outside `dest`."""

import gzip
import io
import os
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuneloop.adapters.archive import MAX_MEMBERS, unpack
from tuneloop.adapters.base import AdapterLimits
from tuneloop.storage.errors import InvalidInput, TooLarge, TuneloopError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMITS = AdapterLimits(max_bytes=32 * 1024**2)
PAIR = [(CONFIG, b"{}"), (WEIGHTS, b"weights")]

Files = Iterable[tuple[str, bytes]]


def make_tar(files: Files, mode: Any = "w:gz", members: Iterable[tarfile.TarInfo] = (), **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info)
    return out.getvalue()


def make_zip(files: Files, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with archive.open(info, "w") as member:  # writestr refuses an empty name
                member.write(content)
    return out.getvalue()


MAKERS: list[Callable[[Files], bytes]] = [make_zip, make_tar, lambda files: make_tar(files, "w")]
both = pytest.mark.parametrize("make", MAKERS, ids=["zip", "tar.gz", "tar"])


def unpacked(tmp_path: Path, content: bytes, limits: AdapterLimits = LIMITS) -> dict[str, bytes]:
    """Unpack with an untold name. Whatever happens, only the two files may appear, and only in `dest`."""
    archive, dest = tmp_path / "upload", tmp_path / "dest"
    archive.write_bytes(content)
    dest.mkdir(exist_ok=True)
    try:
        unpack(archive, dest, limits)
    except TuneloopError:
        assert list(dest.iterdir()) == []
        raise
    finally:
        assert sorted(tmp_path.iterdir()) == [dest, archive]
    assert all(stat.S_ISREG(path.lstat().st_mode) for path in dest.iterdir())
    return {path.name: path.read_bytes() for path in dest.iterdir()}


def refused(tmp_path: Path, content: bytes, message: str, code: str | None = None) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        unpacked(tmp_path, content)
    assert caught.value.param == "file"
    assert code is None or caught.value.code == code


@both
@pytest.mark.parametrize("folder", ["", "support/", "./", "./support/"])
def test_the_two_files_and_nothing_else(tmp_path: Path, make: Any, folder: str) -> None:
    extras = [
        ("README.md", b"# hi"),
        ("tokenizer.json", b"{}"),
        (".gitattributes", b""),
        ("runs/events.out", b"\x18\0"),
    ]
    mac = [(f"__MACOSX/{folder}._{CONFIG}", b"\0\5\x16\7")]
    files = [(folder + name, content) for name, content in [*extras, *PAIR]] + mac
    assert unpacked(tmp_path, make(files)) == dict(PAIR)


def test_folders_long_names_and_formats_of_tar(tmp_path: Path) -> None:
    directory = tarfile.TarInfo("support")
    directory.type = tarfile.DIRTYPE
    long = [(f"support/{'x' * 150}/{'ü' * 60}.txt", b"long")]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = make_tar([("support/" + n, c) for n, c in PAIR] + long, "w", [directory], format=kind)
        assert unpacked(tmp_path, content) == dict(PAIR)
        for path in (tmp_path / "dest").iterdir():
            path.unlink()


def test_content_that_is_larger_than_one_piece(tmp_path: Path) -> None:
    for make in MAKERS:
        content = os.urandom(2_500_001)
        assert unpacked(tmp_path, make([PAIR[0], (WEIGHTS, content)]))[WEIGHTS] == content
        for path in (tmp_path / "dest").iterdir():
            path.unlink()


class TestPaths:
    @both
    @pytest.mark.parametrize(
        "name",
        ["../x", "/etc/x", "a/../../x", "..", f"../{CONFIG}", f"/{WEIGHTS}", "C:/x", "a\\..\\x", "a/..", "x\x07"],
    )
    def test_absolute_climbing_and_foreign_names(self, tmp_path: Path, make: Any, name: str) -> None:
        refused(tmp_path, make([*PAIR, (name, b"x")]), "path|name", "unsafe_archive")

    @both
    def test_a_file_without_a_name(self, tmp_path: Path, make: Any) -> None:
        refused(tmp_path, make([*PAIR, ("", b"x")]), "without a name", "unsafe_archive")

    @both
    def test_duplicates(self, tmp_path: Path, make: Any) -> None:
        with pytest.warns(UserWarning, match="Duplicate name") if make is make_zip else _nothing():
            content = make([*PAIR, (WEIGHTS, b"other")])
        refused(tmp_path, content, "twice", "unsafe_archive")
        refused(tmp_path, make([*PAIR, (f".//{WEIGHTS}", b"other")]), "twice", "unsafe_archive")

    @pytest.mark.parametrize(
        ("kind", "what"),
        [
            (tarfile.SYMTYPE, "symbolic link"),
            (tarfile.LNKTYPE, "hard link"),
            (tarfile.CHRTYPE, "character device"),
            (tarfile.BLKTYPE, "block device"),
            (tarfile.FIFOTYPE, "named pipe"),
            (tarfile.GNUTYPE_SPARSE, "sparse file"),
        ],
    )
    @pytest.mark.parametrize("name", [WEIGHTS, "innocent"])
    def test_links_and_devices_in_tar(self, tmp_path: Path, kind: bytes, what: str, name: str) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        refused(tmp_path, make_tar(PAIR, members=[info]), what, "unsafe_archive")

    @pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
    def test_links_and_devices_in_zip(self, tmp_path: Path, kind: int) -> None:
        info = zipfile.ZipInfo("innocent")
        info.external_attr = (kind | 0o777) << 16
        out = io.BytesIO(make_zip(PAIR))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(info, "/etc/passwd")
        refused(tmp_path, out.getvalue(), "link|device", "unsafe_archive")


class TestPickles:
    @both
    @pytest.mark.parametrize(
        "name", ["adapter_model.bin", "optimizer.pt", "x/weights.PKL", "a.pth", "training_args.bin"]
    )
    def test_by_name(self, tmp_path: Path, make: Any, name: str) -> None:
        refused(tmp_path, make([*PAIR, (name, b"x")]), "pickle.*safetensors", "pickle_refused")

    @both
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_by_content(self, tmp_path: Path, make: Any, protocol: int) -> None:
        refused(tmp_path, make([*PAIR, ("notes.txt", pickle.dumps([1], protocol))]), "pickle", "pickle_refused")

    @both
    def test_archives_inside(self, tmp_path: Path, make: Any) -> None:
        refused(tmp_path, make([*PAIR, ("data", make_zip(PAIR))]), "pickle")  # as torch.save writes
        refused(tmp_path, make([*PAIR, ("data", make_tar(PAIR))]), "archive inside")
        refused(tmp_path, make([*PAIR, ("data", make_tar(PAIR, "w"))]), "archive inside")


class TestWhatIsInside:
    @both
    def test_missing_files(self, tmp_path: Path, make: Any) -> None:
        refused(tmp_path, make([]), f"no {CONFIG}|not an archive")
        refused(tmp_path, make(PAIR[1:]), f"no {CONFIG}", "missing_file")
        refused(tmp_path, make(PAIR[:1]), f"no {WEIGHTS}", "missing_file")
        refused(tmp_path, make([PAIR[0], ("a/" + WEIGHTS, b"")]), f"no {WEIGHTS}", "missing_file")

    @both
    def test_several_or_too_deep(self, tmp_path: Path, make: Any) -> None:
        refused(tmp_path, make([(folder + n, c) for folder in ("", "a/") for n, c in PAIR]), "2 adapters")
        refused(tmp_path, make([(f"a/b/{n}", c) for n, c in PAIR]), "'a/b', too deep")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG" * 200, bytes(1024), b"BZh91AY", b"\xfd7zXZ\0"])
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        refused(tmp_path, content, "not an archive")


class TestBombs:
    @pytest.mark.parametrize("make", MAKERS[:2], ids=["zip", "tar.gz"])
    @pytest.mark.parametrize("name", [WEIGHTS, "innocent.txt"])
    def test_ratio(self, tmp_path: Path, make: Any, name: str) -> None:
        files = [*PAIR[:1], (name, bytes(20 * 1024**2))]
        with pytest.raises(TooLarge, match="200 times") as caught:
            unpacked(tmp_path, make(files))
        assert caught.value.code == "archive_bomb"

    @both
    def test_absolute_size(self, tmp_path: Path, make: Any) -> None:
        with pytest.raises(TooLarge, match="larger than the 5000 bytes"):
            unpacked(tmp_path, make([*PAIR, ("innocent.txt", os.urandom(6000))]), AdapterLimits(max_bytes=5000))

    @both
    def test_many_members(self, tmp_path: Path, make: Any) -> None:
        with pytest.raises(TooLarge, match="members"):
            unpacked(tmp_path, make([*PAIR, *((str(n), b"") for n in range(MAX_MEMBERS))]))

    def test_a_zip_that_lies_about_its_sizes(self, tmp_path: Path) -> None:
        """The claimed size is small; what comes out is not."""
        content = make_zip([PAIR[0], (WEIGHTS, bytes(8 * 1024**2))])
        lying = content.replace((8 * 1024**2).to_bytes(4, "little"), (100).to_bytes(4, "little"))
        assert lying != content
        refused(tmp_path, lying, "cannot be decompressed", "broken_archive")

    def test_a_gzip_of_an_endless_extended_header(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("././@PaxHeader")
        info.type, info.size = tarfile.XHDTYPE, 2**33
        refused(
            tmp_path,
            gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)),
            "extended header has",
            "broken_archive",
        )

    def test_a_table_of_contents_that_fills_the_memory(self, tmp_path: Path) -> None:
        content = make_zip([(f"{n:05}{'x' * 200}", b"") for n in range(20_000)])
        refused(tmp_path, content, "table of contents", "broken_archive")


class TestBroken:
    def test_encrypted_zip(self, tmp_path: Path) -> None:
        content = bytearray(make_zip(PAIR))
        for at in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
            content[at] |= 1
        refused(tmp_path, bytes(content), "encrypted.*without a password")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_methods_of_zip(self, tmp_path: Path, method: int) -> None:
        refused(tmp_path, make_zip(PAIR, method), "method .* not read")

    @both
    def test_cut_off_anywhere(self, tmp_path: Path, make: Any) -> None:
        content = make([PAIR[0], (WEIGHTS, os.urandom(3000))]).rstrip(b"\0")
        for size in range(0, len(content) - 8, 97):
            refused(tmp_path, content[:size], "broken|not an archive")

    def test_checksums(self, tmp_path: Path) -> None:
        weights = os.urandom(3000)
        stored = make_zip([PAIR[0], (WEIGHTS, weights)], zipfile.ZIP_STORED)
        refused(tmp_path, stored.replace(weights[:8], weights[1:9]), "CRC", "broken_archive")
        refused(tmp_path, make_tar(PAIR)[:-8] + bytes(8), "CRC", "broken_archive")
        header = bytearray(make_tar(PAIR, "w"))
        header[0] ^= 1
        refused(tmp_path, bytes(header), "checksum", "broken_archive")

    @pytest.mark.parametrize(
        "headers", [{"path": ""}, {"size": "-5"}, {"size": "x"}, {"size": "9" * 30}, {"GNU.sparse.major": "1"}]
    )
    def test_extended_headers(self, tmp_path: Path, headers: dict[str, str]) -> None:
        info = tarfile.TarInfo("x")
        info.pax_headers = headers
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info)
        refused(tmp_path, out.getvalue(), "broken|sparse|no adapter_config")


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


SEEDS = [make([("a/" + CONFIG, b"{}"), ("a/" + WEIGHTS, bytes(range(256)) * 3), ("b.txt", b"x")]) for make in MAKERS]
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)


def survives(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        files = unpacked(tmp_path_factory.mktemp("fuzz"), content)
    except TuneloopError as error:
        assert error.message.endswith(".")
    else:
        assert set(files) == {CONFIG, WEIGHTS}


@fuzz
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_archives(tmp_path_factory: pytest.TempPathFactory, seed: bytes, data: st.DataObject) -> None:
    content = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    survives(tmp_path_factory, bytes(content[: data.draw(st.integers(0, len(content)))]))


@fuzz
@given(st.sampled_from([b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08", b""]), st.binary(max_size=1500))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, magic: bytes, content: bytes) -> None:
    survives(tmp_path_factory, magic + content)


@fuzz
@given(st.binary(min_size=512, max_size=2048))
def test_random_bytes_in_a_tar(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    survives(tmp_path_factory, content[:257] + b"ustar\0" + content[263:])
    survives(tmp_path_factory, gzip.compress(content))


names = st.lists(st.sampled_from(["..", ".", "", "a", CONFIG, WEIGHTS, "x.bin", "\\", "C:", "é"]), max_size=4).map(
    "/".join
)


@fuzz
@given(st.lists(st.tuples(names, st.binary(max_size=20)), max_size=5), st.sampled_from(MAKERS))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_random_members(tmp_path_factory: pytest.TempPathFactory, files: Files, make: Any) -> None:
    survives(tmp_path_factory, make(files))
