"""--container-cgroup=delegate: cgroups that a task may make below its own, and their end.

    …/step_S/user/task_T            Slurm's; limits and counts what is below it
    …/step_S/user/task_T/delegated  the task's: root of its cgroup namespace, and its user's to divide
    …/step_S/user/task_T/inside     root's; where `enclos exec` puts its processes

Slurm neither sees nor removes what is below a task's cgroup. So all of it is ended and removed when the task has ended,
before Slurm removes its own; and when Slurm kills the step, which is seen by its keeper's end (spank/delegate.c). Runs
as root in the agent; what is slow runs in a thread of it. Raises OSError as it comes: steps.py words it.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from enclos.runtime import cgroup

PLACE = "delegated"
INSIDE = "inside"
# What a user can make the kernel keep. A Kubernetes node with 110 pods has about 500, four deep.
MOST_CGROUPS = 4096
MOST_DEPTH = 32
# Files of a cgroup that the kernel says may be given away: no limit is among them.
GIVEN_AWAY = "/sys/kernel/cgroup/delegate"
# What Slurm leaves off, and a manager of containers looks for.
WANTED = ("pids", "io")
REMOVE_SECONDS = 10.0
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def delegate(step_directory: str, pid: int, uid: int, gid: int) -> str:
    """Make a cgroup below that of a task, give it to the user, and put the task there.

    Args:
        step_directory: of the step's tasks (`…/step_S/user`).
        pid: of the task, which Slurm has placed.

    Returns:
        The task's own cgroup, for `revoke`.

    Raises:
        OSError: the kernel refused, or the task is not where Slurm puts tasks.
    """
    task_directory = _place_of(pid)
    parent, name = os.path.split(task_directory)
    if parent != step_directory or re.fullmatch("task_[0-9]+", name) is None:
        raise OSError(f"the task is not in a cgroup of its own ({task_directory})")
    for controller in WANTED:
        cgroup.enable(step_directory, controller)
    place = f"{task_directory}/{PLACE}"
    # Slurm 22.05 gives a task's cgroup to its user: one that he made there would have limits that are his to change.
    with suppress(FileNotFoundError):
        os.rmdir(place)
    os.mkdir(place, 0o755)
    cgroup.write(f"{place}/cgroup.max.descendants", str(MOST_CGROUPS))
    cgroup.write(f"{place}/cgroup.max.depth", str(MOST_DEPTH))
    for found in [str(pid), *cgroup.words(f"{task_directory}/cgroup.procs")]:
        with suppress(ProcessLookupError):
            cgroup.write(f"{place}/cgroup.procs", found)
    os.makedirs(f"{task_directory}/{INSIDE}", 0o755, exist_ok=True)
    # Only now: the kernel gives no controllers to what is below a cgroup with processes in it.
    for controller in cgroup.words(f"{task_directory}/cgroup.controllers"):
        cgroup.write(f"{task_directory}/cgroup.subtree_control", f"+{controller}")
    os.chown(place, uid, gid)
    for file in cgroup.words(GIVEN_AWAY):
        with suppress(FileNotFoundError):
            os.chown(f"{place}/{file}", uid, gid)
    return task_directory


def revoke(task_directory: str) -> bool:
    """End what is below a task's cgroup and remove it; nothing there is fine. False if something does not end."""
    # From now on nobody makes another: neither what is in there, nor its user from outside. (Of the task's own
    # directory, too: Slurm 22.05 gives that to the user.)
    with suppress(OSError):
        cgroup.write(f"{task_directory}/cgroup.max.descendants", "0")
    deadline = time.monotonic() + REMOVE_SECONDS
    while os.path.isdir(task_directory):
        cgroup.kill(task_directory)
        if _remove_below(task_directory):
            break
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def remove_step(step_directory: str) -> bool:
    """What Slurm could not remove because of what was below: `…/step_S`, and the job's if that was the last.

    Of any step: Slurm 22.05 gives a task's cgroup to its user, so each process of his can make others in there, and a
    slurmstepd that was killed removes nothing. False if something does not end.
    """
    step = os.path.dirname(step_directory)
    if not os.path.isdir(step):
        return True
    ended = revoke(step)
    for directory in (step, os.path.dirname(step)):
        with suppress(OSError):
            os.rmdir(directory)
    return ended


def _remove_below(top: str) -> bool:
    """Remove all directories below one; True if none is left. In a cgroup are no files to remove, and no links.

    A user may have made them deeper than a path can be long, or than functions can call each other.
    """
    try:
        fd = os.open(top, DIRECTORY)
    except FileNotFoundError:
        return True
    # For each directory on the way down to where `fd` is: what is left in it. The last one is being looked at.
    left = [_remove_children(fd)]
    stuck = False
    try:
        while left[0] or len(left) > 1:
            if left[-1]:
                try:
                    fd = _step_to(fd, left[-1][-1])
                except FileNotFoundError:
                    left[-1].pop()
                else:
                    left.append(_remove_children(fd))
            else:
                fd = _step_to(fd, "..")
                left.pop()
                stuck |= not _remove(fd, left[-1].pop())
    finally:
        os.close(fd)
    return not stuck


def _step_to(fd: int, name: str) -> int:
    """The descriptor of a directory beside that of another one, which is closed."""
    other = os.open(name, DIRECTORY, dir_fd=fd)
    os.close(fd)
    return other


def _remove_children(fd: int) -> list[str]:
    """The names of those that could not be removed, because of what is in them."""
    names: list[str] = []
    with suppress(FileNotFoundError), os.scandir(fd) as entries:
        names += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [name for name in names if not _remove(fd, name)]


def _remove(fd: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=fd)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _place_of(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup") as file:
        path = next((row[3:] for row in file.read().splitlines() if row.startswith("0::")), "")
    return f"{cgroup.MOUNT_POINT}{path}"
