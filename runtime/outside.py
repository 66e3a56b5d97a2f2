"""Where the paths that a user names are meant: the mount namespace that Slurm gave his job, if it gave it one.

job_container/tmpfs and the namespace plugins mount a /tmp of the job's own there. Looks at mount tables and compares
names only; the paths themselves are looked up by builders, as the user. Runs in the agent, as root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from enclos.runtime import stepd
from enclos.runtime.members import identity
from enclos.runtime.mounts import Mount
from enclos.runtime.request import StepRequest


class Outside:
    """The mount namespace of one step's job; owns its descriptor, which is -1 while that is the node's."""

    def __init__(self, stepd_pid: int, node_fd: int) -> None:
        """slurmstepd may be in it already: then nothing has to be built again when the first task is there.

        `node_fd` is the node's mount namespace, the caller's; the agent has a copy of its own.
        """
        self.fd = -1
        self._node = identity(node_fd)
        self._begun_in: int | None = None
        self._usable = False
        try:
            # FIXME: with a pid namespace, too, the /proc there does not know the builder, which needs it.
            self._usable = not stepd.lives_elsewhere(stepd_pid, "pid")
            if self._usable:
                self._take(os.open(f"/proc/{stepd_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), stepd_pid)
        except OSError:
            self._usable = False  # It has ended, or is about to.

    def follow(self, fd: int, task_pid: int, request: StepRequest, site_mounts: Sequence[Mount]) -> bool:
        """Take a task's mount namespace instead; it is copied.

        Returns:
            whether something that the step names may lie elsewhere there, so that what was begun has to be done again.
        """
        if not self._usable or identity(fd) == (identity(self.fd) if self.fd >= 0 else self._node):
            return False
        changed = _names_private(request, site_mounts, private_places(task_pid, self._begun_in))
        self._take(os.dup(fd), task_pid)
        return changed

    def _take(self, fd: int, pid: int) -> None:
        self.close()
        if identity(fd) == self._node:
            os.close(fd)
        else:
            self.fd, self._begun_in = fd, pid

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self._begun_in = -1, None


def private_places(pid: int, other: int | None = None) -> Sequence[str]:
    """Where a process sees another mount than `other` or this one does; all paths, when it has ended."""
    try:
        theirs, others = _mounted_for(pid), _mounted_for(other)
    except OSError:
        return ("/",)
    return [place for place, what in theirs.items() if others.get(place) != what]


def _mounted_for(pid: int | None) -> dict[str, tuple[str, str]]:
    with open(f"/proc/{pid or 'self'}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return mounted(file.read())


def mounted(mountinfo: str) -> dict[str, tuple[str, str]]:
    """Which part of which file system is on top at each place, by the last line of it (proc_pid_mountinfo(5))."""
    found = {}
    for row in mountinfo.splitlines():
        _, _, device, root, place, *_ = row.split(" ")
        found[_unescape(place)] = device, root
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _names_private(request: StepRequest, site_mounts: Sequence[Mount], places: Sequence[str]) -> bool:
    """Whatever the user mounts may lead there by a symbolic link; the others are compared by name."""
    if not places:
        return False
    if any(mount.kind == "bind" for mount in request.mounts):
        return True
    sources = [mount.source for mount in site_mounts]
    named = [path for path in (request.image_path(), request.home, *sources) if path]
    return any(_overlap(path, place) for path in named for place in places)


def _overlap(path: str, place: str) -> bool:
    """Whether one lies below the other; a path with `..` may lie anywhere."""
    names, place_names = ([part for part in text.split("/") if part not in ("", ".")] for text in (path, place))
    shorter = min(len(names), len(place_names))
    return ".." in names or names[:shorter] == place_names[:shorter]
