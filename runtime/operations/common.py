"""What all operations share: their interface, and how a path that a user named is opened."""

from __future__ import annotations

import errno
from typing import Protocol

from enclos.runtime import errors, linux
from enclos.runtime.builder import Builder

# ENOSPC is how the kernel words a limit of user namespaces (user_namespaces(7)).
NO_NAMESPACES = (errno.ENOSPC, errno.EPERM, errno.EUSERS)


class Operation(Protocol):
    """One step of making a container."""

    def describe(self) -> str: ...

    def execute(self, builder: Builder) -> None: ...


def open_as_user(path: str, flags: int) -> int:
    """Open a path that the user named.

    Not by way of /proc's magic links: /proc/self is the builder there, whose descriptors (the staged mounts, the
    channel) are none of the user's business.
    """
    return linux.openat2(linux.AT_FDCWD, path, flags, resolve=linux.RESOLVE_NO_MAGICLINKS)


def words(error: OSError) -> str:
    return errors.reason(error.errno or 0)
