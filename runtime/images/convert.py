"""From layers to one squashfs file: the merged stream goes straight into tar2sqfs.

Runs in the importer, without network and rights, on bytes that a user chose.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from enclos.runtime.images import tar
from enclos.runtime.images.blob import Blob
from enclos.runtime.images.flatten import BadLayer, Merge, Repeat
from enclos.runtime.images.order import Limits, Packing

END_OF_ARCHIVE = bytes(2 * tar.BLOCK)
BUFFER_BYTES = 1 << 18
PIPE_BYTES = 1 << 20  # What everybody may have (/proc/sys/fs/pipe-max-size).
STDERR_LIMIT = 4096
# Compressing threads of one tar2sqfs. As many as a large node has processors would be beyond a sandbox's processes, and
# each keeps blocks in memory; these keep up with one stream that is decompressed.
COMPRESSORS = 8
# What tar2sqfs says of members that are there twice, below a file, or links to nothing: see flatten.py.
_CONFLICT = re.compile("File exists|Not a directory|^Resolving hard link")


class PackFailed(OSError):
    """tar2sqfs could not write the file; the message has its words."""


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

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._open: list[Blob] = []

    def openers(self) -> list[Callable[[], tar.Reader]]:
        return [lambda layer=layer: self._reader(layer) for layer in self._layers]  # type: ignore[misc]

    def _reader(self, layer: Layer) -> tar.Reader:
        self.finish()  # One at a time: the layer before has been read to its end of archive.
        blob = Blob(layer.open(), layer.digest, layer.offset, layer.bytes, layer.growing)
        self._open.append(blob)
        return tar.Reader(blob.read)

    def finish(self) -> None:
        while self._open:
            self._open.pop().finish()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


def pack(layers: Sequence[Layer], lowest: bool, limits: Limits, packing: Packing, path: str) -> None:
    """Write the squashfs file of some adjacent layers.

    Args:
        lowest: nothing is below these layers, so that whiteouts need not be kept.
        path: the output; a file that is there is overwritten.

    Raises:
        BadArchive, BadLayer, BadBlob, TooLarge: the layers; NeedsBase: they need those below;
        PackFailed: tar2sqfs; FileNotFoundError: it is not installed.
    """
    blobs = _Blobs(layers)
    merge = Merge(blobs.openers(), lowest, limits)
    try:
        try:
            _into_squashfs(merge.write, blobs, packing, path)
        except (Repeat, PackFailed) as error:
            if isinstance(error, PackFailed) and not _CONFLICT.search(str(error)):
                raise
            blobs.close()
            _into_squashfs(merge.write_twice, blobs, packing, path)
    except (tar.BadArchive, BadLayer):
        blobs.finish()  # A blob that is not the one that was meant is the better answer.
        raise
    finally:
        blobs.close()


def _into_squashfs(produce: Callable[[tar.Write], None], blobs: _Blobs, packing: Packing, path: str) -> None:
    with tempfile.TemporaryFile() as messages:
        command = _command(packing, path)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=messages, pass_fds=_fd_of(path))
        assert process.stdin is not None
        # As shipped a pipe holds a quarter of what is written at a time.
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            with open(process.stdin.fileno(), "wb", BUFFER_BYTES, closefd=False) as stream:
                produce(stream.write)
                blobs.finish()
                stream.write(END_OF_ARCHIVE)
            process.stdin.close()
        except BrokenPipeError:
            process.wait()
            raise _failure(process, messages) from None
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.wait() != 0:
            raise _failure(process, messages)


def _command(packing: Packing, path: str) -> list[str]:
    level = ["-X", f"level={packing.level}"] if packing.level and packing.compression in ("zstd", "gzip") else []
    jobs = str(min(len(os.sched_getaffinity(0)), COMPRESSORS))
    form = ["-c", packing.compression, *level, "-b", str(packing.block_bytes)]
    return ["tar2sqfs", "-q", "-s", "-f", "-j", jobs, *form, path]


def _fd_of(path: str) -> tuple[int, ...]:
    """The descriptor that tar2sqfs has to inherit, where the output is one."""
    return (int(path.rpartition("/")[2]),) if path.startswith("/proc/self/fd/") else ()


def _failure(process: subprocess.Popen[bytes], messages: BinaryIO) -> PackFailed:
    messages.seek(0)
    text = messages.read(STDERR_LIMIT).decode("utf-8", "replace").strip()
    lines = text.splitlines()
    if process.returncode < 0:
        return PackFailed(f"tar2sqfs was ended by signal {-process.returncode}")
    return PackFailed(lines[-1] if lines else f"tar2sqfs ended with {process.returncode}")


def open_path(path: str) -> Callable[[], int]:
    """For layers that are files."""
    return lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
