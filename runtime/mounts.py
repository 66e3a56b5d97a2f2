r"""The syntax of --container-mounts and of mounts.site: text to `Mount`, nothing else.

    SRC[:DST[:FLAG[+FLAG...]]][,SRC...]      tmpfs:DST[:FLAGS]      devpts:DST[:FLAGS]      umount:DST

as pyxis has it. A backslash takes away the meaning of the next `,`, `:` or `\`. Must not
hold: any look at a file system; paths are opened elsewhere, with the user's rights. Pure.
Limits on number and length bound what a user can make the agent keep.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from enclos.runtime import errors

MOUNT_LIMIT = 256
PATH_LIMIT = 4095

WORDS = ("tmpfs", "devpts", "umount")
SOURCE_WORDS = 'mount source must be a relative path (./…), an absolute path, "tmpfs", "devpts" or "umount"'
TARGET_WORDS = "mount target must be an absolute path"
BACKSLASH_WORDS = "a backslash goes before a comma, a colon or a backslash"
ESCAPE_WORDS = "mount target leads out of the container (Cross-device link)"

_ACCESS = {"ro": True, "rw": False}
PROPAGATION = ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
_CREATE = ("x-create=auto", "x-create=dir", "x-create=file")
# Of each family of flags a mount takes one.
FAMILIES = (
    tuple(_ACCESS),
    PROPAGATION,
    ("exec", "noexec"),
    ("noatime", "relatime", "strictatime"),
    _CREATE,
)
# Without effect: what holds anyway, what the kernel leaves to the node, or what mount(8) itself does nothing about.
# A source always comes with what is mounted below it: without, files would appear that the node has hidden.
_SILENT = (
    *("bind", "rbind", "nosuid", "nodev", "suid", "dev", "defaults", "async", "silent", "loud"),
    *("atime", "diratime", "norelatime", "nostrictatime", "x-detach"),
)
_TIMES = ("noatime", "nodiratime", "relatime", "strictatime")
_FLAGS = ("noexec", "exec", *_TIMES, "nosymfollow", "nofail", *_CREATE, *PROPAGATION)
TMPFS_VALUES = {
    "size": r"[1-9][0-9]{0,17}[kmgtKMGT]?|([1-9][0-9]?|100)%",
    "mode": "[0-7]{3,4}",
    "nr_inodes": r"[1-9][0-9]{0,11}[kmgKMG]?",
}
# Of mounts that Enclos adds, and no user can write it: what the image has at the target stays.
WHERE_MISSING = "where-missing"
ALL_FLAGS = (*_ACCESS, *_FLAGS, *_SILENT)


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as asked for.

    Attributes:
        source: absolute path on the node; empty unless kind is "bind".
        target: absolute path in the container.
        kind: "bind", "tmpfs", "devpts", or "umount", which takes away what is mounted at the target.
        read_only: None when neither ro nor rw was given.
        options: the other flags, in order, each once: `noexec`, `noatime`, `private`,
            `nofail`, `x-create=…`, for a tmpfs `size=…` and `mode=…`. Those without effect are left out.
        text: this mount as typed, for messages.
    """

    source: str
    target: str
    kind: str
    read_only: bool | None
    options: tuple[str, ...]
    text: str


def parse(text: str, cwd: str = "") -> tuple[Mount, ...]:
    """All mounts of one option; equal ones count once.

    Args:
        text: as typed.
        cwd: absolute directory at which `./SRC` and `../SRC` start; without it they are errors.

    Raises:
        EnclosError: bad_mount_syntax, with the entry that is wrong.
    """
    if not text:
        raise errors.bad_mount_syntax(text, "argument required")
    found: dict[Mount, None] = {}
    for entry in _split(text, ",", text):
        found[_parse_entry(entry, cwd)] = None
        if len(found) > MOUNT_LIMIT:
            raise errors.bad_mount_syntax(text[:64] + "…", f"more than {MOUNT_LIMIT} mounts")
    return tuple(found)


