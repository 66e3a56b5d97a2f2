"""The importer: brings one image into the node's cache. Root, but it reads nothing of what it brings.

A process of its own (importing.py starts it), one per import. It opens the user's credentials and archives as the
user, gives the work directory to the slot's uid, starts sandboxes (sandbox.py) that fetch and convert, and names a
part's file when its sandbox is dead and nobody can write to it any more. What it hears from a sandbox is digests and
numbers.

    agent -> importer   the order (Order); `build` with the parts that are there already
    importer -> agent   `resolved`, then `progress`, `part` for each new one, and `done` or `error`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import select
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enclos.runtime import errors, linux, protocol
from enclos.runtime.builder import Builder
from enclos.runtime.images import convert, fetch, local, manifest, reference, sandbox
from enclos.runtime.images.blob import BadBlob
from enclos.runtime.images.convert import Layer, PackFailed
from enclos.runtime.images.fetch import Credentials
from enclos.runtime.images.flatten import BadLayer, NeedsBase, TooLarge
from enclos.runtime.images.layout import Store
from enclos.runtime.images.local import Source
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Order
from enclos.runtime.images.reference import Reference
from enclos.runtime.images.sandbox import Rights, Sandbox
from enclos.runtime.images.tar import BadArchive
from enclos.runtime.operations.common import open_as_user

CONVERTERS = 4
HASH_BYTES = 1 << 20
FETCH_MEMORY = 2 << 30


class Unwanted(Exception):
    """The agent closed the channel: nobody waits for the image any more."""


class Whole(Exception):
    """A group of layers needs those below it: the image has to be merged as a whole."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the sandbox found out about the image."""

    digest: str
    layers: tuple[LayerInfo, ...]
    config: LayerInfo


def main() -> None:
    """Entry point of the process; argv: the channel's descriptor, and that of the order."""
    channel_fd, order_fd = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(channel_fd, False)
    with open(order_fd, "rb") as file:
        file.seek(0)
        message = protocol.Message(protocol.decode(file.read()))
    os.umask(0o077)
    with socket.socket(fileno=channel_fd) as channel:
        try:
            if message.get("verify"):
                verify(channel, message.all("verify"))
            else:
                Importer(channel, Order.read(message)).run()
        except (Unwanted, ConnectionError):
            sys.exit(1)
        except errors.EnclosError as error:
            with contextlib.suppress(ConnectionError):
                protocol.send(channel, error.fields())
            sys.exit(1)


