"""Squashfs files of runtime/squash, as the kernel shows them."""

from __future__ import annotations

import os
import random
import resource
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import in_child
from enclos.runtime.squash import Conflict, SquashError, Writer

pytestmark = pytest.mark.kernel

BLOCK = 131072
FILE, DIRECTORY, SYMLINK = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o711, stat.S_IFLNK | 0o777


@contextmanager
def mounted(path: Path, target: Path) -> Iterator[Path]:
    target.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(path), str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def writer(path: Path, compression: str = "zstd", workers: int = 2) -> Writer:
    return Writer(str(path), compression, 1, BLOCK, workers)


@pytest.mark.parametrize("compression", ["zstd", "gzip", "xz", "lz4"])
def test_data_of_every_size(tmp_path: Path, compression: str) -> None:
    """More files than are pending at a time; whole blocks, ends, holes, the same data again."""
    noise = random.Random(7).randbytes(3 * BLOCK)
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, *(number % 977 for number in range(2500))]
    data = {b"d/%d" % number: noise[:size] for number, size in enumerate(sizes)}
    data[b"hole"] = bytes(5 * BLOCK + 3)
    data[b"hole at the end"] = noise[:BLOCK] + bytes(2 * BLOCK)
    with writer(tmp_path / "out", compression) as out:
        for name, content in data.items():
            out.add(name, FILE, 1, size=len(content))
            for at in range(0, len(content), 100_000):
                out.write(content[at : at + 100_000])
        out.finish()
    with mounted(tmp_path / "out", tmp_path / "mnt") as root:
        found = {
            os.path.relpath(os.path.join(folder, name), root).encode(): Path(folder, name).read_bytes()
            for folder, _, names in os.walk(root)
            for name in names
        }
    assert found == data


