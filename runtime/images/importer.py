"""The importer: brings one image into the node's cache. Root, but it reads nothing of what it brings.

A process of its own (importing.py starts it), one per import. It opens the user's credentials and archives as the
user, gives the work directory to the slot's uid, and starts sandboxes (sandbox.py) that fetch and convert (parts.py).
What it hears from a sandbox is digests and numbers.

    agent -> importer   the order (Order); `build` with the parts that are there already
    importer -> agent   `resolved`, then `progress`, `part` for each new one, and `done` or `error`
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from enclos.runtime import errors, linux, protocol
from enclos.runtime.asuser import as_user, open_as_user
from enclos.runtime.images import fetch, local, manifest, reference
from enclos.runtime.images.fetch import Credentials
from enclos.runtime.images.layout import Store
from enclos.runtime.images.local import Source
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Order
from enclos.runtime.images.parts import Build, OpenLayer, Whole, open_blob
from enclos.runtime.images.reference import Reference
from enclos.runtime.images.sandbox import Rights, Sandbox
from enclos.runtime.images.sandboxes import Sandboxes, Unwanted, ended

CONVERTERS = 4
FETCH_MEMORY = 2 << 30


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
        self._sandboxes = Sandboxes(channel)
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
            self._sandboxes.stop()

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
        return as_user(order.uid, order.gid, order.groups)

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
        running = self._sandboxes.start("resolve", job, self._fetch_rights(1 << 20), fds=credentials.fds)
        message = self._sandboxes.receive(running)
        if message is None:
            raise errors.import_failed(self._order.image, ended(running.wait()))
        layers = tuple(_layer(text) for text in message.all("layer"))
        resolved = Resolved(message.get("digest"), layers, _layer(message.get("config")))
        self._sandboxes.end(running)
        self._sandboxes.tell("resolved", ("digest", resolved.digest), ("private", message.get("private")),
                   *(("layer", f"{layer.digest} {layer.bytes}") for layer in layers))  # fmt: skip
        return resolved

    def _resolve_local(self) -> Resolved:
        """The same for an image on disk, where a sandbox without network looks."""
        self._open_local()
        archive_fd = -1 if self._reference.kind in ("oci", "dir") else self._local_fd
        job = local.job_read(self._reference, archive_fd, self._order.limits.bytes)
        rights = Rights(self._order.slot, False, self._order.memory, 1 << 20, own=self._order.own)
        running = self._sandboxes.start("read", job, rights, fds=[archive_fd] if archive_fd >= 0 else [])
        resolved: Resolved | None = None
        while (message := self._sandboxes.receive(running)) is not None:
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
        self._sandboxes.end(running)
        if resolved is None or not self._config:
            raise errors.import_failed(self._order.image, ended(status))
        self._sandboxes.tell("resolved", ("digest", resolved.digest), ("private", "1"),
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
                self._sandboxes.stop()
                self._sandboxes.tell("whole")
                config = self._build(resolved, credentials, [resolved.layers], frozenset())
        except (errors.EnclosError, OSError) as error:
            self._sandboxes.stop()
            # Blobs of a download that was cut off are worth keeping; of an image that is no good, or on a disk where
            # not even a file can be made, they are not.
            if not (isinstance(error, errors.EnclosError) and error.transient):
                self._remove_work(resolved)
            raise
        self._sandboxes.stop()
        self._remove_work(resolved)
        # The last word: the agent may end this process at once.
        self._sandboxes.tell("done", ("config", config))

    def _build(
        self, resolved: Resolved, credentials: Credentials, groups: Sequence[Sequence[LayerInfo]], reuse: frozenset[str]
    ) -> str:
        keys = [
            manifest.part_key([layer.digest for layer in group], index == 0, self._order.packing)
            for index, group in enumerate(groups)
        ]
        wanted = [index for index, key in enumerate(keys) if key not in reuse]
        build = Build(self._sandboxes, self._order, groups, keys, wanted)
        if not self._reference.is_registry:
            return build.run(self._open_source, config=self._config)
        needed = {layer.digest for index in wanted for layer in groups[index]}
        self._prepare_work(resolved, needed)
        largest = max([layer.bytes for layer in resolved.layers], default=0)
        job = fetch.job_download(self._reference, credentials, resolved.digest, resolved.layers, resolved.config)
        work = self._store.work_path(resolved.digest, self._order.uid)
        fetcher = self._sandboxes.start("fetch", job, self._fetch_rights(largest + (1 << 20)), work, credentials.fds)
        return build.run(functools.partial(open_blob, work), fetcher)

    def _open_source(self, layer: LayerInfo, unfinished: str) -> OpenLayer:
        """A layer of an image on disk: a file of the layout, or a part of the archive."""
        source = self._sources[layer.digest]
        fd = self._open_inside(source.name) if source.name else os.dup(self._local_fd)
        if fd < 0:
            raise errors.image_bad_manifest(self._order.image, "a layer of it cannot be opened any more")
        return OpenLayer(fd, source.offset, source.bytes)

    def _prepare_work(self, resolved: Resolved, needed: set[str]) -> None:
        """The work directory, the slot's now. An empty file stands for a layer that need not be fetched (fetch.py)."""
        work = self._store.work_path(resolved.digest, self._order.uid)
        blobs = f"{work}/blobs/sha256"
        if os.path.islink(f"{work}/blobs") or os.path.islink(blobs):
            shutil.rmtree(work)  # An import before this one was led astray.
        for directory in (work, f"{work}/blobs", blobs):
            # A fetcher that a registry had taken over could have left a link for root to follow.
            if os.path.lexists(directory) and not stat.S_ISDIR(os.lstat(directory).st_mode):
                os.unlink(directory)
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
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


def _layer(text: str) -> LayerInfo:
    digest, _, size = text.partition(" ")
    return LayerInfo(digest, int(size))
