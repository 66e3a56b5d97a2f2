"""Where the root file system is in a Singularity Image Format file. Run as the user whose file it is.

Reads the global header and the table of descriptors, a bounded part of the file, and believes none of it: an offset
or a size beyond the file is an error, and what lies there still has to be a squashfs (squashfs.py).

Layout: https://github.com/apptainer/sif (pkg/sif/sif.go): all numbers little-endian and packed.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

MAGIC = b"SIF_MAGIC\0"
# launch script, magic, version, architecture, uuid; created, modified, free and all descriptors; offset and size of the
# table; offset and size of the data.
HEADER = struct.Struct("<32s10s3s3s16s8q")
# type, used, id, group, link; offset, size, padded size, created, modified, uid, gid; name; extra
DESCRIPTOR = struct.Struct("<iBIII7q128s384s")
# Of a partition's extra: file system, kind, architecture.
PARTITION = struct.Struct("<ii3s")
MOST_DESCRIPTORS = 1024

TYPE_PARTITION = 0x4004
FILE_SYSTEMS = {1: "squashfs", 2: "ext3", 3: "an archive", 4: "raw data", 5: "an encrypted squashfs"}
SQUASHFS = 1
PRIMARY_SYSTEM = 2
MACHINES = {
    b"01": ("i386", "i686"),
    b"02": ("x86_64",),
    b"03": ("armv7l", "armv6l"),
    b"04": ("aarch64",),
    b"05": ("ppc64",),
    b"06": ("ppc64le",),
    b"11": ("s390x",),
}


class BadSif(ValueError):
    """A SIF file without a root file system that can be mounted; the message says why."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a file, in bytes. A size of 0 means up to the file's end."""

    offset: int = 0
    size: int = 0


def is_sif(fd: int) -> bool:
    return os.pread(fd, len(MAGIC), 32) == MAGIC


def find_root(fd: int, machine: str) -> Extent:
    """The primary system partition of an open file for which `is_sif` holds.

    Args:
        machine: as uname(2) names the node's architecture.

    Raises:
        BadSif: there is none, or it is no squashfs, or of another architecture.
    """
    file_bytes = os.fstat(fd).st_size
    head = os.pread(fd, HEADER.size, 0)
    if len(head) < HEADER.size:
        raise BadSif("its header is incomplete")
    # The table's size in the header counts the used descriptors in some versions, all in others.
    total, table_offset = HEADER.unpack(head)[8:10]
    if not 0 < total <= MOST_DESCRIPTORS or not HEADER.size <= table_offset < file_bytes:
        raise BadSif("its header is damaged")
    table = os.pread(fd, total * DESCRIPTOR.size, table_offset)
    for fields in DESCRIPTOR.iter_unpack(table[: len(table) - len(table) % DESCRIPTOR.size]):
        kind, used, offset, size, extra = fields[0], fields[1], fields[5], fields[6], fields[13]
        if used and kind == TYPE_PARTITION:
            filesystem, part, architecture = PARTITION.unpack_from(extra)
            if part == PRIMARY_SYSTEM:
                return _checked(Extent(offset, size), filesystem, architecture, machine, file_bytes)
    raise BadSif("it has no root file system")


def _checked(extent: Extent, filesystem: int, architecture: bytes, machine: str, file_bytes: int) -> Extent:
    if filesystem != SQUASHFS:
        raise BadSif(f"its root file system is {FILE_SYSTEMS.get(filesystem, 'of an unknown kind')}")
    wanted = MACHINES.get(architecture[:2], ())
    if wanted and machine not in wanted:
        raise BadSif(f"it is for {wanted[0]}, this node is {machine}")
    if extent.offset < HEADER.size or extent.size <= 0 or extent.offset + extent.size > file_bytes:
        raise BadSif("it is truncated")
    return extent
