"""Archives that never come to an end, or to a member: that is found in their first megabytes."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Mapping

import pytest
from enclos.runtime.images import tar
from enclos.runtime.images.merge import Merge
from enclos.runtime.images.order import Limits
from enclos.runtime.images.rules import TooLarge
from enclos.runtime.images.tar import BLOCK, BadArchive, Reader

FEW = 4 << 20  # Bytes in which all of these are found out.


def header(kind: bytes, data: bytes = b"", *, size: int | None = None, name: str = "f") -> bytes:
    """A member as its blocks; one that says that it has `size` bytes may have others."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n"
    length = next(n for n in range(len(rest), len(rest) + 10) if n == len(rest) + len(str(n)))
    return f"{length}{rest}".encode()


class Stream:
    """An archive in pieces, perhaps without end; `taken` is how much of it was asked for."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._rest = b""
        self.taken = 0

    def read(self, count: int) -> bytes:
        assert self.taken < FEW, "it reads on and on"
        self._rest = self._rest or next(self._pieces, b"")
        data, self._rest = self._rest[:count], self._rest[count:]
        self.taken += len(data)
        return data


COMMENT = record("comment", "nothing")
SPARSE = record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.realsize", "0")
GNU_SPARSE = bytearray(header(b"S", size=0))
GNU_SPARSE[386:482] = (b"00000000000\0" * 2) * 4
GNU_SPARSE[482] = 1
GNU_SPARSE[483:495] = b"00000000000\0"
GNU_SPARSE[148:156] = b"%06o\0 " % (sum(GNU_SPARSE[:148]) + sum(GNU_SPARSE[156:]) + 8 * 32)
MAP = "a sparse file whose map does not end"
NO_PIECES = bytearray(BLOCK)
NO_PIECES[504] = 1


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (itertools.repeat(header(b"x", COMMENT)), "more than 16 extension headers before a member"),
        (itertools.repeat(header(b"g", COMMENT)), "more than 16 extension headers before a member"),
        (itertools.repeat(header(b"L", b"name")), "more than 16 extension headers before a member"),
        (itertools.chain([bytes(GNU_SPARSE)], itertools.repeat(bytes(NO_PIECES))), MAP),
        (itertools.chain([header(b"x", SPARSE), header(b"0", size=1 << 32)], itertools.repeat(b"1" * BLOCK)), MAP),
    ],
    ids=["PAX", "global PAX", "GNU names", "GNU sparse map", "PAX sparse map"],
)
def test_what_never_comes_to_a_member(pieces: Iterable[bytes], words: str) -> None:
    with pytest.raises(BadArchive, match=words):
        list(Reader(Stream(pieces).read))


def test_as_many_extension_headers_as_programs_write() -> None:
    of_one = {b"g": COMMENT, b"x": COMMENT, b"K": b"target", b"L": b"name", b"2": b""}
    (member,) = Reader(io.BytesIO(b"".join(header(*each) for each in of_one.items())).read)
    assert (member.name, member.target, member.kind) == (b"name", b"target", tar.SYMLINK)


def numbered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Members without content, each behind one of the pieces."""
    for number, piece in enumerate(pieces):
        yield piece
        yield header(b"0", name=str(number))


LARGE = record("comment", "x" * 100_000)


class Nowhere:
    """What a merge writes is forgotten (rules.Output)."""

    def put(self, member: tar.Member) -> None: ...

    def write(self, data: bytes) -> None: ...

    def mode(self, path: bytes) -> int:
        return 0

    def mark(self, path: bytes, xattrs: Mapping[bytes, bytes]) -> None: ...

    def count(self) -> int:
        return 0


@pytest.mark.parametrize(
    "pieces",
    [
        numbered(itertools.repeat(header(b"x", LARGE))),
        numbered(itertools.chain([header(b"g", LARGE)], itertools.repeat(b""))),
        itertools.chain([header(b"x", SPARSE), header(b"0", b"0\n", size=1 << 32)], itertools.repeat(bytes(BLOCK))),
    ],
    ids=["PAX", "global PAX", "more data than a sparse file has"],
)
def test_what_describes_a_file_counts_as_its_bytes(pieces: Iterable[bytes]) -> None:
    stream = Stream(pieces)
    limits = Limits(10_000, 1 << 20)
    merge = Merge([lambda: Reader(stream.read)], lowest=True, limits=limits, need=lambda memory_bytes: None)
    with pytest.raises(TooLarge, match="more than 1048576 bytes unpacked"):
        merge.write(Nowhere())


@pytest.mark.parametrize("size", [-1, -512, tar.EXTENSION_LIMIT + 1])
def test_an_extension_header_of_no_size(size: int) -> None:
    block = bytearray(header(b"x"))
    block[124:136] = (size & (1 << 96) - 1 if size < 0 else 1 << 95 | size).to_bytes(12, "big")
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    with pytest.raises(BadArchive, match=f"an extension header of {size} bytes"):
        list(Reader(Stream([bytes(block)]).read))
