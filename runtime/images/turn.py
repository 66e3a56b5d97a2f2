"""The order among the converters of one import: small ones work side by side, of the large ones one at a time.

So the memory of an import is that of one large converter, whatever the number of its parts.
"""

from __future__ import annotations

import fcntl
import os


def create() -> int:
    """What the converters of an import share: a descriptor."""
    return os.memfd_create("turn", os.MFD_CLOEXEC)


def share(fd: int) -> int:
    """A descriptor for one converter. Its lock is another than that of the others', and ends with it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class Turn:
    """One converter's; what it needs up to `small_bytes` it may have at any time."""

    def __init__(self, fd: int, small_bytes: int) -> None:
        """`fd` is from `share`."""
        self._fd = fd
        self._small_bytes = small_bytes
        self._taken = False

    def need(self, memory_bytes: int) -> None:
        """Wait until no other converter is large, if this one is going to be."""
        if memory_bytes > self._small_bytes and not self._taken:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._taken = True
