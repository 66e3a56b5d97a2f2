"""Looking up what a user named with the user's credentials, in a process that stays root. For one with one thread."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

from enclos.runtime import linux


@contextlib.contextmanager
def as_user(uid: int, gid: int, groups: Sequence[int]) -> Iterator[None]:
    """Look up paths as the user: file system ids and groups of the user, and no effective capability.

    The real ids stay root's, so the user can neither signal nor stop the process here. Without the empty capability
    set, CAP_SYS_PTRACE would let /proc/PID/root and /proc/PID/fd lead into other users' namespaces, and
    CAP_DAC_READ_SEARCH everywhere.
    """
    os.setgroups(groups)
    _, permitted, _ = linux.get_capabilities()
    linux.set_filesystem_ids(uid, gid)
    # Cleared by that change (prctl(2)); looking at the user's path may take for ever.
    linux.set_parent_death_signal(signal.SIGKILL)
    linux.set_capabilities(0, permitted)
    try:
        yield
    finally:
        linux.set_capabilities(permitted, permitted)
        linux.set_filesystem_ids(0, 0)
        linux.set_parent_death_signal(signal.SIGKILL)
        os.setgroups([])


def open_as_user(path: str, flags: int) -> int:
    """Open a path that the user named.

    Not by way of /proc's magic links: /proc/self is this process there, whose descriptors (the staged mounts, the
    channel) are none of the user's business.
    """
    return linux.openat2(linux.AT_FDCWD, path, flags, resolve=linux.RESOLVE_NO_MAGICLINKS)
