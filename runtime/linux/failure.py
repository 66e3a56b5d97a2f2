"""How a failed call becomes an exception: errno, its text, and the object it was about."""

import os

from enclos.runtime.linux._linux import ffi


class MountError(OSError):
    """A file system that could not be mounted. `log` has what the kernel said beyond the errno."""

    def __init__(self, number: int, text: str, subject: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(number, text, subject)
        self.log = log


def failure(subject: str) -> OSError:
    """The error of the call that has just failed. Ask at once: any other call may change errno."""
    number = ffi.errno
    return OSError(number, os.strerror(number), subject)


def check(result: int, subject: str) -> int:
    """The result, or its error if it is negative."""
    if result < 0:
        raise failure(subject)
    return result