class Importer:
    """One import from its order to its end."""

    def __init__(self, channel: socket.socket, order: Order) -> None:
        self._channel = channel
        self._order = order
        self._store = Store(order.store)
        self._reference: Reference = reference.parse(order.image, order.default_registry)
        self._running: list[Sandbox] = []
        # Of an archive or layout: the user's file or directory, and where in it the layers are.
        self._local_fd = -1
        self._sources: dict[str, Source] = {}
        self._config = ""

    def run(self) -> None:
        try:
            if self._order.digest:
                self._reference = self._reference.pinned(self._order.digest)
            credentials = self._credentials() if self._reference.is_registry else Credentials()
            resolved = self._resolve(credentials) if self._reference.is_registry else self._resolve_local()
            reuse = self._await_order()
            self._import(resolved, credentials, reuse)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise errors.store_full(self._order.image) from error
            if error.errno in (errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO, errno.ENOTDIR):
                raise errors.store_failed(self._order.image, self._order.store, error.errno) from error
            raise
        finally:
            for running in self._running:
                running.end()

    # --- the user's files -------------------------------------------------------------------------------------

    def _credentials(self) -> Credentials:
        """Open what there is of the user's credentials, as the user; nothing of it is read here."""
        order = self._order
        with self._as_user():
            found = [tuple(map(_open_text, paths)) for paths in (order.auth_files, order.netrc_files)]
        return Credentials(*(tuple(fd for fd in fds if fd >= 0) for fds in found))

    def _as_user(self) -> contextlib.AbstractContextManager[None]:
        order = self._order
        if order.own:
            return contextlib.nullcontext()
        return Builder(self._channel, order.uid, order.gid, order.groups).as_user()

    def _open_local(self) -> None:
        """Open the archive or the layout's directory, as the user."""
        image = self._order.image
        is_directory = self._reference.kind in ("oci", "dir")
        flags = os.O_PATH | os.O_DIRECTORY if is_directory else os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        try:
            with self._as_user():
                self._local_fd = open_as_user(os.path.join(self._order.directory, self._reference.path), flags)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise errors.image_not_readable(image) from error
            if error.errno == errno.ENOTDIR and is_directory:
                raise errors.image_bad_manifest(image, "it is no directory") from error
            raise errors.local_image_missing(image) from error
        if not is_directory and not stat.S_ISREG(os.fstat(self._local_fd).st_mode):
            raise errors.image_bad_manifest(image, "it is no regular file")

    def _open_inside(self, name: str) -> int:
        """A file of the layout, for a sandbox that names it: as the user, and nowhere but below his directory."""
        rules = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_SYMLINKS
        try:
            with self._as_user():
                fd = linux.openat2(self._local_fd, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=rules)
        except OSError:
            return -1
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return -1

    # --- resolving --------------------------------------------------------------------------------------------

    def _resolve(self, credentials: Credentials) -> Resolved:
        job = fetch.job_resolve(self._reference, credentials, self._order.limits.bytes)
        running = self._start("resolve", job, self._fetch_rights(1 << 20), fds=credentials.fds)
        message = self._receive(running)
        if message is None:
            raise errors.import_failed(self._order.image, _ended(running.wait()))
        layers = tuple(_layer(text) for text in message.all("layer"))
        resolved = Resolved(message.get("digest"), layers, _layer(message.get("config")))
        self._end(running)
        self._tell("resolved", ("digest", resolved.digest), ("private", message.get("private")),
                   *(("layer", f"{layer.digest} {layer.bytes}") for layer in layers))  # fmt: skip
        return resolved

    def _resolve_local(self) -> Resolved:
        """The same for an image on disk, where a sandbox without network looks."""
        self._open_local()
        archive_fd = -1 if self._reference.kind in ("oci", "dir") else self._local_fd
        job = local.job_read(self._reference, archive_fd, self._order.limits.bytes)
        rights = Rights(self._order.slot, False, self._order.memory, 1 << 20, own=self._order.own)
        running = self._start("read", job, rights, fds=[archive_fd] if archive_fd >= 0 else [])
        resolved: Resolved | None = None
        while (message := self._receive(running)) is not None:
            match message.get("state"):
                case "open":
                    self._answer_open(running, message.get("name"))
                case "resolved":
                    layers = tuple(_layer(text) for text in message.all("layer"))
                    resolved = Resolved(message.get("digest"), layers, _layer(message.get("config")))
                case "source":
                    digest, offset, size, name = message.get("source").split(" ", 3)
                    self._sources[digest] = Source(name, int(offset), int(size))
                case "config":
                    self._config = message.get("text")
        status = running.wait()
        self._end(running)
        if resolved is None or not self._config:
            raise errors.import_failed(self._order.image, _ended(status))
        self._tell("resolved", ("digest", resolved.digest), ("private", "1"),
                   *(("layer", f"{layer.digest} {layer.bytes}") for layer in resolved.layers))  # fmt: skip
        return resolved

    def _answer_open(self, running: Sandbox, name: str) -> None:
        fd = self._open_inside(name)
        try:
            protocol.send(running.channel, [("state", "given")], [fd] if fd >= 0 else [])
        finally:
            if fd >= 0:
                os.close(fd)

    def _await_order(self) -> frozenset[str]:
        """The agent's word to go on, with the parts that need not be built."""
        message = protocol.receive(self._channel)
        if message is None:
            raise Unwanted
        return frozenset(message.all("part"))

    def _fetch_rights(self, file_bytes: int) -> Rights:
        return Rights(self._order.slot, True, FETCH_MEMORY, file_bytes, own=self._order.own)

    # --- importing --------------------------------------------------------------------------------------------

    def _import(self, resolved: Resolved, credentials: Credentials, reuse: frozenset[str]) -> None:
        groups = [resolved.layers] if self._order.whole else manifest.group(resolved.layers)
        try:
            try:
                config = self._build(resolved, credentials, groups, reuse)
            except Whole:
                self._stop()
                self._tell("whole")
                config = self._build(resolved, credentials, [resolved.layers], frozenset())
        except errors.EnclosError as error:
            self._stop()
            # Blobs of a download that was cut off are worth keeping; those of an image that is no good are not.
            if not error.transient:
                self._remove_work(resolved)
            raise
        self._stop()
        self._remove_work(resolved)
        # The last word: the agent may end this process at once.
        self._tell("done", ("config", config))

    def _build(
        self, resolved: Resolved, credentials: Credentials, groups: Sequence[Sequence[LayerInfo]], reuse: frozenset[str]
    ) -> str:
        keys = [
            manifest.part_key([layer.digest for layer in group], index == 0, self._order.packing)
            for index, group in enumerate(groups)
        ]
        wanted = [index for index, key in enumerate(keys) if key not in reuse]
        if not self._reference.is_registry:
            return Build(self, None, groups, keys, wanted, self._open_source, self._config).run()
        needed = {layer.digest for index in wanted for layer in groups[index]}
        self._prepare_work(resolved, needed)
        largest = max([layer.bytes for layer in resolved.layers], default=0)
        job = fetch.job_download(self._reference, credentials, resolved.digest, resolved.layers, resolved.config)
        work = self._store.work_path(resolved.digest, self._order.uid)
        fetcher = self._start("fetch", job, self._fetch_rights(largest + (1 << 20)), work, credentials.fds)


        def open_blob(digest: str) -> tuple[int, int, int | None]:
            return _open_blob(f"{work}/blobs/sha256/{digest.partition(':')[2]}"), 0, None

        return Build(self, fetcher, groups, keys, wanted, open_blob).run()

    def _open_source(self, digest: str) -> tuple[int, int, int | None]:
        """A layer of an image on disk: a file of the layout, or a part of the archive."""
        source = self._sources[digest]
        if source.name:
            fd = self._open_inside(source.name)
        else:
            # Not a copy of the descriptor: converters read side by side, each from a place of its own.
            with self._as_user():
                fd = os.open(f"/proc/self/fd/{self._local_fd}", os.O_RDONLY | os.O_CLOEXEC)
        if fd < 0:
            raise errors.image_bad_manifest(self._order.image, "a layer of it cannot be opened any more")
        return fd, source.offset, source.bytes

    def _prepare_work(self, resolved: Resolved, needed: set[str]) -> None:
        """The work directory, the slot's now. An empty file stands for a layer that need not be fetched (fetch.py)."""
        work = self._store.work_path(resolved.digest, self._order.uid)
        blobs = f"{work}/blobs/sha256"
        os.makedirs(blobs, 0o700, exist_ok=True)
        for layer in resolved.layers:
            path = f"{blobs}/{layer.digest.partition(':')[2]}"
            if layer.digest not in needed and not os.path.lexists(path):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            elif layer.digest in needed and os.path.lexists(path) and os.lstat(path).st_size == 0:
                os.unlink(path)
        for directory, names, files in os.walk(work):
            for path in (directory, *(os.path.join(directory, name) for name in [*names, *files])):
                os.chown(path, self._order.slot, self._order.slot, follow_symlinks=False)

    def _remove_work(self, resolved: Resolved) -> None:
        # rmtree() of this Python does not follow symlinks that appear, and nobody is left to make some.
        shutil.rmtree(self._store.work_path(resolved.digest, self._order.uid), ignore_errors=True)

    # --- sandboxes --------------------------------------------------------------------------------------------

    def _start(
        self, name: str, job: sandbox.Job, rights: Rights, work: str = "", fds: Sequence[int] = ()
    ) -> Sandbox:
        running = sandbox.start(name, job, rights, work, fds)
        self._running.append(running)
        return running

    def _end(self, running: Sandbox) -> None:
        self._running.remove(running)
        running.end()

    def _stop(self) -> None:
        while self._running:
            self._running.pop().end()

    def _receive(self, running: Sandbox) -> protocol.Message | None:
        """The next message of one sandbox, while the agent is there; raises the error that it reports."""
        (ready,) = self.await_any([running])[:1]
        return self.message_of(ready)

    def await_any(self, sandboxes: Sequence[Sandbox]) -> list[Sandbox]:
        """Wait until some of these have something to say, or have ended. Raises Unwanted."""
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        by_fd = {running.channel.fileno(): running for running in sandboxes}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poller.poll()]
        if self._channel.fileno() in ready:
            raise Unwanted  # It says nothing while this works: it has closed.
        return [by_fd[fd] for fd in ready]

    @staticmethod
    def message_of(running: Sandbox) -> protocol.Message | None:
        """What a sandbox says; None at its end. Raises the error that it reports."""
        try:
            message = protocol.receive(running.channel)
        except ConnectionError:
            return None
        if message is not None:
            message.close()  # A sandbox has no descriptors to give.
            if message.get("state") == "error":
                parts = (message.get(part) for part in ("subject", "what", "cause", "hint"))
                raise errors.EnclosError(*parts, transient=message.get("transient") == "1")
        return message

    def _tell(self, state: str, *fields: tuple[str, str]) -> None:
        protocol.send(self._channel, [("state", state), *fields])


