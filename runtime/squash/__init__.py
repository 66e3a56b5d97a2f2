"""Squashfs files, written as their members come: libsquashfs (squashfs-tools-ng), and the tree of names in squash.c.

Not tar2sqfs, which is made of the same library: it takes several times the memory for each name, and time with the
square of the names of one directory (docs/design.md has the numbers). Knows nothing of images, layers or archives. Runs
in an import's sandbox.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType, TracebackType

try:
    from enclos.runtime.squash import _squash
except ImportError as error:
    # Told when it is needed: an import says it in words, and `enclos check` before that.
    missing = str(error)
else:
    missing = ""

LIBRARY = "libsquashfs.so.1"
# Blocks that wait for a compressing thread, per thread. libsquashfs' tool has ten; with two none was seen to idle.
BACKLOG = 2
# sqfs/error.h; what is not here is a bug or a compressor's.
_ALLOC, _IO, _COMPRESSOR, _INTERNAL, _OVERFLOW, _OUT_OF_BOUNDS = -1, -2, -3, -4, -7, -8
# What zstd and threads say where they get no memory.
_NO_MEMORY = "a compressor or its thread failed, possibly for lack of memory"
_WORDS = {
    _IO: "I/O error",
    _COMPRESSOR: _NO_MEMORY,
    _INTERNAL: _NO_MEMORY,
    _OVERFLOW: "too much for one squashfs file",
    _OUT_OF_BOUNDS: "read beyond the end of it",
}


class Conflict(ValueError):
    """A member is there already, is below a file, or links to what is not there."""


class SquashError(OSError):
    """The file could not be written; the message says what libsquashfs says."""


class Writer:
    """One squashfs file. All in it belongs to 0:0; a directory that nobody describes has mode 0755 and time 0."""

    def __init__(self, path: str, compression: str, level: int, block_bytes: int, workers: int) -> None:
        """Begin it; a file that is there is overwritten.

        Args:
            compression: zstd, lz4, gzip, xz; `level` 0 is its own default.
            workers: compressing threads.

        Raises:
            SquashError, MemoryError; FileNotFoundError: the library is not installed.
        """
        if missing:
            raise FileNotFoundError(errno.ENOENT, missing, LIBRARY)
        opened = _squash.ffi.new("struct squash **")
        backlog = BACKLOG * workers
        status = _squash.lib.squash_open(
            opened, path.encode(), compression.encode(), level, block_bytes, workers, backlog
        )
        self._squash = opened[0]
        if status:
            self.close()
            raise _failure(status, path.encode())

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self,
        path: bytes,
        mode: int,
        mtime: int,
        target: bytes = b"",
        size: int = 0,
        xattrs: Mapping[bytes, bytes] = MappingProxyType({}),
    ) -> None:
        """Add what is no hard link; `write` has to follow for `size` bytes. Of a directory the last description counts.

        Args:
            path: relative, without `.` and `..`; `.` alone is the root.
            mode: with the file's type; a device is 0:0.
            mtime: seconds, 32 bits.
            target: of a symlink.

        Raises:
            Conflict, SquashError, MemoryError.
        """
        for key, value in xattrs.items():
            _check(_squash.lib.squash_xattr(self._squash, key, value, len(value)), path)
        _check(_squash.lib.squash_add(self._squash, path, len(path), mode, mtime, target, size), path)

    def link(self, path: bytes, target: bytes) -> None:
        """Give what is at `target` another name. Raises as `add`."""
        _check(_squash.lib.squash_link(self._squash, path, len(path), target, len(target)), path)

    def mode(self, path: bytes) -> int:
        """Mode, with the type, of what is at a path; 0 for nothing. Raises Conflict where a file is in the way."""
        mode = _squash.lib.squash_mode(self._squash, path, len(path))
        if mode == _squash.lib.SQUASH_CONFLICT:
            raise Conflict(path.decode("utf-8", "replace"))
        return mode

    def mark(self, path: bytes, xattrs: Mapping[bytes, bytes]) -> None:
        """Give a directory that is there other extended attributes. Raises as `add`."""
        for key, value in xattrs.items():
            _check(_squash.lib.squash_xattr(self._squash, key, value, len(value)), path)
        _check(_squash.lib.squash_mark(self._squash, path, len(path)), path)

    def count(self) -> int:
        """Entries so far, with the root and the directories that nobody described."""
        return _squash.lib.squash_count(self._squash)

    def write(self, data: bytes) -> None:
        """More data of the file that was added last. Raises SquashError, MemoryError."""
        _check(_squash.lib.squash_data(self._squash, data, len(data)), b"")

    def finish(self) -> None:
        """Write what has to wait for the last member: the tree. Raises SquashError, MemoryError."""
        _check(_squash.lib.squash_finish(self._squash), b"")

    def close(self) -> None:
        """Give back its memory; unless `finish` came before, the file is not whole."""
        _squash.lib.squash_close(self._squash)
        self._squash = _squash.ffi.NULL


def _check(status: int, path: bytes) -> None:
    if status:
        raise _failure(status, path)


def _failure(status: int, path: bytes) -> Exception:
    if status == _squash.lib.SQUASH_CONFLICT:
        return Conflict(path.decode("utf-8", "replace"))
    if status == _ALLOC:
        return MemoryError()
    return SquashError(_WORDS.get(status, f"libsquashfs error {status}"))
