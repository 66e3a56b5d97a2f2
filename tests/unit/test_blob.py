"""Blobs of layers as the importer reads them: what is decompressed, and what is found to be damaged."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import resource
import subprocess
import threading
import time
import zlib
from pathlib import Path

import pytest
from enclos.runtime.images import blob
from enclos.runtime.images.blob import BadBlob, Blob
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = b"".join(b"line %d of the layer\n" % number for number in range(100_000))


@pytest.fixture(params=["as shipped", "zlib"], autouse=True)
def decompressor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ISA-L where it is installed, and zlib in any case."""
    if request.param == "zlib":
        monkeypatch.setattr(blob, "inflate", zlib)


def read(data: bytes, digest: str = "") -> bytes:
    fd = os.memfd_create("blob")
    os.write(fd, data)
    opened = Blob(fd, digest)
    try:
        found = b"".join(iter(lambda: opened.read(10_000), b""))
        opened.finish()
    finally:
        opened.close()
    return found


def test_the_one_that_is_fast_is_installed() -> None:
    import isal.isal_zlib

    assert isal.isal_zlib.decompressobj(31).decompress(gzip.compress(TEXT)) == TEXT


@pytest.mark.parametrize("behind", [b"", bytes(1000), b"no gzip"])
def test_gzip_of_several_members(behind: bytes) -> None:
    data = gzip.compress(TEXT) + gzip.compress(b"") + gzip.compress(b"more", 1) + behind
    assert read(data, f"sha256:{hashlib.sha256(data).hexdigest()}") == TEXT + b"more"


@pytest.mark.parametrize("before", [0, 1, 2, 9])
def test_gzip_members_that_begin_at_the_end_of_a_piece(before: int) -> None:
    """A piece of the file ends within the next member's magic number: nothing behind it may be lost."""
    first = stored(blob.CHUNK - before)
    data = first + gzip.compress(b"more") + gzip.compress(b" and more")
    assert read(data) == gzip.decompress(first) + b"more and more"


def stored(size: int) -> bytes:
    """A gzip member of exactly that many bytes."""
    text = os.urandom(size)
    while len(member := gzip.compress(text, 0)) != size:
        text = text[: len(text) - (len(member) - size)]
    return member


def test_a_blob_that_is_not_the_one_meant() -> None:
    with pytest.raises(BadBlob, match="does not match its digest"):
        read(gzip.compress(TEXT), f"sha256:{'0' * 64}")


@pytest.mark.parametrize("rest", [1, 8, 100, 10_000])
def test_gzip_that_ends_too_early(rest: int) -> None:
    with pytest.raises(BadBlob, match="ends too early"):
        read(gzip.compress(TEXT)[:-rest])


@pytest.mark.parametrize("place", [2, 1000, -6, -2], ids=["header", "data", "checksum", "length"])
def test_damaged_gzip(place: int) -> None:
    data = bytearray(gzip.compress(TEXT))
    data[place] ^= 0xFF
    with pytest.raises(BadBlob, match=r"gzip stream is damaged|ends too early"):
        read(bytes(data))


def test_a_bomb_comes_in_small_pieces() -> None:
    """However much a few bytes become, never more than a piece of it is in memory at a time."""
    fd = os.memfd_create("blob")
    os.write(fd, gzip.compress(bytes(64 << 20)))
    opened = Blob(fd)
    pieces = [len(piece) for piece in iter(lambda: opened.read(1 << 30), b"")]
    opened.finish()
    assert sum(pieces) == 64 << 20 and max(pieces) <= blob.CHUNK


@settings(deadline=None)  # The first example loads the library, on a busy machine slowly.
@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_fail(data: bytes) -> None:
    with contextlib.suppress(BadBlob):
        read(blob.GZIP + data)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_a_blob_that_is_still_being_written(tmp_path: Path, compressed: bool) -> None:
    """What is there is given in pieces, and the rest when it has come; the end is where its size says."""
    text = os.urandom(4 * blob.CHUNK)
    data = gzip.compress(text) if compressed else text
    path = tmp_path / "oci-put-blob1"
    half = len(data) // 2
    path.write_bytes(data[:2])
    written = threading.Event()

    def write() -> None:
        with open(path, "ab", 0) as file:
            file.write(data[2:half])
            assert written.wait(30)
            for at in range(half, len(data), 100_000):
                file.write(data[at : at + 100_000])
                time.sleep(0.001)
            os.rename(path, tmp_path / "finished")

    writer = threading.Thread(target=write)
    writer.start()
    opened = Blob(
        os.open(path, os.O_RDONLY), f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data), growing=True
    )
    try:
        # A piece that the first half is enough for.
        found = opened.read(1000)
        written.set()
        found += b"".join(iter(lambda: opened.read(10_000), b""))
        opened.finish()
    finally:
        written.set()
        opened.close()
        writer.join()
    assert found == text


def test_what_is_behind_an_archives_end_is_not_unpacked() -> None:
    """A terabyte in a megabyte; it is read all the same, for the digest."""
    zeros = subprocess.run(["zstd", "-q1", "-c"], input=bytes(1 << 28), capture_output=True, check=True).stdout
    data = zeros * 4096
    fd = os.memfd_create("blob")
    os.write(fd, data)
    opened = Blob(fd, f"sha256:{hashlib.sha256(data).hexdigest()}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert opened.read(512) == bytes(512)
    opened.finish()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5  # Seconds of zstd.
