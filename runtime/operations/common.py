"""What all operations share: their interface, and how a path that a user named is opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from enclos.runtime import errors, linux
from enclos.runtime.builder import Builder
from enclos.runtime.linux import CLONE_NEWNS

# ENOSPC is how the kernel words a limit of user namespaces (user_namespaces(7)).
NO_NAMESPACES = (errno.ENOSPC, errno.EPERM, errno.EUSERS)


class Operation(Protocol):
    """One step of making a container."""

    def describe(self) -> str: ...

    def execute(self, builder: Builder) -> None: ...


@contextmanager
def in_mounts_of(mounts_fd: int) -> Iterator[None]:
    """Stand in another mount namespace. For a process with one thread, as root."""
    own_fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(mounts_fd, CLONE_NEWNS)
        try:
            yield
        finally:
            linux.setns(own_fd, CLONE_NEWNS)
    finally:
        os.close(own_fd)


@contextmanager
def where_users_paths_are(builder: Builder) -> Iterator[None]:
    """Stand where the job does, if Slurm gave it mounts of its own and TakeMounts has taken them."""
    if "outside" not in builder.fds:
        yield
        return
    with in_mounts_of(builder.fds["outside"]):
        yield


def words(error: OSError) -> str:
    return errors.reason(error.errno or 0)
