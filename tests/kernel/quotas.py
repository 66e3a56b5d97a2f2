"""A directory with a quota: of btrfs, because the kernels of tests have no other kind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def limited(folder: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A directory on a file system of its own, and what sets its quota: a size for btrfs(8), or `none`."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    disk, place = folder / "disk", folder / "btrfs"
    with open(disk, "wb") as file:
        file.truncate(256 << 20)
    place.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", str(disk)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(place)], check=True)
    try:
        place.chmod(0o755)
        for command in (["quota", "enable", str(place)], ["subvolume", "create", str(place / "limited")]):
            subprocess.run(["btrfs", *command], check=True, capture_output=True)

        def limit(size: str) -> None:
            subprocess.run(["btrfs", "qgroup", "limit", size, str(place / "limited")], check=True)
            if size != "none":
                with pytest.raises(OSError, match="Disk quota exceeded"):
                    (place / "limited/probe").write_bytes(os.urandom(100 << 20))
                (place / "limited/probe").unlink()

        yield place / "limited", limit
    finally:
        subprocess.run(["umount", str(place)], check=True)
