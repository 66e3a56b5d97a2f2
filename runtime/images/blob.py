"""A layer's blob as the importer reads it: decompressed as a stream, and compared with its digest at the end.

gzip (of several members too), zstd and plain tar, told apart by their first bytes: media types in manifests are often
wrong. Runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import subprocess
import threading
from collections.abc import Callable

from enclos.runtime import linux

try:
    from isal import isal_zlib as inflate
except ImportError:  # The same interface, at half the speed.
    import zlib as inflate  # type: ignore[no-redef]

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
CHUNK = 1 << 18
AHEAD = 8
EVENT_BYTES = 4096
ZSTD_COMMAND = ("zstd", "-dcq", "--no-check")
# What zstd keeps of what it has decompressed: as much as its levels without `--ultra` ask for, and as much as any may.
ZSTD_WINDOW = 8 << 20
ZSTD_LARGEST_WINDOW = 128 << 20
ZSTD_HEADER_BYTES = 17  # Magic number, descriptor, number of a dictionary, size.


class BadBlob(ValueError):
    """The blob is damaged, or not what its digest says."""


class _Ahead:
    """Decompresses ahead of its reader, in a thread: ISA-L, zlib and SHA-256 let Python go on meanwhile."""

    def __init__(self, produce: Callable[[], bytes]) -> None:
        self._produce = produce
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(AHEAD)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> bytes:
        """The next piece; b"" at the end, again and again. Raises what the producer raised."""
        if self._stopped:
            return b""
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)
            raise item
        if not item:
            self._queue.put(item)
        return item

    def stop(self) -> None:
        """Wait until the producer does nothing any more; what it had ready is dropped."""
        self._stopped = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(0.001)

    def _run(self) -> None:
        while not self._stopped:
            try:
                data = self._produce()
            except Exception as error:
                self._queue.put(error)
                return
            self._queue.put(data)
            if not data:
                return


class Blob:
    """One blob, read from its start; `read` is what tar.Reader wants. `finish` has to be called.

    `window_bytes` is the memory that another process needs for it, 0 for none.
    """

    def __init__(
        self, fd: int, digest: str = "", offset: int = 0, size: int | None = None, growing: bool = False
    ) -> None:
        """Takes over the descriptor.

        Args:
            digest: `sha256:HEX` of the blob's bytes, "" for one that is not checked.
            offset, size: where it is in the file, in bytes; without a size, up to the end.
            growing: it is being written, and will have `size` bytes: where they are not there yet, wait for them.
                Whoever knows that they will not come has to end this process.
        """
        self._fd = fd
        self._digest = digest
        self._hash = hashlib.sha256()
        self._buffer = b""
        self._at = 0
        self._gzip: inflate.Decompress | None = None
        self._zstd: subprocess.Popen[bytes] | None = None
        self._feeder: threading.Thread | None = None
        self._room = 1 << 62 if size is None else size
        self._place = offset
        self._watch_fd = linux.watch_writes(f"/proc/self/fd/{fd}") if growing else -1
        self.window_bytes = 0
        self._await(ZSTD_HEADER_BYTES)
        head = os.pread(fd, min(ZSTD_HEADER_BYTES, self._room), offset)
        if head[:2] == GZIP:
            self._gzip = inflate.decompressobj(31)
        elif head[:4] == ZSTD:
            self.window_bytes = min(max(zstd_window(head[4:]), ZSTD_WINDOW), ZSTD_LARGEST_WINDOW)
            self._start_zstd()
        self._ahead = _Ahead(self._more)

    def read(self, count: int) -> bytes:
        """Up to `count` bytes of the decompressed layer; b"" at its end. Raises BadBlob."""
        if self._at >= len(self._buffer):
            self._buffer, self._at = self._ahead.take(), 0
        data = self._buffer[self._at : self._at + count]
        self._at += len(data)
        return data

    def finish(self) -> None:
        """Read the rest, compare the digest, and close. Raises BadBlob."""
        try:
            self._ahead.stop()
            if self._zstd is None:
                while self._raw():
                    pass
            else:
                self._finish_zstd(self._zstd)
        finally:
            self.close()
        if self._digest and self._digest != f"sha256:{self._hash.hexdigest()}":
            raise BadBlob("it does not match its digest")

    def close(self) -> None:
        self._ahead.stop()
        if self._zstd is not None:
            self._zstd.kill()
            self._zstd.wait()
            if self._zstd.stdout is not None:
                self._zstd.stdout.close()
            if self._feeder is not None:
                self._feeder.join()
            self._zstd = None
        for fd in (self._fd, self._watch_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._watch_fd = -1

    def _await(self, count: int) -> None:
        """Of a blob that grows: until the next `count` bytes are there, or those that it still gets."""
        if self._watch_fd >= 0:
            wanted = self._place + min(count, self._room)
            while os.fstat(self._fd).st_size < wanted:
                os.read(self._watch_fd, EVENT_BYTES)

    def _raw(self) -> bytes:
        self._await(CHUNK)
        data = os.pread(self._fd, min(CHUNK, self._room), self._place)
        self._place += len(data)
        self._room -= len(data)
        self._hash.update(data)
        return data

    def _more(self) -> bytes:
        if self._gzip is not None:
            return self._inflate(self._gzip)
        if self._zstd is not None:
            assert self._zstd.stdout is not None
            data = os.read(self._zstd.stdout.fileno(), CHUNK)
            if not data and self._zstd.wait() != 0:
                raise BadBlob("its zstd stream is damaged")
            return data
        return self._raw()

    def _inflate(self, stream: inflate.Decompress) -> bytes:
        """The next piece of at most CHUNK bytes, however much the input would give."""
        while True:
            if stream.eof:
                rest = stream.unused_data
                if len(rest) < len(GZIP):
                    rest += self._raw()  # A member may begin with the last byte of a piece.
                if rest[:2] != GZIP:
                    return b""  # Zeros, or what gzip calls "trailing garbage, ignored".
                stream = self._gzip = inflate.decompressobj(31)
                source = rest
            else:
                source = stream.unconsumed_tail or self._raw()
                if not source:
                    raise BadBlob("its gzip stream ends too early")
            try:
                data = stream.decompress(source, CHUNK)
            except inflate.error as error:  # type: ignore[misc]
                raise BadBlob("its gzip stream is damaged") from error
            if data:
                return data

    # --- zstd: Python has none before 3.14, so its program decompresses -----------------------------------------

    def _start_zstd(self) -> None:
        try:
            self._zstd = subprocess.Popen(
                [*ZSTD_COMMAND, f"--memory={self.window_bytes}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise BadBlob("it is compressed with zstd, and the program zstd is not installed") from error
        self._feeder = threading.Thread(target=self._feed, args=(self._zstd,), daemon=True)
        self._feeder.start()

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        alive = True
        while data := self._raw():
            if alive:
                try:
                    process.stdin.write(data)
                except OSError:
                    alive = False  # The rest is read for its digest.
        try:
            process.stdin.close()
        except OSError:
            return

    def _finish_zstd(self, process: subprocess.Popen[bytes]) -> None:
        """As of gzip, what is behind the archive's end is read for its digest alone: unpacked it may be without end."""
        assert process.stdout is not None and self._feeder is not None
        process.stdout.close()
        self._feeder.join()
        process.wait()


def zstd_window(header: bytes) -> int:
    """Bytes of memory that a frame asks for (RFC 8878, 3.1.1.1): of a small one, its own size."""
    if len(header) < 2:
        return 0  # Cut off; zstd will say so.
    descriptor = header[0]
    if not descriptor & 0x20:
        base = 1 << 10 + (header[1] >> 3)
        return base + base // 8 * (header[1] & 7)
    begin = 1 + (0, 1, 2, 4)[descriptor & 3]
    size = (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(header[begin : begin + size], "little")
