r"""The syntax of --container-mounts and of mounts.site: text to `Mount`, nothing else.

    SRC[:DST[:FLAG[+FLAG...]]][,SRC...]      tmpfs:DST[:FLAG[+FLAG...]]

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

_ACCESS = {"ro": True, "rw": False}
_DEPTH = {"bind": False, "rbind": True}
_PROPAGATION = ("private", "rprivate", "slave", "rslave")
_BIND_FLAGS = (
    "nosuid",
    "nodev",
    "noexec",
    "exec",
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
    "nosymfollow",
    "nofail",
    "x-create=auto",
    "x-create=dir",
    "x-create=file",
    *_PROPAGATION,
)
_TMPFS_FLAGS = ("nosuid", "nodev", "noexec", "exec", "noatime", "nodiratime", "relatime", "strictatime")
_TMPFS_VALUES = {
    "size": r"[1-9][0-9]{0,17}[kmgtKMGT]?|([1-9][0-9]?|100)%",
    "mode": "[0-7]{3,4}",
    "nr_inodes": r"[1-9][0-9]{0,11}[kmgKMG]?",
}
# Flags of mount(8) that pyxis passes on and that a container may not have. They get their
# own words because users will try them.
_IMPOSSIBLE = {
    "suid": "set-user-id programs have no effect in a container",
    "dev": "device nodes of mounts cannot be opened in a container",
    "shared": "mounts of a container do not appear on the node",
    "rshared": "mounts of a container do not appear on the node",
}


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as asked for.

    Attributes:
        source: absolute path on the node; empty for a tmpfs.
        target: absolute path in the container.
        kind: "bind" or "tmpfs".
        read_only: None when neither ro nor rw was given.
        recursive: include what is mounted below the source (rbind, the default).
        options: the other flags, in order, each once: `noexec`, `noatime`, `private`,
            `nofail`, `x-create=…`, for a tmpfs `size=…` and `mode=…`.
            nosuid and nodev are dropped: they hold for every mount.
        text: this mount as typed, for messages.
    """

    source: str
    target: str
    kind: str
    read_only: bool | None
    recursive: bool
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
        raise errors.bad_mount_syntax(entry, "empty source" if not source else "empty target")
    kind = "tmpfs" if source == "tmpfs" else "bind"
    if kind == "bind":
        source = _source(source, cwd, entry)
        target = target or source
    elif not target:
        raise errors.bad_mount_syntax(entry, "tmpfs needs a target")
    _check_path(target, "mount target must be an absolute path", entry)
    if posixpath.normpath(target).strip("/") == "":
        raise errors.bad_mount_syntax(entry, "the container's root can't be a target")
    read_only, recursive, options = _parse_flags(flags, kind, entry)
    return Mount("" if kind == "tmpfs" else source, target, kind, read_only, recursive, options, entry)


def _source(source: str, cwd: str, entry: str) -> str:
    """The source as an absolute path; `..` stays, because symbolic links decide what it means."""
    if source == "umount":
        raise errors.bad_mount_syntax(entry, "umount is not supported")
    if source in (".", "..") or source.startswith(("./", "../")):
        if not cwd.startswith("/"):
            raise errors.bad_mount_syntax(entry, "mount source must be an absolute path here")
        rest = source.removeprefix(".").lstrip("/") if not source.startswith("..") else source
        source = f"{cwd.rstrip('/')}/{rest}".rstrip("/") or "/"
    _check_path(source, 'mount source must be a relative path ("./…"), an absolute path or "tmpfs"', entry)
    return source


def _check_path(path: str, words: str, entry: str) -> None:
    if not path.startswith("/"):
        raise errors.bad_mount_syntax(entry, words)
    if len(path.encode("utf-8", "surrogateescape")) > PATH_LIMIT:
        raise errors.bad_mount_syntax(entry[:64] + "…", f"path longer than {PATH_LIMIT} bytes")


def _parse_flags(text: str, kind: str, entry: str) -> tuple[bool | None, bool, tuple[str, ...]]:
    """Flags to (read_only, recursive, the others)."""
    read_only: bool | None = None
    recursive: bool | None = None
    options: dict[str, None] = {}
    for flag in text.split("+") if text else []:
        if flag in _ACCESS:
            read_only = _once(read_only, _ACCESS[flag], "ro and rw", entry)
        elif kind == "bind" and flag in _DEPTH:
            recursive = _once(recursive, _DEPTH[flag], "bind and rbind", entry)
        elif _is_known(flag, kind):
            options[flag] = None
        else:
            raise errors.bad_mount_syntax(entry, _why_unknown(flag))
    for family in (
        _PROPAGATION,
        ("exec", "noexec"),
        ("noatime", "relatime", "strictatime"),
        ("x-create=auto", "x-create=dir", "x-create=file"),
        *((f"{k}=",) for k in _TMPFS_VALUES),
    ):
        _one_of(family, options, entry)
    return (
        read_only,
        kind == "bind" and recursive is not False,
        tuple(o for o in options if o not in ("nosuid", "nodev")),
    )


def _is_known(flag: str, kind: str) -> bool:
    if kind == "bind":
        return flag in _BIND_FLAGS
    name, equals, value = flag.partition("=")
    if equals and name in _TMPFS_VALUES:
        return re.fullmatch(_TMPFS_VALUES[name], value) is not None
    return flag in _TMPFS_FLAGS


def _why_unknown(flag: str) -> str:
    if flag in _IMPOSSIBLE:
        return f"flag '{flag}' is not possible: {_IMPOSSIBLE[flag]}"
    return f"unknown flag '{flag}'" if flag else "empty flag"


def _once(before: bool | None, now: bool, words: str, entry: str) -> bool:
    if before is not None and before is not now:
        raise errors.bad_mount_syntax(entry, f"{words} together")
    return now


def _one_of(family: Sequence[str], options: dict[str, None], entry: str) -> None:
    given = [o for o in options if o in family or (family[0].endswith("=") and o.startswith(family[0]))]
    if len(given) > 1:
        raise errors.bad_mount_syntax(entry, f"{' and '.join(given)} together")


def _split(text: str, separator: str, entry: str) -> list[str]:
    """Split at separators that no backslash precedes; backslashes stay in the parts."""
    parts, start, i = [], 0, 0
    while i < len(text):
        if text[i] == "\\":
            if text[i + 1 : i + 2] not in (",", ":", "\\"):
                raise errors.bad_mount_syntax(
                    entry, r"a backslash goes before a comma, a colon or a backslash"
                )
            i += 1
        elif text[i] == separator:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    parts.append(text[start:])
    return parts


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