class Build:
    """Fetching and converting side by side: a group of layers is converted as soon as its last blob is there."""

    def __init__(
        self,
        importer: Importer,
        fetcher: Sandbox | None,
        groups: Sequence[Sequence[LayerInfo]],
        keys: Sequence[str],
        wanted: Sequence[int],
        open_blob: Callable[[str], tuple[int, int, int | None]],
        config: str | None = None,
    ) -> None:
        """`open_blob` gives descriptor, offset and length of a layer's blob. Without a fetcher all are there."""
        self._importer = importer
        self._order = importer._order
        self._fetcher = fetcher
        self._open_blob = open_blob
        self._groups = groups
        self._keys = keys
        self._waiting = list(wanted)
        self._total = len(wanted)
        everything = {layer.digest for group in groups for layer in group}
        self._arrived: set[str] = set() if fetcher is not None else everything
        self._converting: dict[Sandbox, tuple[int, int]] = {}
        self._config = config
        self._made = 0

    def run(self) -> str:
        """Make all parts that are wanted; the image's configuration."""
        try:
            while self._fetcher is not None or self._waiting or self._converting:
                self._start_converters()
                fetchers = [self._fetcher] if self._fetcher is not None else []
                for ready in self._importer.await_any([*fetchers, *self._converting]):
                    if ready is self._fetcher:
                        self._hear_fetcher(ready)
                    else:
                        self._hear_converter(ready)
        finally:
            for _, output_fd in self._converting.values():
                self._importer._store.drop_part(output_fd)
                os.close(output_fd)
        return self._config or "{}"

    def _hear_fetcher(self, fetcher: Sandbox) -> None:
        message = self._importer.message_of(fetcher)
        if message is None:
            status = fetcher.wait()
            self._importer._end(fetcher)
            self._fetcher = None
            if self._config is None:
                raise errors.import_failed(self._order.image, _ended(status))
            missing = {layer.digest for index in self._waiting for layer in self._groups[index]} - self._arrived
            if missing:
                raise errors.import_failed(self._order.image, "a layer did not arrive")
        elif message.get("state") == "blob":
            self._arrived.add(message.get("digest"))
        elif message.get("state") == "config":
            self._config = message.get("text")

    def _start_converters(self) -> None:
        limit = min(os.cpu_count() or 1, CONVERTERS)
        for index in list(self._waiting):
            if len(self._converting) >= limit:
                break
            if all(layer.digest in self._arrived for layer in self._groups[index]):
                self._waiting.remove(index)
                self._convert(index)

    def _convert(self, index: int) -> None:
        order = self._order
        group = self._groups[index]
        output_fd = self._importer._store.part_file()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, output_fd)
            os.fchown(output_fd, order.slot, order.slot)
            layers: list[Layer] = []
            blobs: list[int] = []
            for layer in group:
                fd, offset, size = self._open_blob(layer.digest)
                stack.callback(os.close, fd)
                blobs.append(fd)
                layers.append(Layer(functools.partial(os.dup, fd), layer.digest, offset, size))
            job = job_convert(order, layers, index == 0, output_fd)
            rights = Rights(order.slot, False, order.memory, self._room(), own=order.own)
            running = self._importer._start("convert", job, rights, fds=[output_fd, *blobs])
            self._converting[running] = (index, os.dup(output_fd))

    def _room(self) -> int:
        """Bytes that the next file may have. Those that are made beside it are counted when they are finished."""
        order = self._order
        return min(order.limits.bytes, order.room - self._made) if order.room else order.limits.bytes

    def _hear_converter(self, running: Sandbox) -> None:
        message = self._importer.message_of(running)
        if message is None:
            raise errors.import_failed(self._order.image, _ended(running.wait()))
        if message.get("state") == "whole":
            raise Whole
        index, output_fd = self._converting.pop(running)
        try:
            # Until the last process of the sandbox is dead, the file may change.
            running.wait()
            self._importer._end(running)
            size, digest = finish_part(self._importer._store, output_fd, self._keys[index], own=self._order.own)
        finally:
            os.close(output_fd)
        self._made += size
        if self._order.room and self._made > self._order.room:
            raise _too_large(self._order)
        self._importer._tell("part", ("key", self._keys[index]), ("bytes", str(size)), ("sha256", digest))
        left = len(self._waiting) + len(self._converting)
        self._importer._tell("progress", ("text", f"{self._total - left} of {self._total} parts"))


