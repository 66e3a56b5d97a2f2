"""The dynamic linker's cache (/etc/ld.so.cache) and the names of libraries: read, and joined by more libraries.

Instead of a run of ldconfig: a program that reads what a user put into his image would do so as a child of the agent,
outside the step's cgroup, and takes ten times as long. Nothing is executed here, and what is malformed is an error of
Python. Pure.
Source: glibc, sysdeps/generic/dl-cache.h and elf/dl-cache.c (the format that all releases since 2.2 read); elf(5).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAGIC = b"glibc-ld.so.cache1.1"
OLD_MAGIC = b"ld.so-1.7.0\0"
EXTENSION_MAGIC = 0xEAA42174
TAG_HWCAPS = 1
HWCAP_IS_EXTENSION = 1 << 62
LIMIT_BYTES = 16 << 20

_HEADER = struct.Struct("<20sIIB3xI12x")
_ENTRY = struct.Struct("<iIIIQ")
_SECTION = struct.Struct("<IIII")
_OLD_ENTRY_BYTES = 12
_LITTLE_ENDIAN = 2

# Flags of an entry: a library of libc6, for one kind of machine. By ELF class and e_machine.
_ELF_LIBC6 = 3
_MACHINES = {(2, 62): 0x0300, (1, 3): 0, (1, 62): 0x0800, (2, 183): 0x0A00, (2, 21): 0x0500, (2, 243): 0x1000}

PT_LOAD, PT_DYNAMIC = 1, 2
DT_STRTAB, DT_SONAME = 5, 14
_STRING_LIMIT = 4096


class Malformed(ValueError):
    """Not a file of this format, or one that is damaged."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A library that the linker finds: its name, and the file."""

    name: bytes
    path: bytes
    flags: int
    os_version: int = 0
    hwcap: int = 0


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache; `hwcaps` are the names that entries of glibc-hwcaps count in."""

    entries: tuple[Entry, ...] = ()
    hwcaps: tuple[bytes, ...] = ()


def parse(data: bytes) -> Cache:
    """Read a cache.

    Raises:
        Malformed: it is none.
    """
    try:
        return _parse(data, data[_start(data) :])
    except (struct.error, IndexError) as error:
        raise Malformed("truncated") from error


def _start(data: bytes) -> int:
    """Older releases write a cache for still older ones before it."""
    if not data.startswith(OLD_MAGIC):
        return 0
    (count,) = struct.unpack_from("<I", data, len(OLD_MAGIC))
    end = len(OLD_MAGIC) + 4 + int(count) * _OLD_ENTRY_BYTES
    return (end + 7) & ~7


def _parse(whole: bytes, data: bytes) -> Cache:
    magic, count, _, order, extension = _HEADER.unpack_from(data)
    if magic != MAGIC or order & 3 not in (0, _LITTLE_ENDIAN) or count * _ENTRY.size > len(data):
        raise Malformed("not a cache of this machine")
    entries = []
    for index in range(count):
        flags, name, path, os_version, hwcap = _ENTRY.unpack_from(data, _HEADER.size + index * _ENTRY.size)
        entries.append(Entry(_string(data, name), _string(data, path), flags, os_version, hwcap))
    return Cache(tuple(entries), _hwcaps(whole, data, extension) if extension else ())


def _string(data: bytes, offset: int) -> bytes:
    end = data.find(b"\0", offset, offset + _STRING_LIMIT)
    if offset >= len(data) or end < 0:
        raise Malformed("a string is not there")
    return data[offset:end]


def _hwcaps(whole: bytes, data: bytes, extension: int) -> tuple[bytes, ...]:
    """The extension's offsets count from the beginning of the file, those of strings from that of the cache proper."""
    magic, count = struct.unpack_from("<II", whole, extension)
    if magic != EXTENSION_MAGIC or count > 64:
        return ()
    for index in range(count):
        tag, _, offset, size = _SECTION.unpack_from(whole, extension + 8 + index * _SECTION.size)
        if tag == TAG_HWCAPS:
            return tuple(_string(data, place) for (place,) in struct.iter_unpack("<I", whole[offset : offset + size]))
    return ()


def join(cache: Cache, libraries: Iterable[Entry]) -> Cache:
    """More libraries, which are found before others of the same name.

    The linker searches by halves: an order that is not glibc's own would make it miss what is there.
    """
    fresh = list(dict.fromkeys(libraries))
    old = [entry for entry in cache.entries if entry not in fresh]
    return Cache(tuple(sorted([*fresh, *old], key=lambda entry: order(entry.name), reverse=True)), cache.hwcaps)


