"""Loop devices, so that the kernel can mount an image file. Needs root."""

import errno
import os
from pathlib import Path

from enclos.runtime.linux._linux import lib
from enclos.runtime.linux.failure import check, failure

ATTEMPTS = 64


def loop_attach(
    file_fd: int, name: str, offset: int = 0, size: int = 0, *, writable: bool = False
) -> tuple[int, str]:
    """Attach an open file, read-only unless told otherwise, to a free loop device, which ends with its last user.

    The device takes a reference of its own: `file_fd` may be closed. Close the descriptor that is
    returned once the device is mounted; the unmount then frees the device.

    Args:
        file_fd: open for reading, and for writing where the device is to be writable.
        name: what `losetup` shows, cut to 63 bytes.
        offset, size: the part of the file in bytes; a size of 0 means all that follows. The kernel counts in blocks
            of 512 bytes from the offset, so a size that is no multiple loses its end.

    Returns:
        (descriptor of the device, "/dev/loopN").
    """
    control_fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(ATTEMPTS):
            number = check(lib.enclos_loop_free(control_fd), "/dev/loop-control")
            attached = _configure(number, file_fd, name, (offset, size, writable))
            if attached is not None:
                return attached
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "/dev/loop-control")
    finally:
        os.close(control_fd)


def _configure(
    number: int, file_fd: int, name: str, part: tuple[int, int, bool]
) -> tuple[int, str] | None:
    """None if another process took the device since the kernel called it free."""
    path = f"/dev/loop{number}"
    try:
        loop_fd = os.open(path, (os.O_RDWR if part[2] else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        # Another process removed the device again.
        if error.errno == errno.ENXIO:
            return None
        raise
    offset, size, writable = part
    if lib.enclos_loop_configure(loop_fd, file_fd, os.fsencode(name), offset, size, writable) == 0:
        return loop_fd, path
    problem = failure(path)
    os.close(loop_fd)
    if problem.errno == errno.EBUSY:
        return None
    raise problem


def loop_backing_file(device: str) -> str | None:
    """The file behind "/dev/loopN" as the kernel names it, or None if the device is free."""
    attribute = Path("/sys/block", Path(device).name, "loop/backing_file")
    try:
        return attribute.read_text().rstrip("\n")
    except FileNotFoundError:
        return None
