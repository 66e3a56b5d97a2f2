"""A single layer, written as it is read: nothing of it is remembered but what it deletes below itself.

The squashfs file knows what it has, and refuses what comes a second time. Where that or anything else cannot be judged
member by member, `Repeat` asks for the two passes of merge.py. Pure; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from enclos.runtime.images import tar
from enclos.runtime.images.rules import (
    OPAQUE,
    OPAQUE_XATTR,
    PATH_LIMIT,
    WHITEOUT_PREFIX,
    WHITEOUTS_XATTR,
    BadLayer,
    NeedsBase,
    Output,
    Repeat,
    kept_mode,
    kept_time,
    kept_xattrs,
    put_file,
    shown,
    split,
)
from enclos.runtime.images.tar import Member


def write(members: Iterator[Member], reader: tar.Reader, lowest: bool, out: Output) -> None:
    """Write a layer.

    Args:
        members: of `reader`, which gives their data.
        lowest: nothing is below it, so that it deletes nothing.

    Raises:
        BadArchive, BadLayer, TooLarge, NeedsBase: as merge.Merge.write; Repeat, and what the output raises where
        something is there already: it takes two passes.
    """
    layer = _Layer(lowest, out)
    for member in members:
        path = layer.place(member)
        if not path:
            continue
        if member.kind == tar.DIRECTORY:
            layer.put_directory(path, member)
        elif member.kind == tar.LINK:
            target = b"/".join(split(member.target, f"the target of the hard link {shown(member.name)}"))
            out.put(Member(path, tar.LINK, target=target))
        elif member.kind in (tar.FILE, tar.SYMLINK, tar.FIFO):
            put_file(reader, path, member, out)
        else:
            layer.leave_out(path)
    layer.write_deletions()


class _Layer:
    """What has to be known beside the squashfs file itself."""

    def __init__(self, lowest: bool, out: Output) -> None:
        self._lowest = lowest
        self._out = out
        self._parent = b"."  # The directory of the member before, which is there.
        # What an overlay has to hide. A whiteout is of what is below the layer, wherever it stands in it.
        self._whiteouts: set[bytes] = set()
        self._opaque: set[bytes] = set()
        self._xattrs: dict[bytes, dict[bytes, bytes]] = {}  # Directories' own.

    def place(self, member: Member) -> bytes:
        """The path of a member, whose directory is there; b"" for a whiteout, which is noted."""
        parts = split(member.name)
        if not parts:
            if member.kind != tar.DIRECTORY:
                raise BadLayer("the root directory is no directory")
            return b"."
        *parents, name = parts
        parent = b"/".join(parents) or b"."
        if name.startswith(WHITEOUT_PREFIX):
            self._whiteout(parent, name)
            return b""
        path = b"/".join(parts)
        if len(path) > PATH_LIMIT:
            raise BadLayer(f"a path longer than {PATH_LIMIT} bytes ({shown(member.name)})")
        self._enter(parent)
        return path

    def _enter(self, parent: bytes) -> None:
        if parent == self._parent:
            return
        mode = self._out.mode(parent)
        if mode and not stat.S_ISDIR(mode):
            raise Repeat  # A symlink, perhaps.
        if not mode and not self._lowest:
            raise NeedsBase
        if not mode:
            self._out.put(Member(parent, tar.DIRECTORY, mode=0o755))
        self._parent = parent

    def put_directory(self, path: bytes, member: Member) -> None:
        xattrs = kept_xattrs(member)
        self._out.put(Member(path, tar.DIRECTORY, 0, kept_mode(member), kept_time(member), b"", xattrs))
        if xattrs or path in self._xattrs:
            self._xattrs[path] = xattrs

    def leave_out(self, path: bytes) -> None:
        """A device: what it replaced is gone."""
        if self._out.mode(path):
            raise Repeat
        if not self._lowest:
            self._whiteouts.add(path)

    def _whiteout(self, parent: bytes, name: bytes) -> None:
        if name != OPAQUE:
            name = name.removeprefix(WHITEOUT_PREFIX)
            if name in (b"", b".", b".."):
                place = shown(parent + b"/" + WHITEOUT_PREFIX + name)
                raise BadLayer(f"a whiteout of nothing ({place})")
            if name.startswith(WHITEOUT_PREFIX):
                return  # Of aufs' own files, which no layer has.
        if self._lowest:
            return
        self._enter(parent)
        if name != OPAQUE:
            self._whiteouts.add(parent + b"/" + name if parent != b"." else name)
        elif parent == b".":
            raise NeedsBase  # An overlay merges the roots of its layers in any case.
        else:
            self._opaque.add(parent)

    def write_deletions(self) -> None:
        """Last: what the layer brings by the name of a whiteout stays, and of a directory only that is seen."""
        holders = set()
        for path in self._whiteouts:
            mode = self._out.mode(path)
            if stat.S_ISDIR(mode):
                self._opaque.add(path)
            elif not mode:
                self._out.put(Member(path, tar.CHARACTER, mode=0))
                holders.add(path.rpartition(b"/")[0] or b".")
        for path in holders | self._opaque:
            marks = (WHITEOUTS_XATTR if path in holders else {}) | (OPAQUE_XATTR if path in self._opaque else {})
            self._out.mark(path, self._xattrs.get(path, {}) | marks)
