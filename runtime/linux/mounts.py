"""The kernel's mount interface by descriptors: make, clone, change, place and remove mounts.

Needs CAP_SYS_ADMIN in the user namespace that owns the mount namespace. Knows nothing of containers:
what is mounted where, and in which order, is plan.py's.

Every descriptor that is returned is close-on-exec and the caller's to close. It is an O_PATH one: good as
a dir_fd, not for listing or fchmod. A mount that is attached nowhere ends with the last descriptor to it.

What a user's namespace gets from the node has to be cloned *after* unshare(CLONE_NEWUSER) and
unshare(CLONE_NEWNS): the copies there are locked. A tree that was cloned before and moved in is not, and
the user, who owns the namespace, can make it writable again and unmount what covers files in it.
"""

import errno
import os
from collections.abc import Sequence

from enclos.runtime.linux._linux import ffi, lib
from enclos.runtime.linux.constants import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_NO_AUTOMOUNT,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    FSCONFIG_CMD_CREATE,
    FSCONFIG_SET_FD,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    MNT_DETACH,
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH,
    MS_MOVE,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
)
from enclos.runtime.linux.failure import MountError, check

# The kernel keeps at most eight messages in a file system context, each cut to a page.
MESSAGE_BYTES = 4096
MESSAGES = 16


def mount_filesystem(fstype: str, options: Sequence[tuple[str, str | int | None]] = (), attributes: int = 0) -> int:
    """Mount a new file system, attached nowhere yet.

    Args:
        fstype: as in /proc/filesystems.
        options: (key, value) in order. A value None is a flag; an int is a descriptor, for the keys that
            take one (overlay's layers, from kernel 6.13).
        attributes: MOUNT_ATTR_* of the mount.

    Raises:
        MountError: .log has the kernel's messages, such as "squashfs: Unknown parameter 'x'".
    """
    context_fd = lib.enclos_fsopen(fstype.encode())
    if context_fd < 0:
        raise _mount_error(fstype, -1)
    try:
        for key, value in options:
            if _configure(context_fd, key, value) < 0:
                raise _mount_error(f"{fstype} option {key}", context_fd)
        if lib.enclos_fsconfig(context_fd, FSCONFIG_CMD_CREATE, ffi.NULL, ffi.NULL, 0) < 0:
            raise _mount_error(fstype, context_fd)
        mount_fd = lib.enclos_fsmount(context_fd, attributes)
        if mount_fd < 0:
            raise _mount_error(fstype, context_fd)
        return mount_fd
    finally:
        os.close(context_fd)


def _configure(context_fd: int, key: str, value: str | int | None) -> int:
    name = os.fsencode(key)
    if value is None:
        return lib.enclos_fsconfig(context_fd, FSCONFIG_SET_FLAG, name, ffi.NULL, 0)
    if isinstance(value, int):
        return lib.enclos_fsconfig(context_fd, FSCONFIG_SET_FD, name, ffi.NULL, value)
    return lib.enclos_fsconfig(context_fd, FSCONFIG_SET_STRING, name, os.fsencode(value), 0)


def _mount_error(subject: str, context_fd: int) -> MountError:
    """The error of the call that has just failed, with the messages that wait in the context."""
    number = ffi.errno
    log: list[str] = []
    while context_fd >= 0 and len(log) < MESSAGES:
        try:
            message = os.read(context_fd, MESSAGE_BYTES)
        except OSError:  # ENODATA: that was all
            break
        # "e squashfs: text": the letter is the severity.
        log.append(message.decode(errors="replace").strip()[2:])
    return MountError(number, os.strerror(number), subject, tuple(log))


def clone_tree(path: str, dirfd: int = AT_FDCWD, recursive: bool = True, nofollow: bool = False) -> int:
    """Copy a mount, or the part of it below `path`, attached nowhere. This is a bind mount's source half.

    Path "" means the file that `dirfd` is. An automount at the end of the path is not set off.
    Not recursive, it is EINVAL where a mount below is locked: in a mount namespace copied from one of
    another user namespace, that is nearly everywhere.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    flags |= AT_RECURSIVE if recursive else 0
    flags |= AT_SYMLINK_NOFOLLOW if nofollow else 0
    flags |= AT_NO_AUTOMOUNT if path else AT_EMPTY_PATH
    return check(lib.enclos_open_tree(dirfd, os.fsencode(path), flags), path or f"descriptor {dirfd}")


def move_mount(mount_fd: int, target_dirfd: int, target: str = "") -> None:
    """Attach a mount. Target "" means the directory or file that `target_dirfd` is (O_PATH will do)."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    result = lib.enclos_move_mount(mount_fd, b"", target_dirfd, os.fsencode(target), flags)
    check(result, target or f"descriptor {target_dirfd}")


def set_attributes(
    fd: int,
    set: int = 0,
    clear: int = 0,
    propagation: int = 0,
    userns_fd: int = -1,
    recursive: bool = False,
    path: str = "",
) -> None:
    """Change attributes of a mount, and of all below it if recursive.

    Args:
        set, clear: MOUNT_ATTR_*.
        propagation: one of MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE, or 0 to leave it.
        userns_fd: show the files' owners through this user namespace's maps. Only for a mount that is
            attached nowhere (else EINVAL) and has no idmap yet (else EPERM); needs CAP_SYS_ADMIN over the
            file system itself.
        path: relative to fd; "" is the mount that fd is.
    """
    flags = (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    result = lib.enclos_mount_setattr(fd, os.fsencode(path), flags, set, clear, propagation, userns_fd)
    check(result, path or f"descriptor {fd}")


def set_propagation(path: str, flags: int) -> None:
    """MS_PRIVATE, MS_SLAVE or MS_SHARED, with MS_REC for all below, by mount(2)."""
    check(lib.enclos_mount(b"none", os.fsencode(path), ffi.NULL, flags), path)


def unmount(path: str, flags: int = MNT_DETACH) -> None:
    """umount2(2); by default the mount is taken out of the tree at once, whoever still uses it."""
    check(lib.enclos_umount(os.fsencode(path), flags), path)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2). Most callers want enter_root."""
    check(lib.enclos_pivot_root(os.fsencode(new), os.fsencode(old)), new)


def enter_root(root_fd: int) -> None:
    """Make an attached mount the root of this mount namespace, and drop the old root with all below it.

    The mount has to be attached, by this mount namespace, to a parent that does not propagate. Where the
    old root is an initramfs, which cannot be pivoted away from, the new one is moved over it.
    """
    os.fchdir(root_fd)
    # Both halves the same directory: the old root ends up mounted over the new one, and is what "."
    # means for umount2, so that no directory for it is needed (pivot_root(2), NOTES).
    if lib.enclos_pivot_root(b".", b".") == 0:
        unmount(".")
    elif ffi.errno == errno.EINVAL:
        check(lib.enclos_mount(b".", b"/", ffi.NULL, MS_MOVE), "/")
        os.chroot(".")
    else:
        check(-1, "/")
    os.chdir("/")
