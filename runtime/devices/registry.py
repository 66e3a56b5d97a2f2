"""The CDI files of this node: read when a device is needed, kept until one changes.

Nothing polls and nothing watches: a look at the directories' entries (microseconds) tells whether what was parsed is
still there. Only files that root alone can write are believed. A broken file matters when a device is looked for that
it may describe. Runs in the agent as root, and in `enclos check` and `render` as anybody.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence

import yaml
from enclos.runtime import errors
from enclos.runtime.devices import cdi
from enclos.runtime.devices.catalogue import Catalogue
from enclos.runtime.devices.cdi import Device

FILE_BYTES = 4 << 20
FILE_LIMIT = 256
SUFFIXES = (".json", ".yaml", ".yml")

Signature = tuple[tuple[str, int, int, int, int], ...]


class Registry:
    """The catalogue of some directories, parsed again when a file in them changes."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = tuple(directories)
        self._signature: Signature | None = None
        self._catalogue = Catalogue()

    def catalogue(self) -> Catalogue:
        """What the files say now."""
        signature = tuple(entry for directory in self._directories for entry in _look(directory))
        if signature != self._signature:
            self._catalogue = read(self._directories)
            self._signature = signature
        return self._catalogue


def _look(directory: str) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file does: inode, size, and both times (a file may be written in place, or renamed)."""
    found = []
    for path in (directory, *_files(directory)):
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return found


def _files(directory: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIXES))
    except OSError:
        return []
    return [os.path.join(directory, name) for name in names[:FILE_LIMIT]]


def read(directories: Sequence[str]) -> Catalogue:
    """Parse all files; a later directory's device replaces one of the same name (the CDI specification's order)."""
    made = Catalogue()
    for directory in directories:
        here: dict[str, Device] = {}
        for path in _files(directory):
            try:
                devices = cdi.parse(_load(path), path)
            except cdi.BrokenFile as error:
                made.broken[path] = str(error)
                continue
            for device in devices:
                if device.qualified in here:
                    made.twice[device.qualified] = (here[device.qualified].file, path)
                else:
                    made.twice.pop(device.qualified, None)
                here[device.qualified] = device
        made.devices.update(here)
    return made


def _load(path: str) -> object:
    try:
        text = _read(path).decode()
        return json.loads(text) if path.endswith(".json") else yaml.load(text, _LOADER)
    except OSError as error:
        raise cdi.BrokenFile(errors.reason(error.errno or 0)) from error
    except json.JSONDecodeError as error:
        raise cdi.BrokenFile(f"line {error.lineno}: {error.msg.lower()}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise cdi.BrokenFile(f"{line}{error.problem or 'not YAML'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise cdi.BrokenFile("not a text that can be read") from error


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read(path: str) -> bytes:
    """A file's content, if only root can have written it: what it says is done with root's power."""
    _check_owner(os.stat(os.path.dirname(path)), "its directory")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise cdi.BrokenFile("not a regular file")
        _check_owner(status, "it")
        if status.st_size > FILE_BYTES:
            raise cdi.BrokenFile(f"larger than {FILE_BYTES >> 20} MiB")
        return file.read(FILE_BYTES) or b""


def _check_owner(status: os.stat_result, what: str) -> None:
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise cdi.BrokenFile(f"{what} can be written by others than root")
