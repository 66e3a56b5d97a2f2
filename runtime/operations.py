"""The operations of a plan: each says what it does (`describe`) and does it (`execute`).

Every mount, namespace and identity change of a container is here, in small steps that a fault test can interrupt
anywhere. The order of the steps is plan.py's. Runs in a builder: as root up to BecomeUser, as the user after it.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from enclos.runtime import environment, errors, etcfiles, linux, rootfs
from enclos.runtime.builder import Builder
from enclos.runtime.images import origin, squashfs
from enclos.runtime.linux import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MOUNT_ATTR_IDMAP,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_SLAVE,
)

NOT_ALONE = "the source has other mounts below it, which 'bind' would uncover; use 'rbind'"

# ENOSPC is how the kernel words a limit of user namespaces (user_namespaces(7)).
NO_NAMESPACES = (errno.ENOSPC, errno.EPERM, errno.EUSERS)


class Operation(Protocol):
    """One step of making a container."""

    def describe(self) -> str: ...

    def execute(self, builder: Builder) -> None: ...


# --- as root, in the agent's mount namespace ------------------------------------------------------------------


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
class StageDevices:
    """A /dev that holds just what the step may use: nodes that only root can make, on a tmpfs of root's.

    Each node is copied from the host's with its owner and mode, so the kernel's own check of who may open it
    stays what it is outside.
    """

    name: str
    nodes: tuple[str, ...]
    attributes: int = MOUNT_ATTR_NOSUID

    def describe(self) -> str:
        return f"stage devices as {self.name}: {' '.join(self.nodes)}"

    def execute(self, builder: Builder) -> None:
        options = (("mode", "0755"), ("size", "64k"), ("nr_inodes", "1k"))
        fd = builder.keep(self.name, linux.mount_filesystem("tmpfs", options, self.attributes))
        for path in self.nodes:
            self._copy_node(fd, path)
        for directory in ("pts", "shm", "mqueue"):
            os.mkdir(directory, 0o755, dir_fd=fd)
        links = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1"}
        links |= {"stderr": "/proc/self/fd/2", "core": "/proc/kcore"}
        for link, destination in links.items():
            os.symlink(destination, link, dir_fd=fd)

    @staticmethod
    def _copy_node(dev_fd: int, path: str) -> None:
        node = os.stat(path)
        if not (stat.S_ISCHR(node.st_mode) or stat.S_ISBLK(node.st_mode)):
            raise errors.not_a_device(path)
        inside = path.removeprefix("/dev/")
        parent = os.path.dirname(inside)
        if parent:
            os.close(rootfs.make_directories(dev_fd, parent))
        os.mknod(inside, node.st_mode, node.st_rdev, dir_fd=dev_fd)
        os.chown(inside, node.st_uid, node.st_gid, dir_fd=dev_fd)
        os.chmod(inside, stat.S_IMODE(node.st_mode), dir_fd=dev_fd)  # mknod applies the umask


@dataclass(frozen=True, slots=True)
class OpenImage:
    """Open the image as the user, and make it the lower layer.

    A squashfs file is mounted once per node; this builder mounts it if no other has. The kernel parses only
    files that root wrote, unless the site trusts its users' images.
    """

    path: str
    trust_user_files: bool

    def describe(self) -> str:
        return f"open image {self.path}"

    def execute(self, builder: Builder) -> None:
        builder.image_path = self.path
        with builder.as_user():
            fd = builder.keep("image", self._open())
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                self._check(fd)
        if stat.S_ISDIR(status.st_mode):
            builder.image_is_directory = True  # CloneDirectoryImage goes on with it.
        elif stat.S_ISREG(status.st_mode):
            if not (self.trust_user_files or _is_roots(fd, status)):
                raise errors.image_untrusted(self.path)
            self._mount_squashfs(builder, fd, status)
        else:
            raise errors.image_wrong_kind(self.path)
        builder.drop("image")

    def _open(self) -> int:
        try:
            # Non-blocking: a FIFO by that name must not hold up the build.
            return _open_as_user(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise errors.image_not_readable(self.path) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise errors.image_not_found(self.path) from error
            raise

    def _check(self, fd: int) -> None:
        try:
            squashfs.check_superblock(fd)
        except squashfs.NotSquashfs as error:
            raise errors.not_squashfs(self.path) from error
        except squashfs.Truncated as error:
            raise errors.image_truncated(self.path, error.wanted_bytes, error.file_bytes) from error

    def _mount_squashfs(self, builder: Builder, fd: int, status: os.stat_result) -> None:
        """Show the image as the user's: on-disk owner 0 becomes the job's uid on this clone of the mount."""
        key = f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
        with builder.need("image", ("key", key), ("path", self.path)) as answer:
            mount_fd, idmap_fd = -1, -1
            for name, given in zip(answer.all("name"), answer.take_fds(), strict=True):
                builder.keep(name, given)
            mount_fd = builder.fds.get("mounted", -1)
            idmap_fd = builder.fds.get("idmap", -1)
        if mount_fd < 0:
            mount_fd = self._attach_loop(builder, fd, key)
        if idmap_fd < 0:
            maps = f"0 {builder.uid} 1\n", f"0 {builder.gid} 1\n"
            try:
                idmap_fd = builder.keep("idmap", linux.userns_with_map(*maps))
            except OSError as error:
                if error.errno in NO_NAMESPACES:
                    raise errors.userns_forbidden(_words(error)) from error
                raise
            builder.give("idmap", idmap_fd)
        lower = builder.keep("lower", linux.clone_tree("", mount_fd, recursive=False))
        attributes = MOUNT_ATTR_IDMAP | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY
        linux.set_attributes(lower, attributes, propagation=MS_PRIVATE, userns_fd=idmap_fd)
        builder.drop("mounted")
        builder.drop("idmap")

    def _attach_loop(self, builder: Builder, fd: int, key: str) -> int:
        """Mount the file through a loop device that the kernel frees with its last mount.

        The agent attaches the mount in its own mount namespace: before Linux 6.15 a detached mount
        can't be cloned.
        """
        loop_fd, device = linux.loop_attach(fd, self.path[-63:])
        try:
            options = (("source", device),)
            attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY
            mount_fd = linux.mount_filesystem("squashfs", (*options, ("ro", None)), attributes)
        except OSError as error:
            raise errors.image_damaged(self.path, _words(error)) from error
        finally:
            os.close(loop_fd)
        builder.give("image", mount_fd, ("key", key))
        os.close(mount_fd)
        with builder.need("attached", ("key", key)) as answer:
            return builder.keep("mounted", answer.take_fds()[0])


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
    """Find the names of the user and his groups now: inside the image, NSS would load the image's libraries."""

    def describe(self) -> str:
        return "look up the names of the user and his groups"

    def execute(self, builder: Builder) -> None:
        try:
            builder.user_name = pwd.getpwuid(builder.uid).pw_name
        except KeyError:
            builder.user_name = f"u{builder.uid}"
        for group_id in (builder.gid, *builder.groups):
            try:
                builder.group_names.append((grp.getgrgid(group_id).gr_name, group_id))
            except KeyError:
                builder.group_names.append((f"g{group_id}", group_id))


