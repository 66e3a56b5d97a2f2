"""Namespaces: make, join, and user namespaces that exist only for their maps.

A process that is not dumpable stays so, also through a change of the user namespace, which sets the flag
to fs.suid_dumpable.
"""

import fcntl

from enclos.runtime.linux._linux import lib
from enclos.runtime.linux.constants import NS_GET_PARENT, NS_GET_USERNS
from enclos.runtime.linux.failure import check


def setns(fd: int, nstype: int) -> None:
    """Join the namespace(s): of a namespace's descriptor, or several of a process's by its pidfd.

    CLONE_NEWUSER *resets* the capability bounding set and gives all capabilities over that namespace.
    """
    check(lib.enclos_setns(fd, nstype), f"namespace {nstype:#x}")


def unshare(flags: int) -> None:
    """Leave the shared namespaces (CLONE_NEW*) for new ones.

    A user namespace beyond `user.max_user_namespaces` is ENOSPC, "No space left on device".
    """
    check(lib.enclos_unshare(flags), f"namespaces {flags:#x}")


def parent_user_namespace(fd: int) -> int:
    """A descriptor of the parent of a user namespace, close-on-exec, the caller's.

    Raises:
        OSError: EPERM when the parent is above the caller's own namespace (ioctl_ns(2)).
    """
    return fcntl.ioctl(fd, NS_GET_PARENT)


def owning_user_namespace(fd: int) -> int:
    """A descriptor of the user namespace that has power over a namespace, close-on-exec, the caller's.

    Raises:
        OSError: EPERM when it is above the caller's own namespace (ioctl_ns(2)).
    """
    return fcntl.ioctl(fd, NS_GET_USERNS)


def userns_with_map(uid_map: str, gid_map: str) -> int:
    """A user namespace that no process is in, with these maps: what an idmapped mount wants.

    Its child waits less than a millisecond and is reaped here. setgroups stays allowed in it, so never
    let a user join it. It belongs to the caller's uid: root.

    Returns:
        A descriptor, close-on-exec, the caller's.
    """
    return check(lib.enclos_userns_with_map(uid_map.encode(), gid_map.encode()), "user namespace")
