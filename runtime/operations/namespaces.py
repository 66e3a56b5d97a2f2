"""Operations that make root the user, put him into namespaces of his own, and take his mount sources there."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from enclos.runtime import errors, linux
from enclos.runtime.asuser import open_as_user
from enclos.runtime.builder import Builder
from enclos.runtime.linux import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MS_PRIVATE,
    MS_SLAVE,
)
from enclos.runtime.operations.common import NO_NAMESPACES, words

# What squashfuse says when it gives up, in its user's error line.
COMPLAINT_BYTES = 300


@dataclass(frozen=True, slots=True)
class TakeMounts:
    """Get the mount namespace that Slurm gave the job (a /tmp of its own): there the user's paths are meant."""

    def describe(self) -> str:
        return "take the job's mount namespace"

    def execute(self, builder: Builder) -> None:
        with builder.need("outside") as answer:
            (fd,) = answer.take_fds()
            builder.keep("outside", fd)


@dataclass(frozen=True, slots=True)
class JoinMounts:
    """Stand in the job's mount namespace. The user's will be a copy of it, with all that is mounted there locked.

    The last thing that root does: until then paths mean what they mean on the node, for a job's user may have
    written what he likes where Slurm put his directories.
    """

    def describe(self) -> str:
        return "join the job's mount namespace"

    def execute(self, builder: Builder) -> None:
        linux.setns(builder.fds["outside"], CLONE_NEWNS)
        builder.drop("outside")


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

    def describe(self) -> str:
        lines = " ".join(self.uid_map.split("\n")).strip(), " ".join(self.gid_map.split("\n")).strip()
        return f"make the user namespace: uid {lines[0]}; gid {lines[1]}"

    def execute(self, builder: Builder) -> None:
        try:
            linux.unshare(CLONE_NEWUSER)
        except OSError as error:
            if error.errno in NO_NAMESPACES:
                raise errors.userns_forbidden(words(error)) from error
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
                raise errors.userns_forbidden(words(error)) from error
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
            fd = open_as_user(self.path, os.O_PATH | os.O_DIRECTORY)
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
class AwaitServer:
    """Wait until squashfuse serves a user's image; for other images there is nothing to do.

    As the user: the kernel lets nobody else ask a FUSE file system of his.
    """

    path: str

    def describe(self) -> str:
        return f"wait for the server of {self.path} if a user wrote it"

    def execute(self, builder: Builder) -> None:
        if "complaints" not in builder.fds:
            return
        try:
            os.fstat(builder.fds["lower"])
        except OSError as error:
            said = self._complaints(builder.fds["complaints"])
            raise errors.image_damaged(self.path, said or words(error)) from error
        builder.drop("complaints")

    def _complaints(self, fd: int) -> str:
        """The first line that it wrote before it ended. The text may hold what the image's maker wanted."""
        try:
            return os.read(fd, COMPLAINT_BYTES).decode(errors="replace").strip().partition("\n")[0]
        except BlockingIOError:
            return ""


@dataclass(frozen=True, slots=True)
class CloneSource:
    """Take a mount source, looked up by the user in his own mount namespace, as a detached copy of its tree.

    Cloned there, the mounts below it are locked: he can't unmount one to see what the host hid under it. They are
    always part of it, for the same reason. The copy is a slave of the host's mounts, whatever is asked for on top:
    what the host mounts later appears inside unless it is made private, and what is mounted inside stays there.
    """

    name: str
    source: str
    target: str
    attributes: int = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    propagation: int = MS_SLAVE
    optional: bool = False
    option: str = "--container-mounts"

    def describe(self) -> str:
        return f"clone {self.source} recursively as {self.name} ({self.attributes:#x})"

    def execute(self, builder: Builder) -> None:
        try:
            fd = self._open()
        except errors.EnclosError:
            if self.optional:
                return
            raise
        try:
            mount_fd = builder.keep(self.name, linux.clone_tree("", fd))
        finally:
            os.close(fd)
        linux.set_attributes(mount_fd, self.attributes, propagation=self.propagation, recursive=True)

    def _open(self) -> int:
        try:
            return open_source(self.source)
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


def open_source(path: str) -> int:
    """A descriptor of what is to be mounted, looked up as the user; O_PATH, for clone_tree."""
    try:
        # O_DIRECTORY first: with O_PATH alone the last component's automount would not be triggered.
        fd = open_as_user(path, os.O_PATH | os.O_DIRECTORY)
    except NotADirectoryError:
        fd = open_as_user(path, os.O_PATH)
    # O_PATH asks for no right to the source itself; what he can't use at all he learns now, not inside.
    if not any(os.access(f"/proc/self/fd/{fd}", right) for right in (os.R_OK, os.X_OK, os.W_OK)):
        os.close(fd)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return fd