def job_convert(
    order: Order, layers: Sequence[Layer], lowest: bool, output_fd: int
) -> Callable[[socket.socket], None]:
    """The sandbox's job: some layers to one squashfs file, which is open already."""

    def run(channel: socket.socket) -> None:
        shown = layers[0].digest if len(layers) == 1 else ""
        try:
            convert.pack(layers, lowest, order.limits, order.packing, f"/proc/self/fd/{output_fd}")
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
            protocol.send(channel, [("state", "packed")])

    return run


def _why_it_stops(fd: int) -> int:
    """What the kernel says to more bytes of a file, 0 if it takes them: tar2sqfs only says "I/O error"."""
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
        own: it is a user's own store: he may change it at any time, and NFS gives no leases.

    Raises:
        BlockingIOError: somebody still has it open for writing.
    """
    fd = os.open(f"/proc/self/fd/{output_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o444)
        # The caller's own descriptor may write; it becomes the read-only one.
        os.dup2(fd, output_fd, inheritable=False)
        # The kernel grants a read lease on a file that nobody has open for writing (F_SETLEASE in fcntl(2)).
        if not own:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        digest = file_digest(fd)
        store.keep_part(fd, key)
        return os.fstat(fd).st_size, digest
    finally:
        os.close(fd)


def verify(channel: socket.socket, wanted: Sequence[str]) -> None:
    """Compare files of the cache with their SHA-256, each `HEX PATH`: what is read is only hashed."""
    intact = True
    for text in wanted:
        digest, _, path = text.partition(" ")
        try:
            with open(path, "rb", buffering=0) as file:
                intact = intact and file_digest(file.fileno()) == digest
        except OSError:
            intact = False  # Not there any more, or the disk cannot read it.
    protocol.send(channel, [("state", "intact" if intact else "damaged")])


def file_digest(fd: int) -> str:
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, HASH_BYTES, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def _open_text(path: str) -> int:
    """A regular file of the user's, or -1: missing or unreadable credentials are none."""
    try:
        fd = open_as_user(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def _open_blob(path: str) -> int:
    """A blob in a directory that is the slot's: it may have put anything there."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EIO, "not a regular file", path)
    return fd


def _layer(text: str) -> LayerInfo:
    digest, _, size = text.partition(" ")
    return LayerInfo(digest, int(size))


def _ended(status: int) -> str:
    if status > 128:
        return f"the importer was ended by signal {status - 128}"
    return f"the importer ended with {status}"
