"""Tar archives as streams: members of a layer one after the other, and those of a saved container for tar2sqfs.

Reads what layers are made of: ustar, GNU (long names, sparse files, base-256 numbers) and PAX (long names, sizes,
times, xattrs, sparse files). An archive may end without the two blocks of zeros at a member's border, as of umoci.
Not the module `tarfile`: it takes three times as long, guesses around damage, and keeps every member. Names are bytes.
Pure but for the streams that it is given; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BLOCK = 512
CHUNK = 1 << 18
EXTENSION_LIMIT = 1 << 20
EXTENSIONS_LIMIT = 16  # Extension headers of one member; programs write four at most.
SPARSE_LIMIT = 1 << 16
XATTR = b"SCHILY.xattr."

FILE, LINK, SYMLINK, DIRECTORY, FIFO = "file", "link", "symlink", "directory", "fifo"
CHARACTER, BLOCK_DEVICE, OTHER = "character device", "block device", "other"
_TYPES = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"S": FILE,
    b"1": LINK,
    b"2": SYMLINK,
    b"3": CHARACTER,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}
_LETTERS = {FILE: b"0", LINK: b"1", SYMLINK: b"2", CHARACTER: b"3", DIRECTORY: b"5", FIFO: b"6"}
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")

Read = Callable[[int], bytes]
Write = Callable[[bytes], object]


class BadArchive(ValueError):
    """The stream is no tar archive, or is damaged; the message says where."""


@dataclass(slots=True)
class Member:
    """One member; `size` is that of the file with its holes, in bytes; `mtime` in whole seconds.

    `stored` is how many bytes the archive has of it, `described` how many of its extension headers and global ones that
    hold for it. `holes` is the map of a sparse file: (offset, length) of its data, in order; None for a plain file.
    """

    name: bytes
    kind: str
    size: int = 0
    mode: int = 0o644
    mtime: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    stored: int = 0
    described: int = 0
    holes: list[tuple[int, int]] | None = None


class Reader:
    """The members of one archive. After each, `copy` gives its data, or the next member skips what is left of it."""

    def __init__(self, read: Read) -> None:
        """`read(n)` gives up to n bytes, and b"" at the end."""
        self._read = read
        self._left = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self._globals_bytes = 0
        self._described = 0
        self.position = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def copy(self, member: Member, write: Write) -> None:
        """Write the member's data, its holes as zeros. Call it once, before the next member is asked for."""
        if member.holes is None:
            self._pump(member.stored, write)
            return
        position = 0
        for offset, length in member.holes:
            _zeros(offset - position, write)
            self._pump(length, write)
            position = offset + length
        _zeros(member.size - position, write)

    def skipped(self, count: int) -> None:
        """The caller has moved the stream past so many bytes of the member's data."""
        self.position += count
        self._left -= count

    # --- bytes ------------------------------------------------------------------------------------------------

    def _exactly(self, count: int) -> bytes:
        """`count` bytes; fewer only at the end of the stream."""
        data = self._read(count)
        while len(data) < count:
            more = self._read(count - len(data))
            if not more:
                break
            data += more
        self.position += len(data)
        return data

    def _pump(self, count: int, write: Write) -> None:
        if count > self._left:
            raise BadArchive("a sparse file with more data than it has")
        while count:
            data = self._read(min(count, CHUNK))
            if not data:
                raise BadArchive(f"it ends in the middle of a file, at byte {self.position}")
            self.position += len(data)
            count -= len(data)
            self._left -= len(data)
            write(data)

    def _skip(self) -> None:
        if self._left:
            self._pump(self._left, lambda data: None)
        if self._padding and len(self._exactly(self._padding)) < self._padding:
            self._padding = 0  # The last block of umoci's archives may be cut; nothing of a file is in it.

    def _content(self, size: int) -> bytes:
        """The data of an extension header."""
        if not 0 <= size <= EXTENSION_LIMIT:
            raise BadArchive(f"an extension header of {size} bytes")
        data = self._exactly(size + -size % BLOCK)[:size]
        if len(data) < size:
            raise BadArchive(f"it ends in the middle of a header, at byte {self.position}")
        self._described += size
        return data

    # --- headers ----------------------------------------------------------------------------------------------

    def _next(self) -> Member | None:
        self._skip()
        records: dict[bytes, bytes] = dict(self._globals)
        self._described = self._globals_bytes
        for _ in range(EXTENSIONS_LIMIT + 1):
            block = self._exactly(BLOCK)
            # The end: none, or blocks of zeros. What follows these is not looked at, as tar does.
            if not block or (len(block) == BLOCK and not block.strip(b"\0")):
                return None
            fields = self._header(block)
            kind = fields[7]
            if kind == b"x":
                records.update(_pax(self._content(_number(fields[4]))))
            elif kind == b"g":
                self._globals.update(_pax(self._content(_number(fields[4]))))
                self._globals_bytes = sum(len(key) + len(value) for key, value in self._globals.items())
                records.update(self._globals)
            elif kind == b"L":
                records[b"path"] = self._content(_number(fields[4])).rstrip(b"\0")
            elif kind == b"K":
                records[b"linkpath"] = self._content(_number(fields[4])).rstrip(b"\0")
            else:
                return self._member(block, fields, records)
        raise BadArchive(f"more than {EXTENSIONS_LIMIT} extension headers before a member, at byte {self.position}")

    def _header(self, block: bytes) -> tuple[bytes, ...]:
        if len(block) < BLOCK:
            raise BadArchive(f"it ends in the middle of a header, at byte {self.position}")
        fields = _HEADER.unpack(block)
        try:
            wanted = _number(fields[6])
        except BadArchive:
            wanted = -1
        # The sum of the header's bytes with the sum's own field as spaces; very old programs summed signed bytes.
        total = sum(block) - sum(fields[6]) + 8 * 32
        if wanted != total and wanted != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
            raise BadArchive(f"no header of a member at byte {self.position - BLOCK}")
        return fields

    def _member(self, block: bytes, fields: tuple[bytes, ...], records: dict[bytes, bytes]) -> Member:
        name = records.get(b"path")
        if name is None:
            name = fields[0].rstrip(b"\0").partition(b"\0")[0]
            prefix = fields[14].partition(b"\0")[0]
            # GNU's own format has times there.
            if prefix and block[257:263] == b"ustar\0":
                name = prefix + b"/" + name
        target = records.get(b"linkpath")
        if target is None:
            target = fields[8].partition(b"\0")[0]
        kind = _TYPES.get(fields[7], OTHER)
        if kind == FILE and name.endswith(b"/") and fields[7] in b"0\0":
            kind = DIRECTORY  # Archives before POSIX.
        size = _decimal(records[b"size"]) if b"size" in records else _number(fields[4])
        if kind not in (FILE, OTHER):
            size = 0  # Whatever the header says, no program writes data behind these.
        if size < 0:
            raise BadArchive(f"a file of {size} bytes ({_shown(name)})")
        mtime = _decimal(records[b"mtime"]) if b"mtime" in records else _number(fields[5])
        mode, xattrs = _number(fields[1]) & 0o7777, _xattrs(records)
        member = Member(name, kind, size, mode, mtime, target, xattrs, size, self._described)
        self._left, self._padding = size, -size % BLOCK
        if fields[7] == b"S":
            self._old_sparse(member, block)
        elif b"GNU.sparse.major" in records or b"GNU.sparse.map" in records or b"GNU.sparse.size" in records:
            self._pax_sparse(member, records)
        return member

    # --- sparse files -----------------------------------------------------------------------------------------

    def _old_sparse(self, member: Member, block: bytes) -> None:
        """GNU's format: four pieces in the header, more in blocks behind it."""
        pieces, more = _pieces(block[386:482]), block[482]
        real = _number(block[483:495])
        while more:
            extension = self._exactly(BLOCK)
            if len(extension) < BLOCK or not extension[0] or len(pieces) > SPARSE_LIMIT:
                raise BadArchive("a sparse file whose map does not end")
            member.described += BLOCK
            pieces += _pieces(extension[:504])
            more = extension[504]
        self._sparse(member, pieces, real)

    def _pax_sparse(self, member: Member, records: dict[bytes, bytes]) -> None:
        """PAX formats 0.1 (the map in a record) and 1.0 (the map before the data)."""
        if b"GNU.sparse.name" in records:
            member.name = records[b"GNU.sparse.name"]
        if records.get(b"GNU.sparse.major") == b"1":
            real = _decimal(records.get(b"GNU.sparse.realsize", b""))
            numbers = self._map_before_data()
        elif b"GNU.sparse.map" in records:
            real = _decimal(records.get(b"GNU.sparse.size", b""))
            numbers = [_decimal(text) for text in records[b"GNU.sparse.map"].split(b",")]
        else:
            raise BadArchive("a sparse file of an unknown kind")
        pieces = list(zip(numbers[::2], numbers[1::2], strict=False))
        self._sparse(member, pieces, real)

    def _map_before_data(self) -> list[int]:
        """Decimal numbers, a line each: how many pieces, then offset and length of each; padded to a block."""
        lines: list[bytes] = []
        text = b""
        while not lines or len(lines) <= 2 * _decimal(lines[0]):
            if self._left < BLOCK or len(lines) > 2 * SPARSE_LIMIT or len(text) > BLOCK:
                raise BadArchive("a sparse file whose map does not end")
            self._left -= BLOCK
            *found, text = (text + self._exactly(BLOCK)).split(b"\n")
            lines += found
        return [_decimal(line) for line in lines[1 : 1 + 2 * _decimal(lines[0])]]

    def _sparse(self, member: Member, pieces: list[tuple[int, int]], real: int) -> None:
        end = 0
        for offset, length in pieces:
            if offset < end or length < 0:
                raise BadArchive("a sparse file whose map goes backwards")
            end = offset + length
        if end > real or sum(length for _, length in pieces) > self._left:
            raise BadArchive("a sparse file with more data than it has")
        member.kind, member.size, member.holes = FILE, real, pieces


