"""Write Singularity image files, as siftool lays them out, for tests: Debian 12 has no tool that makes them.

Layout: https://github.com/apptainer/sif (pkg/sif/sif.go).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

TABLE, DATA = 4096, 32768


@dataclass
class Part:
    """A data object: its type, and for a partition file system, kind and architecture."""

    content: bytes = b"x" * 5000
    type: int = 0x4004
    filesystem: int = 1
    kind: int = 2
    architecture: bytes = b"02\0"
    used: bool = True


def make_sif(parts: Sequence[Part], total: int = 48) -> bytes:
    """The file that siftool would make of these objects, in their order."""
    table, data = b"", b""
    for number, part in enumerate(parts):
        offset = DATA + len(data)
        table += struct.pack("<i?III", part.type, part.used, number + 1, 0xF0000001, 0)
        table += struct.pack("<7q", offset, len(part.content), len(part.content), 0, 0, 0, 0)
        table += b"name".ljust(128, b"\0")
        table += struct.pack("<ii3s", part.filesystem, part.kind, part.architecture).ljust(384, b"\0")
        data += part.content + b"\0" * (-len(part.content) % 4096)
    head = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + b"u" * 16
    head += struct.pack("<8q", 0, 0, total - len(parts), total, TABLE, len(table), DATA, len(data))
    assert len(head) == 128 and len(table) == 585 * len(parts)
    return head.ljust(TABLE, b"\0") + table.ljust(DATA - TABLE, b"\0") + data
