"""Operations for named containers: files that are kept between steps, and a container that runs already.

Keep and StageBeside run as root: what is kept is mounted in the node's own mount namespace, below a directory that only
root may enter, so it outlives the agent. EnterContainer and what follows run as the user.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from enclos.runtime import errors, linux, rootfs
from enclos.runtime.builder import Builder
from enclos.runtime.linux import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
)
from enclos.runtime.operations.assembly import forbid_imports
from enclos.runtime.operations.common import in_mounts_of
from enclos.runtime.protocol import Message, send

SAFE = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
MKFS_SECONDS = 60


def is_mounted(path: str) -> bool:
    """Whether a file system of its own is mounted there."""
    try:
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class StageKept:
    """The upper layer of a named container: mounted by the step that creates it, found by those after it."""

    name: str
    path: str
    size: str
    fresh: bool
    backing: str = ""

    def describe(self) -> str:
        verb = "make" if self.fresh else "find"
        return f"{verb} what is kept of {self.name} at {self.path} ({self.backing or 'memory'}, {self.size})"

    def execute(self, builder: Builder) -> None:
        with builder.need("node") as answer, in_mounts_of(answer.fds[0]):
            if not is_mounted(self.path):
                self._mount(builder)
            builder.keep("upper", linux.clone_tree(self.path, recursive=False))
        linux.set_attributes(builder.fds["upper"], SAFE, propagation=MS_PRIVATE)

    def _mount(self, builder: Builder) -> None:
        os.makedirs(self.path, 0o700, exist_ok=True)
        if self.backing:
            mount_fd = self._mount_file(builder)
        elif self.fresh:
            owner = (("uid", str(builder.uid)), ("gid", str(builder.gid)))
            mount_fd = linux.mount_filesystem("tmpfs", (("size", self.size), ("mode", "0755"), *owner), SAFE)
        else:
            raise errors.named_lost(self.name)
        linux.move_mount(mount_fd, linux.AT_FDCWD, self.path)
        os.close(mount_fd)

    def _mount_file(self, builder: Builder) -> int:
        """A file system of fixed size in a sparse file. Only the kernel writes its structures, so it may read them."""
        if self.fresh:
            self._format()
        try:
            fd = os.open(self.backing, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise errors.named_lost(self.name) from error
        try:
            loop_fd, device = linux.loop_attach(fd, self.backing[-63:], writable=True)
        finally:
            os.close(fd)
        try:
            mount_fd = linux.mount_filesystem("ext4", (("source", device),), SAFE)
        finally:
            os.close(loop_fd)
        if self.fresh:
            os.chown(f"/proc/self/fd/{mount_fd}", builder.uid, builder.gid)
        return mount_fd

    def _format(self) -> None:
        import subprocess  # Not in the zygote: every builder would carry it.

        os.makedirs(os.path.dirname(self.backing), 0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.backing, flags, 0o600)
        try:
            os.ftruncate(fd, size_bytes(self.size))
        finally:
            os.close(fd)
        command = ["/sbin/mkfs.ext4", "-q", "-F", "-m0", "-O", "^resize_inode", "-E", "lazy_itable_init=1,nodiscard"]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        made = subprocess.run([*command, self.backing], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=MKFS_SECONDS, env=environment, check=False)  # fmt: skip
        if made.returncode != 0:
            raise errors.build_failed(f"mkfs.ext4 {self.backing}", 0)


def size_bytes(text: str) -> int:
    """A size of the settings in bytes; not for shares of the memory."""
    unit = text[-1].upper()
    power = "KMGT".find(unit) + 1
    return int(text[:-1] if power else text) << (10 * power)


@dataclass(frozen=True, slots=True)
class StageBeside:
    """Take the root of a container that runs, for another one on the same files.

    The overlay itself, not its layers: two overlays with one upper layer would not see each other's changes.
    `config` is the JSON text of an image's configuration, of a registry's; "" where the image's files say it.
    """

    config: str = ""

    def describe(self) -> str:
        return "take the root of the container that runs on the same files"

    def execute(self, builder: Builder) -> None:
        if self.config:
            builder.texts["config"] = self.config.encode()
        with builder.need("beside") as answer, in_mounts_of(answer.fds[0]):
            fd = builder.keep("beside", linux.clone_tree("/", recursive=False))
        linux.set_attributes(fd, SAFE, clear=MOUNT_ATTR_RDONLY, propagation=MS_PRIVATE)


@dataclass(frozen=True, slots=True)
class EnterRootBeside:
    """Make the root that StageBeside took this container's, too."""

    stage: str

    def describe(self) -> str:
        return "enter that root"

    def execute(self, builder: Builder) -> None:
        forbid_imports()
        root_fd = builder.fds["beside"]
        linux.move_mount(root_fd, linux.AT_FDCWD, self.stage)
        linux.enter_root(root_fd)
        builder.keep("root", root_fd)
        del builder.fds["beside"]


@dataclass(frozen=True, slots=True)
class TakeContainer:
    """Get the namespaces of a container that runs."""

    def describe(self) -> str:
        return "take the namespaces of the container that runs"

    def execute(self, builder: Builder) -> None:
        with builder.need("container") as answer:
            for name, fd in zip(answer.all("name"), answer.take_fds(), strict=True):
                builder.keep(name, fd)


@dataclass(frozen=True, slots=True)
class EnterContainer:
    """Join them as the user, who owns them."""

    def describe(self) -> str:
        return "enter them"

    def execute(self, builder: Builder) -> None:
        forbid_imports()
        kinds = {"user": CLONE_NEWUSER, "mnt": CLONE_NEWNS, "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS}
        for name, kind in kinds.items():
            linux.setns(builder.fds[name], kind)
            builder.drop(name)
        os.chdir("/")
        builder.keep("root", os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


@dataclass(frozen=True, slots=True)
class AttachRunning:
    """Attach a directory of Slurm's in a container that runs; where its root is read-only, there may be no place."""

    name: str

    def describe(self) -> str:
        return f"attach {self.name} if there is a place for it"

    def execute(self, builder: Builder) -> None:
        try:
            rootfs.attach(builder.fds["root"], builder.fds[self.name], self.name)
        except OSError as error:
            why = f"no place for {self.name} in the running container ({errors.reason(error.errno or 0)}), ignoring"
            builder.results.append(("warning", why))
        builder.drop(self.name)


def discard(channel: socket.socket, request: Message) -> int:
    """The task `discard`: `path`, perhaps `backing`, and a descriptor of the node's mount namespace.

    The files are deleted first: another mount namespace may hold a copy of the mount for as long as it likes.
    """
    (mounts_fd,) = request.fds
    path, backing = request.get("path"), request.get("backing")
    linux.setns(mounts_fd, CLONE_NEWNS)
    if is_mounted(path):
        if not backing:
            # By descriptors all the way, without following links: safe in a tree that a user made.
            import shutil  # Not in the zygote, as above.

            shutil.rmtree(path, ignore_errors=True)
        linux.unmount(path)
    with suppress(FileNotFoundError):
        os.rmdir(path)
    if backing:
        with suppress(FileNotFoundError):
            os.unlink(backing)
    send(channel, [("state", "done")])
    return 0
