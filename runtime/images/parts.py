"""The parts of one import: blobs are fetched and converted side by side, each group of layers to one squashfs file.

Runs in the importer, as root: it opens blobs for the sandboxes, never reads one, and names a part's file when its
sandbox is dead and nobody can write to it any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enclos.runtime import errors, linux, protocol
from enclos.runtime.images import convert, turn
from enclos.runtime.images.blob import BadBlob
from enclos.runtime.images.convert import Layer, PackFailed
from enclos.runtime.images.layout import Store
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Order
from enclos.runtime.images.rules import BadLayer, NeedsBase, TooLarge
from enclos.runtime.images.sandbox import Rights, Sandbox
from enclos.runtime.images.sandboxes import Sandboxes, ended
from enclos.runtime.images.tar import BadArchive
from enclos.runtime.images.turn import Turn

CONVERTERS = 4
HASH_BYTES = 1 << 20
# Of the memory that one converter may have, how much those may that work beside it: `imports.memory` divided by this.
SMALL_PART = 24
THREAD_BYTES = 1 << 20  # Of stack: as shipped 8 MB, which count as memory.


class Whole(Exception):
    """A group of layers needs those below it: the image has to be merged as a whole."""


class BadGrowing(Exception):
    """A converter cannot use a blob that is not all there yet; `said` is its error."""

    def __init__(self, said: errors.EnclosError) -> None:
        super().__init__(said)
        self.said = said


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """A layer's blob: the descriptor, and where in the file it is; without a number of bytes, to the end."""

    fd: int
    offset: int = 0
    bytes: int | None = None


OpenBlob = Callable[[LayerInfo, str], OpenLayer]


