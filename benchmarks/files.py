"""Peak memory of an import by the number of its files, not by their size.

    sudo .venv/bin/python -m benchmarks files [--quick]

Images with a million members, the limit as shipped, of several kinds.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from enclos.runtime.images import tar
from enclos.runtime.images.tar import Member

from benchmarks.imports import MEMORY_MB, Image, ImportFailed, import_image, new_store
from benchmarks.machine import describe
from benchmarks.result import Claim, Result, Table

NAME = "files"
TITLE = "memory of an import with a million files"
# With their directories no more than a million.
FILES, QUICK_FILES, PER_DIRECTORY = 998_000, 50_000, 1000
# More than a part has (manifest.PART_BYTES): data that no compression makes smaller.
PART_MB = 25

Members = Callable[[int, int], Iterator[Member]]


def run(*, quick: bool) -> Result:
    """All images, once each."""
    count = QUICK_FILES if quick else FILES
    kinds: list[tuple[str, Members, int, int]] = [
        ("empty files", _files, 1, 0),
        ("empty files in two layers, one part", _files, 2, 0),
        ("empty files in four parts", _files, 4, PART_MB),
        ("names of 100 characters", _long_names, 1, 0),
        ("names of 100 characters in two layers, one part", _long_names, 2, 0),
        ("names of 100 characters in four parts", _long_names, 4, PART_MB),
        ("directories", _directories, 1, 0),
        ("directories in two layers, one part", _directories, 2, 0),
        ("symlinks", _symlinks, 1, 0),
        ("hard links, half of them", _links, 1, 0),
        ("extended attributes, each different", _xattrs, 1, 0),
        ("files in one directory", _flat, 1, 0),
    ]
    with tempfile.TemporaryDirectory(prefix="enclos-bench-", dir="/var/tmp") as name:
        measured = [_measured(Path(name), count, *kind) for kind in kinds]
    rows = [(image.name, took, f"{image.peak_mb:.0f} MB") for image, took in measured]
    result = Result(NAME, TITLE, machine=describe())
    result.tables.append(Table(f"imports of {count} members", ("image", "time", "peak memory"), tuple(rows)))
    for image, _ in measured:
        words = f"{image.name}: peak memory is at most {MEMORY_MB} MB"
        result.claims.append(Claim(words, f"{image.peak_mb:.0f} MB", image.peak_mb <= MEMORY_MB))
    return result


def _measured(
    folder: Path, count: int, name: str, members: Members, layers: int, megabytes: int
) -> tuple[Image, str]:
    """The image, and how long its import took, or what its user would read."""
    image = Image(name, folder / name.replace(" ", "-"))
    image.folder.mkdir()
    layout = f"{image.folder}/layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:t"], check=True)
    for number in range(layers):
        path = image.folder / "layer.tar"
        _write_layer(path, members(number * count // layers, (number + 1) * count // layers), megabytes << 20)
        subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:t", str(path)], check=True)
        path.unlink()
    with new_store(image) as made:
        try:
            took = f"{import_image(image, made, f'oci:{layout}:t', measure=True):.1f} s"
        except ImportFailed as error:
            took = str(error)
    subprocess.run(["rm", "-r", str(image.folder)], check=True)
    return image, took


def _write_layer(path: Path, members: Iterator[Member], noise_bytes: int) -> None:
    with open(path, "wb", 1 << 20) as file:
        if noise_bytes:
            file.write(tar.header(Member(os.urandom(8).hex().encode(), tar.FILE, noise_bytes)))
            file.write(os.urandom(noise_bytes))
        for member in members:
            file.write(tar.header(member))
        file.write(bytes(2 * tar.BLOCK))


def _spread(begin: int, end: int, make: Callable[[bytes, int], Member]) -> Iterator[Member]:
    """Members in directories of a thousand."""
    for number in range(begin, end):
        directory = b"directory%04d" % (number // PER_DIRECTORY)
        if number == begin or number % PER_DIRECTORY == 0:
            yield Member(directory, tar.DIRECTORY, mode=0o755)
        yield make(directory, number)


def _files(begin: int, end: int) -> Iterator[Member]:
    return _spread(begin, end, lambda directory, number: Member(b"%s/file%07d" % (directory, number), tar.FILE))


def _long_names(begin: int, end: int) -> Iterator[Member]:
    return _spread(begin, end, lambda directory, number: Member(b"%s/%0100d" % (directory, number), tar.FILE))


def _directories(begin: int, end: int) -> Iterator[Member]:
    return _spread(begin, end, lambda directory, number: Member(b"%s/%07d" % (directory, number), tar.DIRECTORY))


def _symlinks(begin: int, end: int) -> Iterator[Member]:
    def make(directory: bytes, number: int) -> Member:
        return Member(b"%s/%07d" % (directory, number), tar.SYMLINK, target=b"/usr/share/%07d" % number)

    return _spread(begin, end, make)


def _links(begin: int, end: int) -> Iterator[Member]:
    """Files, and far behind each its other name."""
    half = (end - begin) // 2
    yield from _files(begin, begin + half)
    yield Member(b"links", tar.DIRECTORY, mode=0o755)
    for link in _files(begin, begin + half):
        name = b"links/" + link.name
        yield Member(name, link.kind) if link.kind == tar.DIRECTORY else Member(name, tar.LINK, target=link.name)


def _xattrs(begin: int, end: int) -> Iterator[Member]:
    def make(directory: bytes, number: int) -> Member:
        return Member(b"%s/%07d" % (directory, number), tar.FILE, xattrs={b"user.number": b"%d" % number})

    return _spread(begin, end, make)


def _flat(begin: int, end: int) -> Iterator[Member]:
    return (Member(b"directory/file%07d" % number, tar.FILE) for number in range(begin, end))

