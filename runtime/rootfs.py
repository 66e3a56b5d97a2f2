"""Paths below a container's root: opened, made, mounted on and replaced without leaving it.

Every path is resolved by openat2(2) with RESOLVE_IN_ROOT, so no symlink of an image leads to the host. Knows
nothing of plans or of the agent. Runs in builders, as the user once the user namespace exists.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from enclos.runtime import linux
from enclos.runtime.linux import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS

READ_LIMIT_BYTES = 1 << 20


def open_inside(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open a path below the container's root; no symlink of the image leads out of it."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    return linux.openat2(root_fd, path, flags | os.O_CLOEXEC, mode, resolve)


@contextmanager
def _parent(root_fd: int, path: str) -> Iterator[tuple[int, str]]:
    """The descriptor of the directory that holds `path` (made if missing), and the last component."""
    directory, name = os.path.split(path.rstrip("/"))
    fd = make_directories(root_fd, directory)
    try:
        yield fd, name
    finally:
        os.close(fd)


def make_directories(root_fd: int, path: str, mode: int = 0o755) -> int:
    """Like mkdir -p below root_fd, the last directory with `mode` if it is made.

    Returns:
        An O_PATH descriptor of the last directory, owned by the caller.
    """
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    missing: list[str] = []
    while True:
        try:
            fd = linux.openat2(root_fd, path or "/", flags, 0, resolve)
            break
        except FileNotFoundError:
            path, name = os.path.split(path.rstrip("/"))
            missing.append(name)
    while missing:
        parent_fd, name = fd, missing.pop()
        try:
            try:
                os.mkdir(name, 0o755, dir_fd=parent_fd)
            except FileExistsError:  # A link to what is missing: that is made.
                link = os.readlink(name, dir_fd=parent_fd)
                return make_directories(root_fd, os.path.join(path, link, *reversed(missing)), mode)
            path = os.path.join(path, name)
            if not missing and mode != 0o755:
                os.chmod(name, mode, dir_fd=parent_fd)  # mkdir applies the umask, and drops the sticky bit
            fd = linux.openat2(parent_fd, name, flags, 0, resolve)
        finally:
            os.close(parent_fd)
    return fd


def exists(root_fd: int, path: str) -> bool:
    """Whether there is something at a path below the root, links followed; what cannot be looked at is there."""
    try:
        os.close(open_inside(root_fd, path, os.O_PATH))
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def attach(root_fd: int, mount_fd: int, target: str) -> None:
    """Move a detached mount onto `target`; a missing target is made to fit what is mounted."""
    try:
        target_fd = open_inside(root_fd, target, os.O_PATH)
    except FileNotFoundError:
        # To be made, it needs a path without "..", which is taken by name then.
        target_fd = _make_target(root_fd, os.path.normpath(target), stat.S_ISDIR(os.fstat(mount_fd).st_mode))
    try:
        _check_kinds(mount_fd, target_fd)
        linux.move_mount(mount_fd, target_fd)
    finally:
        os.close(target_fd)


def _check_kinds(mount_fd: int, target_fd: int) -> None:
    """The kernel's word for a directory on a file, and the other way round, is EINVAL."""
    mounted, target = (stat.S_ISDIR(os.fstat(fd).st_mode) for fd in (mount_fd, target_fd))
    if mounted != target:
        number = errno.ENOTDIR if mounted else errno.EISDIR
        raise OSError(number, os.strerror(number))


def _make_target(root_fd: int, target: str, directory: bool) -> int:
    if directory:
        return make_directories(root_fd, target)
    with _parent(root_fd, target) as (parent_fd, name):
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(name, flags, 0o644, dir_fd=parent_fd))
        except FileExistsError:  # A link to what is missing, as above.
            link = os.readlink(name, dir_fd=parent_fd)
            return _make_target(root_fd, os.path.join(os.path.dirname(target), link), directory)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)


def read_file(root_fd: int, path: str) -> bytes:
    """A file of the image, empty when it is missing, unreadable or no regular file; cut at 1 MiB."""
    try:
        fd = open_inside(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        return file.read(READ_LIMIT_BYTES) or b""


def replace_file(root_fd: int, path: str, content: bytes, mode: int = 0o644) -> bool:
    """Write `path` anew; a symlink by that name is replaced, not followed. `mode` is subject to the umask, 022 here.

    Returns:
        False where the image does not let its user replace the file: the image's own stays.
    """
    try:
        with _parent(root_fd, path) as (parent_fd, name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent_fd)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, mode, dir_fd=parent_fd), "wb", buffering=0) as file:
                file.write(content)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EOVERFLOW, errno.EISDIR, errno.ENOTDIR):
            return False
        raise
    return True


def make_link(root_fd: int, path: str, destination: str) -> None:
    """Make a symbolic link; another one by that name is replaced, a file or directory stays."""
    with _parent(root_fd, path) as (parent_fd, name):
        try:
            if os.readlink(name, dir_fd=parent_fd) == destination:
                return
            os.unlink(name, dir_fd=parent_fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.EINVAL:  # Not a link.
                return
            raise
        os.symlink(destination, name, dir_fd=parent_fd)


def shadow_parents(lower_fd: int, upper_fd: int, target: str) -> None:
    """Give the user directories of his own in the overlay's upper layer, above a target to be made or replaced.

    In an image that is a directory of somebody else's the user could make no mount point. A directory that exists
    in both layers is merged, and has the upper one's owner. Must run before the overlay is mounted.

    Args:
        lower_fd: root of the lower layer, attached to the mount namespace.
        upper_fd: the upper layer's directory.
        target: path inside the image, symlinks and all.
    """
    parts = [part for part in os.path.dirname(target).split("/") if part]
    for depth in range(1, len(parts) + 1):
        try:
            found_fd = open_inside(lower_fd, "/".join(parts[:depth]), os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return  # What is missing is made later, below a directory that is now the user's.
        try:
            path, mode = _path_below(lower_fd, found_fd), stat.S_IMODE(os.fstat(found_fd).st_mode)
        finally:
            os.close(found_fd)
        _copy_directories(upper_fd, path, mode)


def _path_below(root_fd: int, fd: int) -> str:
    """The path of an open directory relative to another that holds it, without symlinks."""
    root, path = os.readlink(f"/proc/self/fd/{root_fd}"), os.readlink(f"/proc/self/fd/{fd}")
    return os.path.relpath(path, root)


def _copy_directories(upper_fd: int, path: str, mode: int) -> None:
    """mkdir -p in the upper layer; only the last directory gets the mode, the others have theirs already."""
    if path == ".":
        return
    try:
        os.mkdir(path, 0o755, dir_fd=upper_fd)
        os.chmod(path, mode | 0o700, dir_fd=upper_fd)
    except FileNotFoundError:
        _copy_directories(upper_fd, os.path.dirname(path) or ".", 0o755)
        os.mkdir(path, mode | 0o700, dir_fd=upper_fd)
    except FileExistsError:
        return
