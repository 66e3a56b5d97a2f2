"""Operations as the user, in his own namespaces: the root file system, and everything that is put into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from enclos.runtime import errors, etcfiles, linux, rootfs
from enclos.runtime.builder import Builder
from enclos.runtime.linux import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY

APT_SETTING = "/etc/apt/apt.conf.d/90enclos"


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
        # An image of several parts has as many lower layers; short names, for the kernel takes 255 bytes for all.
        lowers = {f"lower{index}": f"{index:02}" for index in range(builder.lowers)} or {"lower": "lower"}
        for name in (*lowers.values(), "upper", "work", "root"):
            with suppress(FileExistsError):  # Of a named container, from the steps before.
                os.mkdir(name, 0o755, dir_fd=builder.fds["upper"])
        linux.move_mount(builder.fds["upper"], linux.AT_FDCWD, self.stage)
        for name, place in lowers.items():
            linux.move_mount(builder.fds[name], linux.AT_FDCWD, f"{self.stage}/{place}")
        if "lower" in lowers and os.fstat(builder.fds["lower"]).st_uid != os.getuid():
            targets = (*self.targets, *(mount.target for mount in builder.image_mounts))
            self._shadow_parents(builder.fds["lower"], targets)
        os.chdir(self.stage)
        layers = [("lowerdir", ":".join(reversed(lowers.values()))), ("upperdir", "upper"), ("workdir", "work")]
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        root_fd = linux.mount_filesystem("overlay", (*layers, ("userxattr", None)), attributes)
        forbid_imports()
        linux.move_mount(root_fd, linux.AT_FDCWD, f"{self.stage}/root")
        linux.enter_root(root_fd)
        for name in (*lowers, "upper"):
            builder.drop(name)
        builder.keep("root", root_fd)

    def _shadow_parents(self, lower_fd: int, targets: Sequence[str]) -> None:
        """Root's files in a squashfs image are shown as the user's; those of a directory stay whose they are."""
        layer_fd = os.open(f"{self.stage}/upper", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for target in targets:
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
    where_missing: bool = False

    def describe(self) -> str:
        return f"attach {self.name} at {self.target}" + (" if nothing is there" if self.where_missing else "")

    def execute(self, builder: Builder) -> None:
        if self.optional and self.name not in builder.fds:
            return
        if self.where_missing and rootfs.exists(builder.fds["root"], self.target):
            builder.drop(self.name)
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
class Unmount:
    """Take away what is mounted at a target, as the user asked: his namespace is his, and nothing locked comes off."""

    target: str
    optional: bool = False
    option: str = "--container-mounts"

    def describe(self) -> str:
        return f"unmount {self.target}"

    def execute(self, builder: Builder) -> None:
        try:
            fd = rootfs.open_inside(builder.fds["root"], self.target, os.O_PATH | os.O_DIRECTORY)
            try:
                os.fchdir(fd)
                linux.unmount(".")
            finally:
                os.chdir("/")
                os.close(fd)
        except OSError as error:
            if not self.optional:
                raise errors.unmount_failed(self.target, error.errno or 0, self.option) from error


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
        users = rootfs.read_file(root_fd, "/etc/passwd")
        for other, other_uid, other_gid in builder.other_users:
            users = etcfiles.passwd(users, other, other_uid, other_gid, "/", "/bin/sh")
        users = etcfiles.passwd(users, name, uid, gid, self.home, "/bin/sh")
        _replace(builder, "/etc/passwd", users)
        _replace(builder, "/etc/group", etcfiles.group(rootfs.read_file(root_fd, "/etc/group"), names))


@dataclass(frozen=True, slots=True)
class SetUpPackageManagers:
    """Have apt stay root: it checks that its change to the user _apt took place, which the filter only pretends."""

    def describe(self) -> str:
        return "have apt stay root, if the image has it"

    def execute(self, builder: Builder) -> None:
        with suppress(OSError):
            os.close(rootfs.open_inside(builder.fds["root"], os.path.dirname(APT_SETTING), os.O_PATH | os.O_DIRECTORY))
            _replace(builder, APT_SETTING, b'APT::Sandbox::User "root";\n')


@dataclass(frozen=True, slots=True)
class WriteProgram:
    """Put a program of ours at some paths, in place of the image's files there."""

    paths: tuple[str, ...]
    program: bytes

    def describe(self) -> str:
        return f"put a program at {' '.join(self.paths)}"

    def execute(self, builder: Builder) -> None:
        for path in self.paths:
            _replace(builder, path, self.program, 0o755)


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


def forbid_imports() -> None:
    """From here on a module that is not loaded yet would be the image's: its user's code, in this process."""
    sys.meta_path.clear()
    sys.path.clear()


def _replace(builder: Builder, path: str, content: bytes, mode: int = 0o644) -> None:
    if not rootfs.replace_file(builder.fds["root"], path, content, mode):
        builder.results.append(("warning", f"{path} of the image can't be replaced by its user, ignoring"))
