"""Operations as root, in the agent's mount namespace: what only root may mount, and what must be known before.

They attach nothing: each leaves a detached mount, a descriptor or a text with the builder.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from enclos.runtime import errors, linux, rootfs
from enclos.runtime.asuser import open_as_user
from enclos.runtime.builder import Builder
from enclos.runtime.devices.cdi import Node
from enclos.runtime.images import origin, sif, squashfs
from enclos.runtime.images.filekey import file_key
from enclos.runtime.linux import (
    CLONE_NEWNET,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_SLAVE,
)
from enclos.runtime.operations.common import where_users_paths_are
from enclos.runtime.operations.parts import mount_lower


@dataclass(frozen=True, slots=True)
class JoinNetwork:
    """Enter the job's network namespace, which the agent makes meanwhile: sysfs shows the namespace of its mounter."""

    def describe(self) -> str:
        return "join the network namespace, take its /etc/hosts"

    def execute(self, builder: Builder) -> None:
        with builder.need("net") as answer:
            linux.setns(answer.fds[0], CLONE_NEWNET)
            for hosts_fd in answer.fds[1:]:
                size = os.fstat(hosts_fd).st_size
                builder.texts["hosts"] = os.pread(hosts_fd, size, 0)


@dataclass(frozen=True, slots=True)
class StageFilesystem:
    """Make a file system that only root may mount (proc and sysfs of namespaces that root owns)."""

    name: str
    fstype: str
    options: tuple[tuple[str, str | None], ...] = ()
    attributes: int = 0

    def describe(self) -> str:
        options = ",".join(key if value is None else f"{key}={value}" for key, value in self.options)
        return f"stage {self.fstype} as {self.name} ({options or 'no options'}; {self.attributes:#x})"

    def execute(self, builder: Builder) -> None:
        builder.keep(self.name, linux.mount_filesystem(self.fstype, self.options, self.attributes))