@pytest.mark.vm
def test_kinds_links_and_attributes(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as out:
        out.add(b"implied/deep/file", FILE, 5, size=3, xattrs={b"user.a": b"1", b"user.empty": b""})
        out.write(b"abc")
        out.add(b"implied/deep", DIRECTORY, 6, xattrs={b"user.d": b"2"})
        out.link(b"also", b"implied/deep/file")
        out.link(b"again", b"also")
        out.add(b"symlink", SYMLINK, 7, b"implied/deep")
        out.link(b"symlink too", b"symlink")
        out.add(b"fifo", stat.S_IFIFO | 0o600, 8)
        out.link(b"fifo too", b"fifo")
        out.add(b"gone", stat.S_IFCHR, 2**32 - 1)
        out.add(b".", stat.S_IFDIR | 0o1755, 9)
        out.add("ü\udcff".encode("utf-8", "surrogateescape"), FILE, 0)
        out.finish()
    with mounted(tmp_path / "out", tmp_path / "mnt") as root:
        names = ["again", "also", "fifo", "fifo too", "gone", "implied", "symlink", "symlink too", "ü\udcff"]
        assert sorted(os.listdir(root)) == names
        file = root / "implied/deep/file"
        assert {(root / name).lstat().st_ino for name in ("also", "again")} == {file.lstat().st_ino}
        assert [(root / name).lstat().st_nlink for name in ("also", "symlink", "fifo", "gone")] == [3, 2, 2, 1]
        assert (root / "also").read_bytes() == b"abc"
        assert os.readlink(root / "symlink too") == "implied/deep"
        assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == {"user.a": b"1", "user.empty": b""}
        assert os.getxattr(root / "implied/deep", "user.d") == b"2"
        shown = [(root / name).lstat() for name in (".", "implied", "implied/deep", "also", "symlink", "fifo", "gone")]
        assert [status.st_mtime for status in shown] == [9, 0, 6, 5, 7, 8, 2**32 - 1]
        modes = [0o41755, 0o40755, DIRECTORY, FILE, SYMLINK, stat.S_IFIFO | 0o600, stat.S_IFCHR]
        assert [status.st_mode for status in shown] == modes
        assert {(status.st_uid, status.st_gid, status.st_rdev) for status in shown} == {(0, 0, 0)}
        assert [status.st_nlink for status in shown[:3]] == [3, 3, 2]


def test_what_is_there_already(tmp_path: Path) -> None:
    with writer(tmp_path / "out") as out:
        out.add(b"d", DIRECTORY, 0)
        out.add(b"f", FILE, 0)
        for name, mode in ((b"d", FILE), (b"f", FILE), (b"f", DIRECTORY), (b"f/x", FILE)):
            with pytest.raises(Conflict):
                out.add(name, mode, 0)
        for name, target in ((b"l", b"d"), (b"l", b"none"), (b"l", b"none/f"), (b"l", b"l"), (b"f", b"f")):
            with pytest.raises(Conflict):
                out.link(name, target)
        for name in (b"", b"/f", b"d/", b"d//f", b"x" * 256, b"a\0b"):
            with pytest.raises((SquashError, Conflict)):
                out.add(name, FILE, 0)
        out.finish()
    with mounted(tmp_path / "out", tmp_path / "mnt") as root:
        assert sorted(os.listdir(root)) == ["d", "f"]
        assert os.listdir(root / "d") == []


def test_longest_names_and_values(tmp_path: Path) -> None:
    """What the kernel takes is written, and one byte more is refused: a file would say something else by it."""
    target, key, value = b"t" * 4095, b"user." + b"k" * 250, bytes(65536)
    with writer(tmp_path / "out") as out:
        out.add(b"l", SYMLINK, 0, target)
        out.add(b"f", FILE, 0, xattrs={key: value})
        out.finish()
    with mounted(tmp_path / "out", tmp_path / "mnt") as root:
        assert os.readlink(root / "l").encode() == target
        assert os.listxattr(root / "f") == [key.decode()]
        assert os.getxattr(root / "f", key) == value
    with writer(tmp_path / "out") as out:
        for mode, longer, xattrs in (
            (SYMLINK, target + b"t", {}),
            (FILE, b"", {key + b"k": b""}),
            (FILE, b"", {key: value + b"v"}),
        ):
            with pytest.raises(SquashError):
                out.add(b"x", mode, 0, longer, xattrs=xattrs)


@pytest.mark.parametrize("place", ["/proc/self/fd/999", "/nowhere/out", "/dev/full"])
def test_a_file_that_cannot_be_written(place: str) -> None:
    with pytest.raises(SquashError), Writer(place, "zstd", 0, BLOCK, 1) as out:
        out.finish()


@pytest.mark.parametrize("more_kb", [0, 64, 300, 600, 900, 1200, 1800, 2500, 4000])
def test_without_memory(tmp_path: Path, more_kb: int) -> None:
    """Wherever it ends: words about memory, and no signal."""

    def fill() -> str:
        with open("/proc/self/statm") as file:
            data = int(file.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + (more_kb << 10), data + (more_kb << 10)))
        try:
            with writer(tmp_path / "out") as out:
                for number in range(300_000):
                    out.add(b"d/%d" % number, FILE, 0, size=4)
                    out.write(b"%4d" % (number % 5000))
                out.finish()
        except MemoryError:
            return "memory"
        except SquashError as error:
            return str(error).rpartition(" ")[2]
        return ""

    # What the tests before this one gave back may be enough.
    assert in_child(fill) in ("memory", "")


@pytest.mark.parametrize("name", [b"d/%d", b"d/%07d", b"d/f%06d", b"%d/f"])
def test_names_find_slots_of_their_own(tmp_path: Path, name: bytes) -> None:
    """Also short ones: where a hash had their own bytes in its low bits, each took a walk past thousands of others."""
    with writer(tmp_path / "out", workers=1) as out:
        begin = time.process_time()
        for number in range(100_000):
            out.add(name % number, FILE, 0)
        assert time.process_time() - begin < 3  # 0.06 s; it was 20 s.


COUNT = 150_000


def test_memory_and_time_of_a_directory_with_many_files(tmp_path: Path) -> None:
    """tar2sqfs takes minutes for it, and three times the memory."""

    def fill() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        numbers = random.Random(1).sample(range(COUNT), COUNT)
        ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        with writer(tmp_path / "out") as out:
            for number in numbers:
                out.add(b"d/%089d" % number, FILE, 0)
            out.finish()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - ready

    grown_kb = in_child(fill)
    # 28 bytes and the name, 6 to 12 in the hash table, 16 and the library's list of them while it is written.
    assert grown_kb * 1024 < 290 * COUNT
    with mounted(tmp_path / "out", tmp_path / "mnt") as root:
        assert sorted(os.listdir(root / "d")) == [f"{number:089d}" for number in range(COUNT)]