def _pieces(text: bytes) -> list[tuple[int, int]]:
    found = []
    for at in range(0, len(text), 24):
        if text[at] == 0:
            break
        found.append((_number(text[at : at + 12]), _number(text[at + 12 : at + 24])))
    return found


def _number(text: bytes) -> int:
    """Octal digits, or GNU's base 256 for what does not fit."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big") & ~(0x80 << 8 * (len(text) - 1))
        return value if text[0] == 0x80 else value - (1 << 8 * len(text) - 1)
    digits = text.rstrip(b"\0 ").partition(b"\0")[0]
    try:
        return int(digits or b"0", 8)
    except ValueError as error:
        raise BadArchive(f"a number that is none ({_shown(digits)})") from error


def _decimal(text: bytes) -> int:
    """A decimal number of a PAX record; what is behind its point is left out."""
    whole = text.partition(b".")[0]
    if not whole.removeprefix(b"-").isdigit() or len(whole) > 20:
        raise BadArchive(f"a number that is none ({_shown(text)})")
    return int(whole)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n` records (pax(1))."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        end = at + int(digits) if space > 0 and digits.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not at < end <= len(data) or not equals or data[end - 1 : end] != b"\n":
            raise BadArchive("a PAX record that is none")
        found[key] = value
        at = end
    return found


def _xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key.removeprefix(XATTR): value for key, value in records.items() if key.startswith(XATTR)}


def _zeros(count: int, write: Write) -> None:
    zeros = bytes(min(count, CHUNK))
    while count > 0:
        write(zeros[:count])
        count -= CHUNK


def _shown(text: bytes) -> str:
    return ascii(text[:80].decode("utf-8", "replace")).strip("'")


# --- writing ---------------------------------------------------------------------------------------------------------


def header(member: Member) -> bytes:
    """The blocks before a member's data, owned by 0:0; `member.size` bytes and `padding` have to follow."""
    records = {XATTR + key: value for key, value in member.xattrs.items()}
    name = member.name + b"/" if member.kind == DIRECTORY else member.name
    if len(name) > 100:
        records[b"path"] = name
    if len(member.target) > 100:
        records[b"linkpath"] = member.target
    if member.size >= 8 << 30:
        records[b"size"] = b"%d" % member.size
    extension = b""
    if records:
        data = b"".join(_record(key, value) for key, value in records.items())
        extension = _block(b"pax", b"x", len(data), 0o644, 0, b"") + data + padding(len(data))
    size = 0 if b"size" in records else member.size
    letter = _LETTERS[member.kind]
    return extension + _block(name[:100], letter, size, member.mode, member.mtime, member.target[:100])


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def _block(name: bytes, letter: bytes, size: int, mode: int, mtime: int, target: bytes) -> bytes:
    # Device numbers are 0:0, which as a character device is what an overlay takes for "deleted here".
    zeros = b"0000000\0"
    block = _HEADER.pack(
        name, b"%07o\0" % mode, zeros, zeros, b"%011o\0" % size, b"%011o\0" % mtime, b" " * 8, letter, target,
        b"ustar\00000", b"", b"", zeros, zeros, b"",
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
