"""The superblock check on files that mksquashfs made, whole and spoilt."""

import os
import subprocess
from pathlib import Path

import pytest
from enclos.runtime.images.squashfs import NotSquashfs, Superblock, Truncated, check_superblock


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    (folder / "tree").mkdir()
    (folder / "tree/file").write_bytes(os.urandom(300_000))
    target = folder / "image.sqsh"
    command = [
        "mksquashfs",
        str(folder / "tree"),
        str(target),
        "-quiet",
        "-no-progress",
        "-comp",
        "zstd",
        "-b",
        "65536",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def check(path: Path) -> Superblock:
    fd = os.open(path, os.O_RDONLY)
    try:
        return check_superblock(fd)
    finally:
        os.close(fd)


def spoilt(image: Path, offset: int, data: bytes) -> Path:
    content = bytearray(image.read_bytes())
    content[offset : offset + len(data)] = data
    target = image.with_suffix(".spoilt")
    target.write_bytes(content)
    return target


def test_good_image(image: Path) -> None:
    superblock = check(image)
    assert (superblock.compression, superblock.block_bytes, superblock.inodes) == ("zstd", 65536, 2)
    assert 300_000 < superblock.bytes_used <= image.stat().st_size


def test_one_byte_short(image: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    used = check(image).bytes_used
    short.write_bytes(image.read_bytes()[: used - 1])
    with pytest.raises(Truncated) as caught:
        check(short)
    assert (caught.value.file_bytes, caught.value.wanted_bytes) == (used - 1, used)
    # The padding to a full block may be missing.
    short.write_bytes(image.read_bytes()[:used])
    assert check(short).bytes_used == used


def test_shorter_than_the_superblock(image: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(image.read_bytes()[:50])
    with pytest.raises(Truncated):
        check(short)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\0" * 4096, b"sqsh" + b"\0" * 200])
def test_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "other"
    other.write_bytes(content)
    with pytest.raises(NotSquashfs, match="magic"):
        check(other)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(NotSquashfs, match="regular"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("offset", "data", "text"),
    [
        (28, b"\3\0", "version 3.0"),
        (30, b"\1\0", "version 4.1"),
        (12, b"\1\0\0\0", "block size"),
        (22, b"\7\0", "block size"),
        (20, b"\7\0", "compression 7"),
        (40, b"\0" * 8, "bytes used"),
    ],
)
def test_damaged_fields(image: Path, offset: int, data: bytes, text: str) -> None:
    with pytest.raises(NotSquashfs, match=text):
        check(spoilt(image, offset, data))