class Build:
    """Fetching and converting side by side: a group of layers is converted as soon as its last blob is there.

    When nothing else is left to do, the last blob is read while it is being written.
    """

    def __init__(
        self,
        sandboxes: Sandboxes,
        order: Order,
        groups: Sequence[Sequence[LayerInfo]],
        keys: Sequence[str],
        wanted: Sequence[int],
    ) -> None:
        """`keys` are the names of the parts that the groups become; `wanted` says which of them to make."""
        self._sandboxes = sandboxes
        self._order = order
        self._store = Store(order.store)
        self._groups = groups
        self._keys = keys
        self._waiting = list(wanted)
        self._total = len(wanted)
        self._known = {layer.digest for group in groups for layer in group}
        self._arrived: set[str] = set()
        self._growing: dict[str, str] = {}  # Digests, and the names of their files.
        self._converting: dict[Sandbox, tuple[int, int]] = {}
        self._made = 0
        self._files = 0  # Of parts that this import makes; those in the cache are not counted again.
        self._turn_fd = turn.create()

    def run(self, open_blob: OpenBlob, fetcher: Sandbox | None = None, config: str | None = None) -> str:
        """Make all parts that are wanted; the image's configuration.

        Args:
            open_blob: opens a layer's blob, or the file of a name that becomes it.
            fetcher: brings blobs and configuration (fetch.job_download); without one all are there.

        Raises:
            EnclosError; Whole; Unwanted.
        """
        self._open_blob, self._fetcher, self._config = open_blob, fetcher, config
        if fetcher is None:
            self._arrived = set(self._known)
        try:
            while self._fetcher is not None or self._waiting or self._converting:
                self._start_converters()
                fetchers = [self._fetcher] if self._fetcher is not None else []
                for ready in self._sandboxes.await_any([*fetchers, *self._converting]):
                    if ready is self._fetcher:
                        self._hear_fetcher(ready)
                    else:
                        self._hear_converter(ready)
        except BadGrowing as error:
            self._await_verdict()
            raise error.said from None
        except Whole:
            self._await_verdict()  # What is under way will be needed, and would be fetched from its beginning.
            raise
        finally:
            for _, output_fd in self._converting.values():
                self._store.drop_part(output_fd)
                os.close(output_fd)
            os.close(self._turn_fd)
        return self._config or "{}"

    def _hear_fetcher(self, fetcher: Sandbox) -> None:
        message = self._sandboxes.message_of(fetcher)
        if message is None:
            status = fetcher.wait()
            self._sandboxes.end(fetcher)
            self._fetcher = None
            if self._config is None:
                raise errors.import_failed(self._order.image, ended(status))
            wanted = {layer.digest for index in self._waiting for layer in self._groups[index]}
            if (wanted | self._growing.keys()) - self._arrived:
                raise errors.import_failed(self._order.image, "a layer did not arrive")
        elif message.get("state") == "blob" and message.get("digest") in self._known:
            self._arrived.add(message.get("digest"))
        elif message.get("state") == "growing" and message.get("digest") in self._known:
            self._growing[message.get("digest")] = message.get("file")
        elif message.get("state") == "config":
            self._config = message.get("text")

    def _await_verdict(self) -> None:
        """Let the fetcher finish. Its error, where it has one, is the better answer to a bad blob. Raises that."""
        while self._fetcher is not None:
            self._hear_fetcher(*self._sandboxes.await_any([self._fetcher]))

    def _start_converters(self) -> None:
        limit = min(os.cpu_count() or 1, CONVERTERS)
        for index in list(self._waiting):
            if len(self._converting) >= limit:
                break
            digests = {layer.digest for layer in self._groups[index]}
            last = self._growing.keys() if len(self._waiting) == 1 else set()
            if not digests <= self._arrived | last:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    opened = self._open_layers(self._groups[index], stack)
                except FileNotFoundError:
                    if digests <= self._arrived:
                        raise
                    self._growing.clear()  # It failed, and the fetcher will say why, or it has just been finished.
                    return
                self._waiting.remove(index)
                self._convert(index, opened)

    def _open_layers(self, group: Sequence[LayerInfo], stack: contextlib.ExitStack) -> list[tuple[int, Layer]]:
        """The descriptor of each layer, which the stack closes, and how a converter reads it."""
        found = []
        for layer in group:
            growing = layer.digest not in self._arrived
            opened = self._open_blob(layer, self._growing[layer.digest] if growing else "")
            stack.callback(os.close, opened.fd)
            reopen = functools.partial(os.dup, opened.fd)
            found.append((opened.fd, Layer(reopen, layer.digest, opened.offset, opened.bytes, growing)))
        return found

    def _convert(self, index: int, opened: Sequence[tuple[int, Layer]]) -> None:
        order = self._order
        output_fd = self._store.part_file()
        os.fchown(output_fd, order.slot, order.slot)
        turn_fd = turn.share(self._turn_fd)
        job = job_convert(order, [layer for _, layer in opened], index == 0, output_fd, turn_fd)
        rights = Rights(order.slot, False, order.memory, self._room(), own=order.own)
        fds = [output_fd, turn_fd, *(fd for fd, _ in opened)]
        running = self._sandboxes.start("convert", job, rights, fds=fds)
        os.close(turn_fd)
        self._converting[running] = (index, output_fd)

    def _room(self) -> int:
        """Bytes that the next file may have. Those that are made beside it are counted when they are finished."""
        order = self._order
        return min(order.limits.bytes, order.room - self._made) if order.room else order.limits.bytes

    def _hear_converter(self, running: Sandbox) -> None:
        try:
            message = self._sandboxes.message_of(running)
        except errors.EnclosError as error:
            index, _ = self._converting[running]
            if {layer.digest for layer in self._groups[index]} <= self._arrived:
                raise
            raise BadGrowing(error) from error
        if message is None:
            raise errors.import_failed(self._order.image, ended(running.wait()))
        if message.get("state") == "whole":
            raise Whole
        self._files += message.number("files")
        if self._files > self._order.limits.members:
            detail = f"more than {self._order.limits.members} files"
            raise errors.image_too_large(self._order.image, detail, "imports.limit_files")
        index, output_fd = self._converting.pop(running)
        try:
            # Until the last process of the sandbox is dead, the file may change.
            running.wait()
            self._sandboxes.end(running)
            self._start_converters()  # Reading the part and writing it to the disk leave them room.
            size, digest = finish_part(self._store, output_fd, self._keys[index], own=self._order.own)
        finally:
            os.close(output_fd)
        self._made += size
        if self._order.room and self._made > self._order.room:
            raise _too_large(self._order)
        self._sandboxes.tell("part", ("key", self._keys[index]), ("bytes", str(size)), ("sha256", digest))
        left = len(self._waiting) + len(self._converting)
        self._sandboxes.tell("progress", ("text", f"{self._total - left} of {self._total} parts"))