@dataclass(frozen=True, slots=True)
class StageProc:
    """The proc of slurmstepd's pid namespace, where that is the job's own: that of the agent's shows other pids.

    A new proc is that of the pid namespace its maker is in (fs/proc/root.c, proc_init_fs_context), and only a child can
    be in another one.
    """

    name: str
    stepd_pid: int
    options: tuple[tuple[str, str | None], ...]
    attributes: int

    def describe(self) -> str:
        return f"stage proc of the job's pid namespace as {self.name}"

    def execute(self, builder: Builder) -> None:
        own_fd = os.open("/proc/self/ns/pid", os.O_RDONLY)
        job_fd = os.open(f"/proc/{self.stepd_pid}/ns/pid", os.O_RDONLY)
        ours, childs = socket.socketpair()
        with ours, childs:
            linux.setns(job_fd, linux.CLONE_NEWPID)
            child = os.fork()
            if child == 0:
                self._send_proc(childs)
            linux.setns(own_fd, linux.CLONE_NEWPID)
            os.waitpid(child, 0)
            os.close(own_fd)
            os.close(job_fd)
            error, fds, _, _ = socket.recv_fds(ours, 16, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        if not fds:
            number = int(error)
            raise OSError(number, os.strerror(number), "proc of the job's pid namespace")
        builder.keep(self.name, fds[0])

    def _send_proc(self, channel: socket.socket) -> NoReturn:
        """In the child: the mount, or the number of the error."""
        try:
            fd = linux.mount_filesystem("proc", self.options, self.attributes)
            socket.send_fds(channel, [b"0"], [fd])
        except OSError as error:
            channel.send(str(error.errno).encode())
        finally:
            os._exit(0)


@dataclass(frozen=True, slots=True)
class StageDevices:
    """A /dev that holds just what the step may use: nodes that only root can make, on a tmpfs of root's.

    Each node is copied from the host's with its owner and mode, so the kernel's own check of who may open it
    stays what it is outside; what a CDI file says of owner and mode is not heeded. Slurm's device cgroup decides on
    top, for the tasks are in it as any step's.
    """

    name: str
    nodes: tuple[str, ...]
    attributes: int = MOUNT_ATTR_NOSUID

    def describe(self) -> str:
        return f"stage devices as {self.name}: {' '.join(self.nodes)}"

    def execute(self, builder: Builder) -> None:
        options = (("mode", "0755"), ("size", "64k"), ("nr_inodes", "1k"))
        fd = builder.keep(self.name, linux.mount_filesystem("tmpfs", options, self.attributes))
        for directory in ("pts", "shm", "mqueue"):
            os.mkdir(directory, 0o755, dir_fd=fd)
        for path in self.nodes:
            self._copy_node(fd, path)
        for node in builder.devices.nodes:
            if node.path not in self.nodes:
                self._copy_device(fd, node)
        links = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1"}
        links |= {"stderr": "/proc/self/fd/2", "core": "/proc/kcore"}
        for link, destination in links.items():
            os.symlink(destination, link, dir_fd=fd)

    @staticmethod
    def _copy_node(dev_fd: int, path: str) -> None:
        try:
            node = os.stat(path)
        except FileNotFoundError as error:
            raise errors.device_missing(path) from error
        if not _is_device(node):
            raise errors.not_a_device(path)
        _make_node(dev_fd, path, node)

    @staticmethod
    def _copy_device(dev_fd: int, wanted: Node) -> None:
        try:
            node = os.stat(wanted.host_path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if wanted.optional:
                return
            raise errors.cdi_node_missing(wanted.file, wanted.host_path) from error
        if not _is_device(node):
            raise errors.cdi_node_missing(wanted.file, wanted.host_path)
        _make_node(dev_fd, wanted.path, node)


def _make_node(dev_fd: int, path: str, node: os.stat_result) -> None:
    """A node of the same numbers, owner and mode, below the directory that becomes /dev."""
    inside = path.removeprefix("/dev/")
    parent = os.path.dirname(inside)
    if parent:
        os.close(rootfs.make_directories(dev_fd, parent))
    os.mknod(inside, node.st_mode, node.st_rdev, dir_fd=dev_fd)
    os.chown(inside, node.st_uid, node.st_gid, dir_fd=dev_fd)
    os.chmod(inside, stat.S_IMODE(node.st_mode), dir_fd=dev_fd)  # mknod applies the umask


def _is_device(node: os.stat_result) -> bool:
    return stat.S_ISCHR(node.st_mode) or stat.S_ISBLK(node.st_mode)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """Open the image as the user, and make it the lower layer.

    A squashfs file is mounted once per node; this builder mounts it if no other has. The kernel parses only
    files that root wrote, unless the site trusts its users' images; others are served by squashfuse. `config` is what
    a store says about a file of its own.

    For a named container (`name`) it has to be the image that the container was created from (`wanted_key`).
    """

    path: str
    user_files: str
    name: str = ""
    wanted_key: str = ""
    config: str = ""

    def describe(self) -> str:
        return f"open image {self.path}" + (f", as it was when {self.name} was created" if self.wanted_key else "")

    def execute(self, builder: Builder) -> None:
        builder.image_path = self.path
        if self.config:
            builder.texts["config"] = self.config.encode(errors="surrogateescape")
        with where_users_paths_are(builder), builder.as_user():
            fd = builder.keep("image", self._open())
            status = os.fstat(fd)
            extent = self._find(fd) if stat.S_ISREG(status.st_mode) else sif.Extent()
        if self.name:
            self._recognise(builder, status)
        if stat.S_ISDIR(status.st_mode):
            builder.image_is_directory = True  # CloneDirectoryImage goes on with it.
        elif stat.S_ISREG(status.st_mode):
            if self.user_files == "trust" or _is_roots(fd, status):
                # squashfuse shows root's files as the user's also where the kernel can't.
                if not mount_lower(builder, "lower", fd, self.path, extent):
                    self._serve(builder, fd, extent)
            elif self.user_files == "fuse":
                self._serve(builder, fd, extent)
            else:
                raise errors.image_untrusted(self.path)
        else:
            raise errors.image_wrong_kind(self.path)
        builder.drop("image")

    def _open(self) -> int:
        try:
            # Non-blocking: a FIFO by that name must not hold up the build.
            return open_as_user(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise errors.image_not_readable(self.path) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise errors.image_not_found(self.path) from error
            raise

    def _recognise(self, builder: Builder, status: os.stat_result) -> None:
        """What was written into a named container is a change to one image, and to no other."""
        key = f"{status.st_dev:x}-{status.st_ino:x}" if stat.S_ISDIR(status.st_mode) else file_key(status)
        if self.wanted_key not in ("", key):
            raise errors.named_image_changed(self.name, self.path)
        builder.results.append(("image_key", key))

    def _find(self, fd: int) -> sif.Extent:
        """Where in the file its squashfs is: it is one, or a SIF file that has one."""
        try:
            extent = sif.find_root(fd, os.uname().machine) if sif.is_sif(fd) else sif.Extent()
            squashfs.check_superblock(fd, extent.offset, extent.size)
            return extent
        except sif.BadSif as error:
            raise errors.image_sif_unusable(self.path, str(error)) from error
        except squashfs.NotSquashfs as error:
            raise errors.not_squashfs(self.path) from error
        except squashfs.Truncated as error:
            raise errors.image_truncated(self.path, error.wanted_bytes, error.file_bytes) from error

    def _serve(self, builder: Builder, fd: int, extent: sif.Extent) -> None:
        """Have the agent start a server for the file; AwaitServer finds out whether it can read it."""
        with builder.need("server", ("offset", str(extent.offset)), fds=[fd]) as answer:
            for name, given in zip(("lower", "complaints"), answer.take_fds(), strict=True):
                builder.keep(name, given)



@dataclass(frozen=True, slots=True)
class CloneHostPath:
    """Take a file or directory of the host that the site, not the user, chose; looked up as root."""

    name: str
    path: str
    attributes: int = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY

    def describe(self) -> str:
        return f"clone host path {self.path} as {self.name} ({self.attributes:#x})"

    def execute(self, builder: Builder) -> None:
        fd = builder.keep(self.name, linux.clone_tree(self.path, recursive=False))
        linux.set_attributes(fd, self.attributes, propagation=MS_SLAVE)


@dataclass(frozen=True, slots=True)
class StageText:
    """Read a small text of the host, as root, for a file inside; a missing one counts as empty."""

    name: str
    path: str

    def describe(self) -> str:
        return f"read {self.path} of the host"

    def execute(self, builder: Builder) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                builder.texts[self.name] = file.read(rootfs.READ_LIMIT_BYTES) or b""
        except FileNotFoundError:
            builder.texts[self.name] = b""


@dataclass(frozen=True, slots=True)
class LookUpAccounts:
    """Find the names of the user and his groups now: inside the image, NSS would load the image's libraries.

    `others` are names of the node's users that programs inside will look up.
    """

    others: tuple[str, ...] = ()

    def describe(self) -> str:
        return " and of ".join(["look up the names of the user and his groups", *self.others])

    def execute(self, builder: Builder) -> None:
        try:
            builder.user_name = pwd.getpwuid(builder.uid).pw_name
        except KeyError:
            builder.user_name = f"u{builder.uid}"
        for name in self.others:
            with suppress(KeyError):
                found = pwd.getpwnam(name)
                builder.other_users.append((name, found.pw_uid, found.pw_gid))
        for group_id in (builder.gid, *builder.groups):
            try:
                builder.group_names.append((grp.getgrgid(group_id).gr_name, group_id))
            except KeyError:
                builder.group_names.append((f"g{group_id}", group_id))


def _is_roots(fd: int, status: os.stat_result) -> bool:
    """Only root can have written the file."""
    return status.st_uid == 0 and not status.st_mode & 0o022 and not origin.vouched_for_by_user(fd)
