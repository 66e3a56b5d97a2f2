"""From layers to one squashfs file: what the merge makes of them goes straight into it.

Runs in the importer, without network and rights, on bytes that a user chose.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enclos.runtime import squash
from enclos.runtime.images import tar
from enclos.runtime.images.blob import Blob
from enclos.runtime.images.merge import Merge
from enclos.runtime.images.order import Limits, Packing
from enclos.runtime.images.rules import BadLayer, Output, Repeat
from enclos.runtime.images.tar import Member

# Compressing threads of one converter. As many as a large node has processors would be beyond a sandbox's processes,
# and each keeps blocks in memory; these keep up with one stream that is decompressed.
COMPRESSORS = 8
# Of blocks that are compressed at the same time: each needs several times its size, with xz ten times.
BLOCKS_BYTES = 4 << 20
TYPES = {
    tar.FILE: stat.S_IFREG,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.SYMLINK: stat.S_IFLNK,
    tar.FIFO: stat.S_IFIFO,
    tar.CHARACTER: stat.S_IFCHR,
}


class PackFailed(OSError):
    """The squashfs file could not be written; the message has libsquashfs' words."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob: `open` gives a new descriptor of it, `digest` is what its bytes have to match.

    `offset` and `bytes` say where it is in the file; without a number of bytes, it goes to the end. One that is
    `growing` is still being written, and its number of bytes is known.
    """

    open: Callable[[], int]
    digest: str = ""
    offset: int = 0
    bytes: int | None = None
    growing: bool = False


class _Blobs:
    """The blobs of one merge. Each is compared with its digest before the result counts, in every pass."""

    def __init__(self, layers: Sequence[Layer], need: Callable[[int], None]) -> None:
        self._layers = layers
        self._need = need
        self._open: list[Blob] = []

    def openers(self) -> list[Callable[[], tar.Reader]]:
        return [lambda layer=layer: self._reader(layer) for layer in self._layers]  # type: ignore[misc]

    def _reader(self, layer: Layer) -> tar.Reader:
        self.finish()  # One at a time: the layer before has been read to its end of archive.
        blob = Blob(layer.open(), layer.digest, layer.offset, layer.bytes, layer.growing)
        self._open.append(blob)
        self._need(blob.window_bytes)
        return tar.Reader(blob.read)

    def finish(self) -> None:
        while self._open:
            self._open.pop().finish()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


class _Squashfs:
    """Where a merge writes to (rules.Output)."""

    def __init__(self, writer: squash.Writer) -> None:
        self._writer = writer
        self.write = writer.write
        self.mode = writer.mode
        self.mark = writer.mark
        self.count = writer.count

    def put(self, member: Member) -> None:
        if member.kind == tar.LINK:
            self._writer.link(member.name, member.target)
        else:
            mode = TYPES[member.kind] | member.mode
            self._writer.add(member.name, mode, member.mtime, member.target, member.size, member.xattrs)


def pack(
    layers: Sequence[Layer],
    lowest: bool,
    limits: Limits,
    packing: Packing,
    path: str,
    need: Callable[[int], None] = lambda memory_bytes: None,
) -> int:
    """Write the squashfs file of some adjacent layers; returns the number of files of all kinds in it.

    Args:
        lowest: nothing is below these layers, so that whiteouts need not be kept.
        path: the output; a file that is there is overwritten.
        need: is told how many bytes of memory are expected to be needed, and may wait.

    Raises:
        BadArchive, BadLayer, BadBlob, TooLarge: the layers; NeedsBase: they need those below;
        PackFailed: the file cannot be written; FileNotFoundError: zstd is not installed; MemoryError.
    """
    blobs = _Blobs(layers, need)
    merge = Merge(blobs.openers(), lowest, limits, need)
    try:
        try:
            return _into_squashfs(merge.write, blobs, packing, path)
        except (Repeat, squash.Conflict):
            blobs.close()
            return _into_squashfs(merge.write_twice, blobs, packing, path)
    except (tar.BadArchive, BadLayer):
        blobs.finish()  # A blob that is not the one that was meant is the better answer.
        raise
    except (squash.SquashError, squash.Conflict) as error:
        raise PackFailed(str(error)) from error
    finally:
        blobs.close()


def _into_squashfs(produce: Callable[[Output], None], blobs: _Blobs, packing: Packing, path: str) -> int:
    workers = compressors(packing.block_bytes)
    with squash.Writer(path, packing.compression, packing.level, packing.block_bytes, workers) as writer:
        produce(_Squashfs(writer))
        blobs.finish()
        writer.finish()
        return writer.count() - 1  # The root is in all.


def compressors(block_bytes: int) -> int:
    """Compressing threads of one converter, for blocks of so many bytes."""
    return max(1, min(len(os.sched_getaffinity(0)), COMPRESSORS, BLOCKS_BYTES // block_bytes))


def open_path(path: str) -> Callable[[], int]:
    """For layers that are files."""
    return lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