# --- from here on as the user ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BecomeUser:
    """Take the job's ids and keep only CAP_SYS_ADMIN, with which a user namespace may be made anywhere.

    A change of uid resets the dumpable flag to fs.suid_dumpable and clears the death signal (prctl(2)), so both
    are set again: a dumpable process would show its memory to the user through /proc/PID/mem.
    """

    def describe(self) -> str:
        return "become the user, keep CAP_SYS_ADMIN"

    def execute(self, builder: Builder) -> None:
        linux.keep_capabilities_and_become(builder.uid, builder.gid, builder.groups, 1 << linux.CAP_SYS_ADMIN)
        linux.set_dumpable(False)
        linux.set_parent_death_signal(9)


@dataclass(frozen=True, slots=True)
class EnterUserNamespace:
    """Make the user namespace; the user owns it, and the agent writes its maps."""

    uid_map: str
    gid_map: str
    deny_setgroups: bool = True

    def describe(self) -> str:
        lines = " ".join(self.uid_map.split("\n")).strip(), " ".join(self.gid_map.split("\n")).strip()
        return f"make the user namespace: uid {lines[0]}; gid {lines[1]}"

    def execute(self, builder: Builder) -> None:
        try:
            linux.unshare(CLONE_NEWUSER)
        except OSError as error:
            if error.errno in NO_NAMESPACES:
                raise errors.userns_forbidden(_words(error)) from error
            raise
        builder.need("map", ("uid_map", self.uid_map), ("gid_map", self.gid_map)).close()
        linux.set_dumpable(False)


