"""What a squashfs file says about itself in its first 96 bytes. Run as the user whose file it is.

This only words an error before the kernel has to; it does not make a file safe to mount.
"""

import os
import stat
import struct
from dataclasses import dataclass

# Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h
SUPERBLOCK = struct.Struct("<IIIIIHHHHHHQQQQQQQQ")
MAGIC = 0x73717368
VERSION = (4, 0)
COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
SMALLEST_BLOCK_LOG, LARGEST_BLOCK_LOG = 12, 20


class NotSquashfs(ValueError):
    """Another kind of file, or a squashfs that no kernel of today mounts; the text says which."""


class Truncated(ValueError):
    """The file ends before its file system does."""

    def __init__(self, file_bytes: int, wanted_bytes: int) -> None:
        super().__init__(f"{file_bytes} of {wanted_bytes} bytes")
        self.file_bytes = file_bytes
        self.wanted_bytes = wanted_bytes


@dataclass(frozen=True, slots=True)
class Superblock:
    """The parts that matter to us. `bytes_used` is the size of the file system without padding."""

    inodes: int
    block_bytes: int
    compression: str
    bytes_used: int


def check_superblock(fd: int, offset: int = 0, size: int = 0) -> Superblock:
    """Read the head of an open file, or of a part of it, and compare it with the file's or the part's size.

    Raises:
        NotSquashfs, Truncated.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotSquashfs("not a regular file")
    head = os.pread(fd, SUPERBLOCK.size, offset)
    size = size or status.st_size - offset
    if head[:4] != MAGIC.to_bytes(4, "little"):
        raise NotSquashfs("no squashfs magic number")
    if len(head) < SUPERBLOCK.size:
        raise Truncated(size, SUPERBLOCK.size)
    superblock = parse(head)
    if size < superblock.bytes_used:
        raise Truncated(size, superblock.bytes_used)
    return superblock


def parse(head: bytes) -> Superblock:
    """Decode and check the fields of a superblock (96 bytes that begin with the magic number)."""
    fields = SUPERBLOCK.unpack(head)
    inodes, block_bytes, compression_id, block_log = fields[1], fields[3], fields[5], fields[6]
    version, bytes_used = (fields[9], fields[10]), fields[12]
    if version != VERSION:
        raise NotSquashfs(f"squashfs version {version[0]}.{version[1]}")
    if not SMALLEST_BLOCK_LOG <= block_log <= LARGEST_BLOCK_LOG or block_bytes != 1 << block_log:
        raise NotSquashfs(f"damaged superblock: block size {block_bytes}")
    if compression_id not in COMPRESSIONS:
        raise NotSquashfs(f"unknown compression {compression_id}")
    if bytes_used < SUPERBLOCK.size:
        raise NotSquashfs(f"damaged superblock: {bytes_used} bytes used")
    return Superblock(inodes, block_bytes, COMPRESSIONS[compression_id], bytes_used)