def _parse_entry(entry: str, cwd: str) -> Mount:
    parts = [_unescape(part) for part in _split(entry, ":", entry)]
    if len(parts) > 3:
        raise errors.bad_mount_syntax(entry, "too many colons")
    source, target, flags = (parts + ["", ""])[:3]
    if not source or (len(parts) > 1 and not target):
        raise errors.bad_mount_syntax(entry, "empty target" if source else "empty source")
    kind = source if source in WORDS else "bind"
    if kind == "bind":
        source = _source(source, cwd, entry)
        target = target or source
    elif not target:
        raise errors.bad_mount_syntax(entry, f"{kind} needs a target")
    target = _target(target, entry)
    read_only, options = _parse_flags(flags, kind, entry)
    return Mount(source if kind == "bind" else "", target, kind, read_only, options, entry)


def _source(source: str, cwd: str, entry: str) -> str:
    """The source as an absolute path; `..` stays, because symbolic links decide what it means."""
    if source in (".", "..") or source.startswith(("./", "../")):
        if not cwd.startswith("/"):
            raise errors.bad_mount_syntax(entry, "mount source must be an absolute path here")
        rest = source.removeprefix(".").lstrip("/") if not source.startswith("..") else source
        source = f"{cwd.rstrip('/')}/{rest}".rstrip("/") or "/"
    _check_path(source, SOURCE_WORDS, entry)
    return source


def _target(target: str, entry: str) -> str:
    """The target as an absolute path; `./x` starts at the container's root, as pyxis has it."""
    if target == "." or target.startswith("./"):
        target = f"/{target.removeprefix('.').lstrip('/')}"
    elif target.startswith(".."):
        raise errors.bad_mount_syntax(entry, ESCAPE_WORDS)
    _check_path(target, TARGET_WORDS, entry)
    if posixpath.normpath(target).strip("/") == "":
        raise errors.bad_mount_syntax(entry, "the container's root can't be a target")
    return target


def _check_path(path: str, words: str, entry: str) -> None:
    if not path.startswith("/"):
        raise errors.bad_mount_syntax(entry, words)
    if len(path.encode("utf-8", "surrogateescape")) > PATH_LIMIT:
        raise errors.bad_mount_syntax(entry[:64] + "…", f"path longer than {PATH_LIMIT} bytes")


def _parse_flags(text: str, kind: str, entry: str) -> tuple[bool | None, tuple[str, ...]]:
    """Flags to (read_only, the others)."""
    flags = text.split("+") if text else []
    for flag in flags:
        if flag not in ALL_FLAGS and not _is_tmpfs_value(flag, kind):
            raise errors.bad_mount_syntax(entry, f"unknown flag '{flag}'" if flag else "empty flag")
    for family in FAMILIES:
        _one_of([flag for flag in dict.fromkeys(flags) if flag in family], entry)
    for name in TMPFS_VALUES:
        _one_of([flag for flag in flags if flag.startswith(f"{name}=")], entry)
    access = [_ACCESS[flag] for flag in flags if flag in _ACCESS]
    options = dict.fromkeys(flag for flag in flags if flag not in _ACCESS and flag not in _SILENT)
    return access[0] if access else None, tuple(options)


def _is_tmpfs_value(flag: str, kind: str) -> bool:
    name, equals, value = flag.partition("=")
    if kind != "tmpfs" or not equals or name not in TMPFS_VALUES:
        return False
    return re.fullmatch(TMPFS_VALUES[name], value) is not None


def _one_of(given: Sequence[str], entry: str) -> None:
    if len(given) > 1:
        raise errors.bad_mount_syntax(entry, f"{' and '.join(given)} together")


def _split(text: str, separator: str, entry: str) -> list[str]:
    """Split at separators that no backslash precedes; backslashes stay in the parts."""
    parts, start, i = [], 0, 0
    while i < len(text):
        if text[i] == "\\":
            if text[i + 1 : i + 2] not in (",", ":", "\\"):
                raise errors.bad_mount_syntax(entry, BACKSLASH_WORDS)
            i += 1
        elif text[i] == separator:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    parts.append(text[start:])
    return parts


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