@dataclass(frozen=True, slots=True)
class EnterNamespaces:
    """Make the mount, ipc and uts namespaces, owned by the user namespace."""

    def describe(self) -> str:
        return "make the mount, ipc and uts namespaces"

    def execute(self, builder: Builder) -> None:
        try:
            linux.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise errors.userns_forbidden(_words(error)) from error
            raise
        # Crossing into a less privileged namespace made every mount a slave of the agent's (mount_namespaces(7)),
        # and slaves they stay: what the host mounts later below a user's source appears inside.


@dataclass(frozen=True, slots=True)
class CloneDirectoryImage:
    """Make an image that is a directory the lower layer; for other images there is nothing to do.

    Cloned as the user, in his own mount namespace, where the mounts below it are locked: an overlay shows what
    lies under them, which the host may have hidden. With such mounts the kernel refuses.
    """

    path: str

    def describe(self) -> str:
        return f"take the image {self.path} if it is a directory"

    def execute(self, builder: Builder) -> None:
        if not builder.image_is_directory:
            return
        try:
            fd = _open_as_user(self.path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise errors.image_not_readable(self.path) from error
        try:
            lower = builder.keep("lower", linux.clone_tree("", fd, recursive=False))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise errors.image_has_mounts(self.path) from error
            raise
        finally:
            os.close(fd)
        linux.set_attributes(lower, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, propagation=MS_PRIVATE)


@dataclass(frozen=True, slots=True)
class CloneSource:
    """Take a mount source, looked up by the user in his own mount namespace, as a detached copy of its tree.

    Cloned there, the mounts below it are locked: he can't unmount one to see what the host hid under it.
    Propagation is slave: what the host mounts later appears inside, what is mounted inside stays there.
    """

    name: str
    source: str
    target: str
    recursive: bool = True
    attributes: int = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    private: bool = False
    optional: bool = False
    option: str = "--container-mounts"

    def describe(self) -> str:
        kind = "recursively" if self.recursive else "alone"
        return f"clone {self.source} {kind} as {self.name} ({self.attributes:#x})"

    def execute(self, builder: Builder) -> None:
        try:
            fd = self._open()
        except errors.EnclosError:
            if self.optional:
                return
            raise
        try:
            mount_fd = builder.keep(self.name, linux.clone_tree("", fd, recursive=self.recursive))
        except OSError as error:
            if error.errno == errno.EINVAL and not self.recursive:
                raise errors.bad_mount_syntax(f"{self.source}:{self.target}", NOT_ALONE) from error
            raise
        finally:
            os.close(fd)
        propagation = MS_PRIVATE if self.private else MS_SLAVE
        linux.set_attributes(mount_fd, self.attributes, propagation=propagation, recursive=self.recursive)

    def _open(self) -> int:
        try:
            try:
                # O_DIRECTORY first: with O_PATH alone the last component's automount would not be triggered.
                fd = _open_as_user(self.source, os.O_PATH | os.O_DIRECTORY)
            except NotADirectoryError:
                fd = _open_as_user(self.source, os.O_PATH)
            # O_PATH asks for no right to the source itself; what he can't use at all he learns now, not inside.
            if not any(os.access(f"/proc/self/fd/{fd}", right) for right in (os.R_OK, os.X_OK, os.W_OK)):
                os.close(fd)
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.source)
            return fd
        except OSError as error:
            raise self._worded(error) from error

    def _worded(self, error: OSError) -> Exception:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        if (denied or missing) and self.option == "--container-mount-home":
            return errors.home_missing(self.source)
        if denied:
            return errors.mount_source_denied(self.source, self.target, self.option)
        if missing:
            return errors.mount_source_missing(self.source, self.target, self.option)
        return error


