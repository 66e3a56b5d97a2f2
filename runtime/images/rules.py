"""Members of layers: what they may be called, and what is kept of them. The words that both ways of a merge share.

Pure; runs in the importer, on bytes that a user chose.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import Protocol

from enclos.runtime.images import tar
from enclos.runtime.images.tar import Member

OPAQUE = b".wh..wh..opq"
WHITEOUT_PREFIX = b".wh."
OPAQUE_XATTR = {b"user.overlay.opaque": b"y"}
# An overlay shows a directory that it does not merge as it is, whiteouts and all, unless this says that there may be
# some: "Check for non-merge dir that may have whiteouts" in fs/overlayfs/inode.c. Empty stands for an unknown origin.
WHITEOUTS_XATTR = {b"user.overlay.origin": b""}
NAME_LIMIT = 255
PATH_LIMIT = 4095
# XATTR_NAME_MAX and XATTR_SIZE_MAX of linux/limits.h.
XATTR_NAME_LIMIT = 255
XATTR_VALUE_LIMIT = 65536
LAST_TIME = 2**32 - 1


class BadLayer(ValueError):
    """The layer holds what no image may hold; the message names the member."""


class TooLarge(ValueError):
    """A limit of the site; the message says which."""


class NeedsBase(Exception):
    """These layers cannot be merged without the ones below them."""


class Repeat(Exception):
    """A layer replaces what it brought itself: it cannot be written in one pass."""


class Output(Protocol):
    """The squashfs file that members go to. What is there already, or has a file in its way, is refused."""

    def put(self, member: Member) -> None:
        """Add one: hard links after what they name. Of a directory the last description counts."""

    def write(self, data: bytes) -> None:
        """Has to follow for the data of a file with a size."""

    def mode(self, path: bytes) -> int:
        """Mode, with the type, of what is at a path; 0 for nothing."""

    def mark(self, path: bytes, xattrs: Mapping[bytes, bytes]) -> None:
        """Give a directory that is there other extended attributes."""

    def count(self) -> int:
        """Entries so far, with the directories that nobody described."""


def split(name: bytes, what: str = "") -> list[bytes]:
    """The components of a member's name; BadLayer where they lead anywhere but down.

    The root alone may be called `/`: `umoci insert` calls it so.
    """
    parts = name.split(b"/")
    if b"" in parts or b"." in parts:
        parts = [part for part in parts if part and part != b"."]
    if name.startswith(b"/") and parts:
        wrong = "has an absolute path"
    elif b"\0" in name:
        wrong = "has a NUL in its name"
    elif b".." in parts:
        wrong = "has '..' in its path"
    elif len(name) > NAME_LIMIT and max(map(len, parts), default=0) > NAME_LIMIT:
        wrong = f"has a name longer than {NAME_LIMIT} bytes"
    else:
        return parts
    raise BadLayer(f"{what or f'the member {shown(name)}'} {wrong}")


def shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return text if len(text) <= 100 else f"{text[:100]}…"


def put_file(reader: tar.Reader, path: bytes, member: Member, out: Output) -> None:
    """Write a file with its data, a symlink or a fifo."""
    size = member.size if member.kind == tar.FILE else 0
    xattrs = kept_xattrs(member) if member.kind == tar.FILE else {}
    target = symlink_target(member) if member.kind == tar.SYMLINK else b""
    out.put(Member(path, member.kind, size, kept_mode(member), kept_time(member), target, xattrs))
    if size:
        reader.copy(member, out.write)


def kept_mode(member: Member) -> int:
    return stat.S_IMODE(member.mode) & 0o1777


def symlink_target(member: Member) -> bytes:
    """A symlink's target. Raises BadLayer for one that no file system takes."""
    target = member.target
    if 0 < len(target) <= PATH_LIMIT and b"\0" not in target:
        return target
    wrong = f"is longer than {PATH_LIMIT} bytes" if len(target) > PATH_LIMIT else "is empty or has a NUL in it"
    raise BadLayer(f"the target of the symlink {shown(member.name)} {wrong}")


def kept_xattrs(member: Member) -> dict[bytes, bytes]:
    """Only a user's own: the others are rights (file capabilities, ACLs of foreign ids) or an overlay's orders.

    Raises BadLayer for what Linux takes from nobody: written all the same, it would be read as something else.
    """
    found = {
        key: value
        for key, value in member.xattrs.items()
        if key.startswith(b"user.") and not key.startswith(b"user.overlay.")
    }
    for key, value in found.items():
        if not len(b"user.") < len(key) <= XATTR_NAME_LIMIT or b"\0" in key:
            raise BadLayer(f"{shown(member.name)} has an extended attribute whose name is none ({shown(key)})")
        if len(value) > XATTR_VALUE_LIMIT:
            raise BadLayer(f"{shown(member.name)} has an extended attribute of more than {XATTR_VALUE_LIMIT} bytes")
    return found


def kept_time(member: Member) -> int:
    return min(max(member.mtime, 0), LAST_TIME)
