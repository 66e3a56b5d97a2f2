"""Descriptors: open below a directory that a user filled, close what a fork inherited, watch what appears."""

import os
from collections.abc import Iterable

from enclos.runtime.linux._linux import lib
from enclos.runtime.linux.constants import IN_CREATE, IN_MODIFY, IN_MOVED_TO
from enclos.runtime.linux.failure import check

LAST_DESCRIPTOR = 2**32 - 1


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """Open with rules for the resolution of the path (RESOLVE_*). Always close-on-exec.

    `mode` counts only with O_CREAT or O_TMPFILE in `flags`; otherwise the kernel takes only 0.
    """
    return check(lib.enclos_openat2(dirfd, os.fsencode(path), flags | os.O_CLOEXEC, mode, resolve), path)


def close_other_descriptors(keep: Iterable[int]) -> None:
    """Close all descriptors of this process but these. Name 0, 1 and 2 too if they shall stay."""
    first = 0
    for fd in [*sorted(set(keep)), LAST_DESCRIPTOR + 1]:
        if first < fd:
            check(lib.enclos_close_range(first, fd - 1), f"descriptors {first}-{fd - 1}")
        first = fd + 1


def watch_directory(path: str) -> int:
    """A descriptor that is readable when a file has been made in a directory, or renamed into it (inotify(7)).

    Close-on-exec, the caller's. What one read of it returns says no more than that: list the directory then.
    """
    return check(lib.enclos_inotify(os.fsencode(path), IN_CREATE | IN_MOVED_TO), path)


def watch_writes(path: str) -> int:
    """The same for a file that has been written to since the last read of the descriptor, which blocks until then."""
    return check(lib.enclos_inotify(os.fsencode(path), IN_MODIFY), path)