def order(name: bytes) -> list[tuple[int, int]]:
    """How glibc compares names: runs of digits as numbers, and these after all other characters."""
    parts = re.findall(rb"[0-9]+|[^0-9]", name, re.DOTALL)
    return [(1, int(part)) if part.isdigit() else (0, part[0]) for part in parts]


def write(cache: Cache) -> bytes:
    """The file."""
    strings = _Strings(_HEADER.size + len(cache.entries) * _ENTRY.size)
    rows = [
        _ENTRY.pack(entry.flags, strings.add(entry.name), strings.add(entry.path), entry.os_version, entry.hwcap)
        for entry in cache.entries
    ]
    places = struct.pack(f"<{len(cache.hwcaps)}I", *(strings.add(name) for name in cache.hwcaps))
    size = len(strings.data)
    extension = b""
    start = 0
    if cache.hwcaps:
        strings.data += bytes(-(strings.begin + size) % 4)
        start = strings.begin + len(strings.data)
        extension = struct.pack("<II", EXTENSION_MAGIC, 1)
        extension += _SECTION.pack(TAG_HWCAPS, 0, start + len(extension) + _SECTION.size, len(places)) + places
    header = _HEADER.pack(MAGIC, len(rows), size, _LITTLE_ENDIAN, start)
    return header + b"".join(rows) + bytes(strings.data) + extension


class _Strings:
    """The strings of a cache, each once; offsets count from the beginning of the file."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.data = bytearray()
        self._places: dict[bytes, int] = {}

    def add(self, text: bytes) -> int:
        if text not in self._places:
            self._places[text] = self.begin + len(self.data)
            self.data += text + b"\0"
        return self._places[text]


# ---------------------------------------------------------------- libraries


def read_entry(read: Callable[[int, int], bytes], path: bytes) -> Entry:
    """The entry of a shared library.

    Args:
        read: gives so many bytes of the file from an offset on.
        path: its path, as the linker will open it.

    Raises:
        Malformed: no shared library for a known machine, or one without a name (DT_SONAME).
    """
    try:
        return _library(read, path)
    except (struct.error, OverflowError) as error:
        raise Malformed("truncated") from error


def _library(read: Callable[[int, int], bytes], path: bytes) -> Entry:
    head = read(0, 64)
    wide = head[4:5] == b"\2"
    machine = (head[4], struct.unpack_from("<H", head, 18)[0]) if len(head) >= 20 else (0, 0)
    if head[:4] != b"\x7fELF" or head[5] != 1 or machine not in _MACHINES:
        raise Malformed("no library of a known machine")
    table, row_bytes, rows = _program_table(head, wide)
    if rows > 256 or row_bytes < (56 if wide else 32):
        raise Malformed("odd program header")
    segments = [_segment(read(table + index * row_bytes, row_bytes), wide) for index in range(rows)]
    dynamic = next((segment for segment in segments if segment[0] == PT_DYNAMIC), None)
    if dynamic is None:
        raise Malformed("not dynamic")
    tags = _dynamic(read(dynamic[1], min(dynamic[3], 1 << 16)), wide)
    if DT_SONAME not in tags or DT_STRTAB not in tags:
        raise Malformed("it has no name")
    offset = _file_offset(tags[DT_STRTAB], segments) + tags[DT_SONAME]
    name = read(offset, 256).partition(b"\0")[0]
    if not name or b"/" in name:
        raise Malformed("it has no name")
    return Entry(name, path, _ELF_LIBC6 | _MACHINES[machine])


def _program_table(head: bytes, wide: bool) -> tuple[int, int, int]:
    """Offset, bytes of a row, rows."""
    (table,) = struct.unpack_from("<Q", head, 32) if wide else struct.unpack_from("<I", head, 28)
    row_bytes, rows = struct.unpack_from("<HH", head, 54 if wide else 42)
    return table, row_bytes, rows


def _segment(row: bytes, wide: bool) -> tuple[int, int, int, int]:
    """Type, offset in the file, address, bytes in the file."""
    if wide:
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", row)
    else:
        kind, offset, address, _, size = struct.unpack_from("<IIIII", row)
    return kind, offset, address, size


def _dynamic(data: bytes, wide: bool) -> dict[int, int]:
    layout = struct.Struct("<qQ" if wide else "<iI")
    whole = data[: len(data) // layout.size * layout.size]
    return dict(reversed(list(layout.iter_unpack(whole))))


def _file_offset(address: int, segments: Sequence[tuple[int, int, int, int]]) -> int:
    for kind, offset, begin, size in segments:
        if kind == PT_LOAD and begin <= address < begin + size:
            return address - begin + offset
    raise Malformed("its strings are not in the file")