@dataclass(frozen=True, slots=True)
class EnterRoot:
    """Overlay a size-limited tmpfs over the image, and make that the root."""

    stage: str
    tmpfs_size: str
    targets: tuple[str, ...] = ()

    def describe(self) -> str:
        return f"overlay a tmpfs of {self.tmpfs_size} over the image and enter it"

    def execute(self, builder: Builder) -> None:
        builder.rootfs_limit = self.tmpfs_size
        for name in ("lower", "upper", "work", "root"):
            os.mkdir(name, 0o755, dir_fd=builder.fds["upper"])
        linux.move_mount(builder.fds["upper"], linux.AT_FDCWD, self.stage)
        linux.move_mount(builder.fds["lower"], linux.AT_FDCWD, f"{self.stage}/lower")
        if os.fstat(builder.fds["lower"]).st_uid != os.getuid():
            self._shadow_parents(builder.fds["lower"])
        layers = [(f"{layer}dir", f"{self.stage}/{layer}") for layer in ("lower", "upper", "work")]
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        root_fd = linux.mount_filesystem("overlay", (*layers, ("userxattr", None)), attributes)
        _forbid_imports()
        linux.move_mount(root_fd, linux.AT_FDCWD, f"{self.stage}/root")
        linux.enter_root(root_fd)
        builder.drop("lower")
        builder.drop("upper")
        builder.keep("root", root_fd)

    def _shadow_parents(self, lower_fd: int) -> None:
        """Root's files in a squashfs image are shown as the user's; those of a directory stay whose they are."""
        layer_fd = os.open(f"{self.stage}/upper", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for target in self.targets:
                rootfs.shadow_parents(lower_fd, layer_fd, target)
        finally:
            os.close(layer_fd)


@dataclass(frozen=True, slots=True)
class MountInside:
    """Mount a file system of the container's own namespaces: mqueue, or a tmpfs that the user asked for."""

    fstype: str
    target: str
    options: tuple[tuple[str, str | None], ...] = ()
    attributes: int = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    option: str = "--container-mounts"

    def describe(self) -> str:
        return f"mount {self.fstype} at {self.target}"

    def execute(self, builder: Builder) -> None:
        mount_fd = linux.mount_filesystem(self.fstype, self.options, self.attributes)
        try:
            rootfs.attach(builder.fds["root"], mount_fd, self.target)
        except OSError as error:
            raise errors.mount_target_failed(self.fstype, self.target, error.errno or 0, self.option) from error
        finally:
            os.close(mount_fd)


@dataclass(frozen=True, slots=True)
class Attach:
    """Move a staged mount onto a target that is resolved inside the image, and made where it is missing."""

    name: str
    target: str
    source: str = ""
    optional: bool = False
    option: str = "--container-mounts"

    def describe(self) -> str:
        return f"attach {self.name} at {self.target}"

    def execute(self, builder: Builder) -> None:
        if self.optional and self.name not in builder.fds:
            return
        try:
            rootfs.attach(builder.fds["root"], builder.fds[self.name], self.target)
        except OSError as error:
            number = error.errno or 0
            if not self.source:
                raise errors.image_place_missing(builder.image_path, self.target, number) from error
            raise errors.mount_target_failed(self.source, self.target, number, self.option) from error
        builder.drop(self.name)


@dataclass(frozen=True, slots=True)
class WriteStaged:
    """Replace a file of the image by what StageText read on the host."""

    path: str
    name: str

    def describe(self) -> str:
        return f"write {self.path} as on the host"

    def execute(self, builder: Builder) -> None:
        _replace(builder, self.path, builder.texts[self.name])


@dataclass(frozen=True, slots=True)
class WriteHostname:
    """The container's host name is the node's: the new uts namespace starts as a copy."""

    def describe(self) -> str:
        return "write /etc/hostname"

    def execute(self, builder: Builder) -> None:
        _replace(builder, "/etc/hostname", os.uname().nodename.encode() + b"\n")


@dataclass(frozen=True, slots=True)
class WriteAccounts:
    """Add the user and his groups, as LookUpAccounts found them, to the image's /etc/passwd and /etc/group."""

    home: str
    remap_root: bool

    def describe(self) -> str:
        return "add the user and his groups to /etc/passwd and /etc/group"

    def execute(self, builder: Builder) -> None:
        root_fd = builder.fds["root"]
        uid, gid = (0, 0) if self.remap_root else (builder.uid, builder.gid)
        name = "root" if self.remap_root else builder.user_name
        names = [("root", 0), *builder.group_names] if self.remap_root else builder.group_names
        users = etcfiles.passwd(rootfs.read_file(root_fd, "/etc/passwd"), name, uid, gid, self.home, "/bin/sh")
        _replace(builder, "/etc/passwd", users)
        _replace(builder, "/etc/group", etcfiles.group(rootfs.read_file(root_fd, "/etc/group"), names))


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    """Make a directory if it is missing, parents too; what is there stays as it is."""

    path: str
    mode: int = 0o755

    def describe(self) -> str:
        return f"make directory {self.path}"

    def execute(self, builder: Builder) -> None:
        with suppress(PermissionError, NotADirectoryError, FileExistsError):
            os.close(rootfs.make_directories(builder.fds["root"], self.path, self.mode))


@dataclass(frozen=True, slots=True)
class ReadImageEnvironment:
    """Report the variables that the image sets, from its /etc/environment."""

    def describe(self) -> str:
        return "read the environment of the image"

    def execute(self, builder: Builder) -> None:
        for name, value in environment.parse_etc_environment(rootfs.read_file(builder.fds["root"], "/etc/environment")):
            builder.results.append(("env", f"{name}={value}"))


@dataclass(frozen=True, slots=True)
class SealRoot:
    """Make the root read-only, when everything has its mount point."""

    def describe(self) -> str:
        return "make the root read-only"

    def execute(self, builder: Builder) -> None:
        linux.set_attributes(builder.fds["root"], MOUNT_ATTR_RDONLY)


@dataclass(frozen=True, slots=True)
class CheckWorkdir:
    """Find out now whether the working directory can be entered: the error is worded better here than in the task."""

    path: str

    def describe(self) -> str:
        return f"check working directory {self.path}"

    def execute(self, builder: Builder) -> None:
        try:
            os.close(rootfs.open_inside(builder.fds["root"], self.path, os.O_PATH | os.O_DIRECTORY))
        except OSError as error:
            raise errors.workdir_missing(self.path) from error
        if not os.access(self.path, os.X_OK):
            raise errors.workdir_missing(self.path)


def _forbid_imports() -> None:
    """From here on a module that is not loaded yet would be the image's: its user's code, in this process."""
    sys.meta_path.clear()
    sys.path.clear()


def _is_roots(fd: int, status: os.stat_result) -> bool:
    """Only root can have written the file."""
    return status.st_uid == 0 and not status.st_mode & 0o022 and not origin.vouched_for_by_user(fd)


def _open_as_user(path: str, flags: int) -> int:
    """Open a path that the user named.

    Not by way of /proc's magic links: /proc/self is the builder there, whose descriptors (the staged mounts, the
    channel) are none of the user's business.
    """
    return linux.openat2(linux.AT_FDCWD, path, flags, resolve=linux.RESOLVE_NO_MAGICLINKS)


def _replace(builder: Builder, path: str, content: bytes) -> None:
    if not rootfs.replace_file(builder.fds["root"], path, content):
        builder.results.append(("warning", f"{path} of the image can't be replaced by its user, ignoring"))


def _words(error: OSError) -> str:
    return errors.reason(error.errno or 0)