def job_convert(
    order: Order, layers: Sequence[Layer], lowest: bool, output_fd: int, turn_fd: int
) -> Callable[[socket.socket], None]:
    """The sandbox's job: some layers to one squashfs file, which is open already."""

    def run(channel: socket.socket) -> None:
        threading.stack_size(THREAD_BYTES)
        need = Turn(turn_fd, order.memory // SMALL_PART).need
        shown = layers[0].digest if len(layers) == 1 else ""
        try:
            count = convert.pack(layers, lowest, order.limits, order.packing, f"/proc/self/fd/{output_fd}", need)
        except NeedsBase:
            protocol.send(channel, [("state", "whole")])
        except TooLarge as error:
            setting = "imports.limit_files" if "files" in str(error) else "imports.limit_bytes"
            protocol.send(channel, errors.image_too_large(order.image, str(error), setting).fields())
        except BadArchive as error:
            protocol.send(channel, errors.layer_bad(order.image, shown, f"no tar archive: {error}").fields())
        except (BadLayer, BadBlob) as error:
            protocol.send(channel, errors.layer_bad(order.image, shown, str(error)).fields())
        except FileNotFoundError as error:
            protocol.send(channel, errors.program_missing(str(error.filename)).fields())
        except MemoryError:
            detail = f"its names need more than {order.memory} bytes of memory"
            protocol.send(channel, errors.image_too_large(order.image, detail, "imports.memory").fields())
        except PackFailed as error:
            match _why_it_stops(output_fd):
                case errno.ENOSPC | errno.EDQUOT:
                    failed = errors.store_full(order.image)
                case errno.EFBIG:
                    failed = _too_large(order)
                case _:
                    failed = errors.import_failed(order.image, str(error))
            protocol.send(channel, failed.fields())
        else:
            protocol.send(channel, [("state", "packed"), ("files", str(count))])

    return run


def _why_it_stops(fd: int) -> int:
    """What the kernel says to more bytes of a file, 0 if it takes them: libsquashfs only says "I/O error"."""
    more, end = bytes(1 << 20), os.fstat(fd).st_size
    try:
        if (written := os.pwrite(fd, more, end)) < len(more):
            os.pwrite(fd, more, end + written)
    except OSError as error:
        return error.errno or 0
    return 0


def _too_large(order: Order) -> errors.EnclosError:
    """The squashfs files of an image do not fit into the cache; in a store without a limit, one is beyond the other."""
    limit, setting = (order.room, "imports.cache_size") if order.room else (order.limits.bytes, "imports.limit_bytes")
    return errors.image_too_large(order.image, f"more than {limit} bytes on disk", setting)


def finish_part(store: Store, output_fd: int, key: str, own: bool = False) -> tuple[int, str]:
    """Give a part its name, when nobody can change it any more; its size and SHA-256.

    Args:
        own: it is a user's own store: he may change it at any time.

    Raises:
        BlockingIOError: somebody still has it open for writing.
    """
    fd = os.open(f"/proc/self/fd/{output_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o444)
        # The caller's own descriptor may write; it becomes the read-only one.
        os.dup2(fd, output_fd, inheritable=False)
        if not own and not _is_settled(fd):
            if _has_leases(store):
                raise BlockingIOError(errno.EAGAIN, "somebody writes to a part")
            fd = _replace_by_copy(store, fd)
        digest = file_digest(fd)
        store.keep_part(fd, key)
        return os.fstat(fd).st_size, digest
    finally:
        os.close(fd)


def _is_settled(fd: int) -> bool:
    """Whether nobody has a file open for writing: then the kernel grants a read lease (F_SETLEASE in fcntl(2))."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _has_leases(store: Store) -> bool:
    """Whether the store's file system grants leases, for a file that nobody can be writing to; NFS does not."""
    writable_fd = store.part_file()
    try:
        fd = os.open(f"/proc/self/fd/{writable_fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(fd, writable_fd, inheritable=False)
        try:
            return _is_settled(fd)
        finally:
            os.close(fd)
    finally:
        store.drop_part(writable_fd)
        os.close(writable_fd)


def _replace_by_copy(store: Store, fd: int) -> int:
    """A copy of a part, which nobody else ever had open; the part itself is dropped, and its descriptor closed."""
    copy_fd = store.part_file()
    offset = 0
    while data := os.pread(fd, HASH_BYTES, offset):
        offset += os.pwrite(copy_fd, data, offset)
    os.fchmod(copy_fd, 0o444)
    store.drop_part(fd)
    os.close(fd)
    return copy_fd


def file_digest(fd: int) -> str:
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, HASH_BYTES, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def open_blob(work: str, layer: LayerInfo, unfinished: str) -> OpenLayer:
    """A blob in a work directory, which is the slot's: it may have put anything there.

    Args:
        unfinished: the name that it has until it is finished; "" where it is.
    """
    path = f"blobs/sha256/{layer.digest.partition(':')[2]}"
    rules = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_SYMLINKS
    directory_fd = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = linux.openat2(directory_fd, unfinished or path, os.O_RDONLY | os.O_NONBLOCK, resolve=rules)
    finally:
        os.close(directory_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EIO, "not a regular file", path)
    return OpenLayer(fd, 0, layer.bytes)
