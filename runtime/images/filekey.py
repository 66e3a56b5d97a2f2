"""Names an image file as it is now, by what stat(2) says of it: whoever changes its bytes changes this."""

from __future__ import annotations

import os


def file_key(status: os.stat_result) -> str:
    """Device, inode, size and times of a file, as one word."""
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
