"""`enclos image pull`: the importer, run from the command line into a store of files (filestore.py).

As root into the site's store: the importer is the agent's, with its sandboxes. As a user into his own: the same code,
in a user namespace of his in which he is the only id, so that its sandboxes have namespaces to live in and no rights
beyond his. Several pulls of one image, on one node or on several, meet at the store's lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from enclos.runtime import errors, linux, protocol
from enclos.runtime.images import manifest
from enclos.runtime.images.filestore import FileStore, StoredImage
from enclos.runtime.images.imports import want_of
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Limits, Order, Packing
from enclos.runtime.images.reference import Reference
from enclos.runtime.kinds import amount
from enclos.runtime.settings import Config

# (what is done, done, total): numbers are bytes or layers, total is 0 where nobody knows.
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Puller:
    """Whose pull it is, and how it is done."""

    config: Config
    progress: Progress
    auth_file: str = ""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def resolve(self, reference: Reference) -> str:
        """The digest that a reference has at its registry now."""
        with self._importer(reference, "", f"/nonexistent/{os.getpid()}") as channel:
            return _resolved(channel)[0]

    def pull(self, store: FileStore, reference: Reference, name: str = "") -> tuple[StoredImage, bool]:
        """Bring an image into a store, under its own name or another.

        Returns:
            The image, and whether it is new there.
        """
        name = name or reference.canonical()
        with self._importer(reference, reference.digest, store.work.directory) as channel:
            digest, layers = _resolved(channel)
            with store.working(digest, lambda: self.progress("waiting for another pull of the same image")):
                image = store.find(digest)
                if image is None:
                    made = self._import(store, digest, layers, reference, channel)
                    store.name(name, digest)
                    return made, True
                store.name(name, digest)
                return image, False

    def _import(
        self, store: FileStore, digest: str, layers: tuple[LayerInfo, ...], reference: Reference, channel: socket.socket
    ) -> StoredImage:
        protocol.send(channel, [("state", "build")])
        sha256 = config = ""
        for message in _messages(channel):
            match message.get("state"):
                case "progress":
                    self.progress(message.get("text"))
                case "part":
                    sha256 = message.get("sha256")
                case "done":
                    config = message.get("config")
                    break
        else:
            raise errors.import_failed(reference.text, "the importer ended")
        key = manifest.part_key([layer.digest for layer in layers], True, self._packing)
        return store.add(digest, reference.canonical(), store.work.part_path(key), config, sha256)

    @property
    def _packing(self) -> Packing:
        imports = self.config.imports
        return Packing(imports.compression, imports.level, amount(imports.block_size))

    def _order(self, reference: Reference, digest: str, work: str) -> Order:
        imports = self.config.imports
        root = os.geteuid() == 0
        home, runtime = self.environment.get("HOME", ""), self.environment.get("XDG_RUNTIME_DIR", "")
        auth_file = self.auth_file or self.environment.get("REGISTRY_AUTH_FILE", "")
        want = want_of(reference, digest, (0, 0, ()), home, auth_file, runtime)
        return Order(
            image=reference.text,
            default_registry=imports.default_registry,
            digest=digest,
            uid=0,
            gid=0,
            groups=(),
            # In the user's namespace there is but one id. Root's has one beyond those of the agent.
            slot=imports.first_uid + imports.slots if root else 0,
            store=work,
            auth_files=want.auth_files,
            netrc_files=want.netrc_files,
            limits=Limits(imports.limit_files, amount(imports.limit_bytes)),
            memory=amount(imports.memory),
            packing=self._packing,
            directory=os.getcwd(),
            whole=True,
            own=not root,
        )

    @contextlib.contextmanager
    def _importer(self, reference: Reference, digest: str, work: str) -> Iterator[socket.socket]:
        """An importer that works on this reference; it ends with its channel."""
        order_fd = os.memfd_create("enclos-order", os.MFD_CLOEXEC)
        os.write(order_fd, protocol.encode(self._order(reference, digest, work).fields()))
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "pulling" if os.geteuid() else "importer"
        code = f"import sys; sys.path[:] = {sys.path!r}; from enclos.runtime.images.{module} import main; main()"
        command = [sys.executable, "-I", "-c", code, str(theirs.fileno()), str(order_fd)]
        with mine, theirs, open(order_fd, "rb"):
            # In a group of its own: Ctrl-C is for the command, whose end the importer sees by its channel.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), order_fd], process_group=0
            )
            theirs.close()
            try:
                yield mine
            finally:
                mine.close()
                process.wait()


def main() -> None:
    """The importer of a user: in a user namespace in which he is root and nobody else exists."""
    uid, gid = os.geteuid(), os.getegid()
    linux.unshare(linux.CLONE_NEWUSER)
    linux.set_dumpable(True)  # else /proc/self belongs to root and the maps cannot be written
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1\n")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1\n")
    from enclos.runtime.images import importer

    importer.main()


def _resolved(channel: socket.socket) -> tuple[str, tuple[LayerInfo, ...]]:
    for message in _messages(channel):
        layers = (text.partition(" ") for text in message.all("layer"))
        return message.get("digest"), tuple(LayerInfo(digest, int(size)) for digest, _, size in layers)
    raise errors.import_failed("", "the importer ended")


def _messages(channel: socket.socket) -> Iterator[protocol.Message]:
    while (message := protocol.receive(channel)) is not None:
        with message:
            if message.get("state") == "error":
                parts = (message.get(part) for part in ("subject", "what", "cause", "hint"))
                raise errors.EnclosError(*parts)
            yield message
