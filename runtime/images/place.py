"""Whose a directory of images is: what one's own, or root's, store holds is run as it is, so nobody else may own it.

A user who makes the directory first, or may rename one above it, decides what is in it. Looks at owners and modes; runs
as root for the node's cache and the site's store, as the user for his own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

ROOT = 0


def stranger(path: str, uid: int) -> str:
    """Who else may decide what is in a directory, in words; "" if nobody but root and this user may.

    For root's own, the directories and links above count, too: users can't have put any of them there. Those above a
    user's are his home's, whose owner and group are the site's affair.

    Raises:
        OSError: it cannot be looked at.
    """
    real = os.path.realpath(path)
    above = [*_prefixes(os.path.abspath(path)), *_prefixes(real)][:-1] if uid == ROOT else []
    for place in dict.fromkeys(above):
        if place == real:
            continue
        status = os.lstat(place)
        if status.st_uid != ROOT:
            return f"{place} belongs to uid {status.st_uid}"
        # In a sticky directory nobody renames what is another's.
        if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            return f"others may write to {place}"
    status = os.stat(real)
    if status.st_uid not in (ROOT, uid):
        return f"{real} belongs to uid {status.st_uid}"
    if status.st_mode & (0o022 if uid == ROOT else 0o002):
        return f"others may write to {real}"
    return ""


def _prefixes(path: str) -> Iterator[str]:
    """`/`, `/a`, `/a/b` of `/a/b`."""
    yield "/"
    for index, letter in enumerate(path[1:], 1):
        if letter == "/":
            yield path[:index]
    yield path
