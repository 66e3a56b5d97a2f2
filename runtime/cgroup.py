"""Cgroups of steps: where Slurm keeps them, and what is written there: limits, only ever tighter ones.

Runs as root in the agent, without waiting: each file is a call into the kernel. What a limit is, and which of several
holds, is limits.py's; which step gets which, steplimits.py's. Raises facts; steplimits.py words them.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from enclos.runtime.limits import CPU_PERIOD_US, Limit, cpu_list

MOUNT_POINT = "/sys/fs/cgroup"
# Where Slurm makes no cgroups for steps, those with limits get one here.
OWN_TREE = f"{MOUNT_POINT}/enclos"
# What Slurm leaves off (it enables cpuset, cpu and memory), and what we need below the root.
EXTRA_CONTROLLERS = ("pids", "io", "hugetlb", "rdma")
UNLIMITED = math.inf
REMOVE_SECONDS = 5.0

Kind = Literal["above", "no controller", "no device", "refused"]


@dataclass(frozen=True, slots=True)
class Refused(Exception):
    """A limit that cannot be set: it is above what is granted, or the kernel has nothing of the kind."""

    limit: Limit
    kind: Kind
    detail: str = ""


def is_cgroup2() -> bool:
    """Whether the node has the cgroup v2 tree where Slurm looks for it."""
    return os.path.exists(f"{MOUNT_POINT}/cgroup.controllers")


def step_cgroup(stepd_pid: int) -> str:
    """Directory of the step's tasks, from slurmstepd's own place in the tree; empty where Slurm uses no cgroup v2.

    slurmstepd sits in `…/step_S/slurm`, its tasks are in `…/step_S/user` (slurm cgroup/v2 plugin). The path is
    never made from the job id: Slurm 26.05 names the job's directory otherwise.
    """
    if not is_cgroup2():
        return ""
    try:
        with open(f"/proc/{stepd_pid}/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    if os.path.basename(path) != "slurm":
        return ""
    directory = f"{MOUNT_POINT}{os.path.dirname(path)}/user"
    return directory if os.path.isdir(directory) else ""


def ident(directory: str) -> int:
    """The kernel's number of a cgroup, which it gives to no other; 0 if there is none."""
    try:
        return os.stat(directory).st_ino
    except OSError:
        return 0


def kill(directory: str) -> None:
    """cgroup.kill (Linux 5.14) ends everything in a step's cgroup at once, however fast it forks."""
    if not directory:
        return
    with suppress(OSError), open(f"{directory}/cgroup.kill", "w") as file:
        file.write("1")


# ---------------------------------------------------------------- controllers


def enable_controllers(slices: Iterable[str] = ("system.slice",)) -> None:
    """At the agent's start: what Slurm leaves off, from the root down to where slurmd makes its scope.

    They stay enabled when the agent ends: running steps have their limits by them. Levels that are not there yet are
    enabled by the first step that needs them.
    """
    for directory in (MOUNT_POINT, *(f"{MOUNT_POINT}/{name}" for name in slices)):
        known = words(f"{directory}/cgroup.controllers")
        for name in EXTRA_CONTROLLERS:
            if name in known:
                with suppress(OSError):  # No such thing below: a step that needs it gets an error in words.
                    write(f"{directory}/cgroup.subtree_control", f"+{name}")


def enable(directory: str, name: str) -> None:
    """Enable a controller for what is below a directory too, from the root down; one that the kernel lacks is fine.

    Raises:
        OSError: the kernel refused, mostly because of a process in between.
    """
    if name in words(f"{MOUNT_POINT}/cgroup.controllers"):
        for parent in (MOUNT_POINT, *reversed(list(_chain(directory)))):
            write(f"{parent}/cgroup.subtree_control", f"+{name}")


def _enable_for(directory: str, limit: Limit) -> None:
    """Enable a limit's controller for a directory; no process is in between."""
    name = limit.controller
    if name in words(f"{directory}/cgroup.controllers"):
        return
    if name not in words(f"{MOUNT_POINT}/cgroup.controllers"):
        raise Refused(limit, "no controller", name)
    try:
        enable(os.path.dirname(directory), name)
    except OSError as error:
        raise Refused(limit, "refused", f"enable {name}: {os.strerror(error.errno or 0).lower()}") from error


def _chain(directory: str) -> Iterator[str]:
    """The directory and those above it, without the root, which has no limits."""
    while directory.startswith(f"{MOUNT_POINT}/"):
        yield directory
        directory = os.path.dirname(directory)


# ---------------------------------------------------------------- limits


def held(directory: str) -> list[Limit]:
    """What holds a process in a cgroup, from there up to the root, as limits to be set on another one."""
    found = []
    for file in ("memory.max", "memory.swap.max", "pids.max", "cpu.max"):
        if (value := granted(directory, file)) != UNLIMITED:
            found.append(Limit(file, "", int(value), value_text(file, value)))
    cpus = granted_cpus(directory)
    if cpus and cpus != granted_cpus(MOUNT_POINT):
        found.append(Limit("cpuset.cpus", "", 0, cpu_text(cpus), cpus))
    return found


def tighten(directory: str, wanted: Iterable[Limit], site: Iterable[Limit], within: str = "") -> list[Limit]:
    """Set limits on a step's cgroup, after a look at what Slurm has set there and above.

    Args:
        wanted: the user's: one above what is granted is an error.
        site: the site's: one above what is granted has no effect.
        within: what a wanted limit is compared with, instead of the step's own cgroup.

    Returns:
        Those that were set.

    Raises:
        Refused: nothing of the step may run then.
    """
    made = []
    for limit in wanted:
        _enable_for(directory, limit)
        if _exceeds(within or directory, limit):
            raise Refused(limit, "above", _shown(within or directory, limit))
        _set(directory, limit)
        made.append(limit)
    for limit in site:
        _enable_for(directory, limit)
        narrowed = _narrowed(directory, limit)
        if narrowed is not None:
            _set(directory, narrowed)
            made.append(limit)
    return made


def set_oom_group(directory: str) -> None:
    """Let the kernel end all of the step when its memory is full, not the task that it likes least."""
    with suppress(OSError):
        write(f"{directory}/memory.oom.group", "1")


def granted(directory: str, file: str, field: str = "") -> float:
    """The smallest value of a limit on the way up; UNLIMITED if there is none."""
    return min((_read(f"{above}/{file}", field) for above in _chain(directory)), default=UNLIMITED)


def granted_cpus(directory: str) -> frozenset[int]:
    """The processors that the step may use; empty where no controller says."""
    for above in (*_chain(directory), MOUNT_POINT):
        with suppress(OSError, ValueError), open(f"{above}/cpuset.cpus.effective") as file:
            return cpu_list(file.read().strip())
    return frozenset()


def _exceeds(directory: str, limit: Limit) -> bool:
    if limit.file == "cpuset.cpus":
        return not limit.cpus <= granted_cpus(directory)
    return limit.value > _grant(directory, limit)


def _grant(directory: str, limit: Limit) -> float:
    """In the limit's unit. A quota of more processors than there are is above the grant, too."""
    found = granted(directory, limit.file, limit.field)
    if limit.file == "cpu.max" and (cpus := granted_cpus(directory)):
        return min(found, len(cpus) * CPU_PERIOD_US)
    return found


def _shown(directory: str, limit: Limit) -> str:
    """The grant as a person reads it."""
    if limit.file == "cpuset.cpus":
        return f"processors {cpu_text(granted_cpus(directory))}"
    return value_text(limit.file, _grant(directory, limit))


def _narrowed(directory: str, limit: Limit) -> Limit | None:
    """The part of a site's limit that tightens anything; None if Slurm's is tighter already."""
    if limit.file != "cpuset.cpus":
        return limit if limit.value < _grant(directory, limit) else None
    inside = limit.cpus & granted_cpus(directory)
    if not inside:
        raise Refused(limit, "above", _shown(directory, limit))
    return Limit(limit.file, "", 0, limit.text, inside) if inside != granted_cpus(directory) else None


def _set(directory: str, limit: Limit) -> None:
    if limit.file == "cpu.max":
        text = f"{limit.value} {CPU_PERIOD_US}"
    elif limit.file == "cpuset.cpus":
        text = cpu_text(limit.cpus)
    else:
        text = f"{limit.field}={limit.value}" if limit.field else str(limit.value)
    try:
        write(f"{directory}/{limit.file}", text)
        if limit.controller == "hugetlb":
            _limit_reservations(directory, limit)
    except FileNotFoundError as error:
        raise Refused(limit, "no controller", limit.file) from error
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise Refused(limit, "no device", limit.device) from error
        raise Refused(limit, "refused", os.strerror(error.errno or 0).lower()) from error


def _limit_reservations(directory: str, limit: Limit) -> None:
    """Let mmap() and shmget() refuse what is above the limit of huge pages, which programs can handle.

    The limit of pages alone is met when one is written to, and there the kernel has nothing but SIGBUS. It stays for
    mappings that reserve nothing (Documentation/admin-guide/cgroup-v1/hugetlb.rst).
    """
    file = f"{directory}/{limit.file.removesuffix('max')}rsvd.max"
    if limit.value < _read(file, ""):
        write(file, str(limit.value))


def _read(path: str, field: str) -> float:
    """A value of a limit file; UNLIMITED for max, and where there is no such file."""
    try:
        with open(path) as file:
            text = file.read()
    except OSError:
        return UNLIMITED
    if path.endswith("/cpu.max"):
        quota, period = text.split()
        return UNLIMITED if quota == "max" else int(quota) * CPU_PERIOD_US / int(period)
    if field:
        device, key = field.split()
        rows = [row.split() for row in text.splitlines()]
        pairs = [pair.partition("=") for row in rows if row and row[0] == device for pair in row[1:]]
        text = next((value for name, _, value in pairs if name == key), "max")
    return UNLIMITED if text.strip() in ("max", "") else int(text)


def cpu_text(cpus: Iterable[int]) -> str:
    """A set of processors as the kernel writes it: 0-3,8."""
    parts: list[str] = []
    ordered = sorted(cpus)
    start = 0
    for index, cpu in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != cpu + 1:
            parts.append(str(cpu) if index == start else f"{ordered[start]}-{cpu}")
            start = index + 1
    return ",".join(parts)


def value_text(file: str, value: float) -> str:
    """A number in the unit in which it is asked for."""
    if value == UNLIMITED:
        return "no limit"
    if file == "cpu.max":
        return f"{value / CPU_PERIOD_US:g}"
    whole = int(value)
    if file.startswith(("memory.", "hugetlb.")):
        for suffix, shift in (("G", 30), ("M", 20), ("K", 10)):
            if whole and whole % (1 << shift) == 0:
                return f"{whole >> shift}{suffix}"
    return str(whole)


# ---------------------------------------------------------------- what happened


@dataclass(frozen=True, slots=True)
class Events:
    """How often a step met the limits of its own cgroup, not of those above or below."""

    killed: int
    refused_forks: int


def events(directory: str) -> Events:
    """Zero for everything where the cgroup, its controllers or the kernel's counters are not there."""
    full = _count(f"{directory}/memory.events.local", "oom")
    killed = _count(f"{directory}/memory.events", "oom_kill") if full else 0
    return Events(killed, _count(f"{directory}/pids.events", "max"))


def refused_huge_pages(directory: str, file: str) -> int:
    """How often the kernel refused a huge page, or its reservation, to the step; `file` as hugetlb.2MB.max.

    It counts where the task is, whichever limit above that was met; Slurm sets none of these.
    """
    return _count(f"{directory}/{file.removesuffix('max')}events.local", "max")


def refused_rdma(directory: str, field: str) -> int:
    """How often this limit of an RDMA device was met, `field` as "mlx5_0 hca_object".

    0 where the kernel does not count: Linux 7.2 does (rdma.events.local), 6.1 does not.
    """
    device, _, key = field.partition(" ")
    with suppress(OSError), open(f"{directory}/rdma.events.local") as file:
        for row in file:
            name, *pairs = row.split()
            if name == device:
                counts = dict(pair.split("=") for pair in pairs)
                return int(counts.get(f"{key}.max", "0"))
    return 0


def _count(path: str, key: str) -> int:
    with suppress(OSError, ValueError), open(path) as file:
        for row in file:
            name, _, value = row.partition(" ")
            if name == key:
                return int(value)
    return 0


# ---------------------------------------------------------------- a tree of our own


def own_cgroup(name: str) -> str:
    """The directory of a step for which Slurm has none; `create` makes it, `remove` removes it."""
    return f"{OWN_TREE}/{name}"


def create(directory: str) -> None:
    """Make it; one that is there is fine."""
    os.makedirs(directory, 0o755, exist_ok=True)


def enter(directory: str, pid: int) -> None:
    """Put a process there. What it forks is there, too; raises OSError."""
    write(f"{directory}/cgroup.procs", str(pid))


def place_of(pid: int) -> str:
    """Directory of the cgroup v2 in which a process is; "" where the node has no such tree. OSError when it is gone."""
    if not is_cgroup2():
        return ""
    found = [directory for names, directory in _directories(_memberships(pid)) if not names]
    return found[0] if found else ""


def follow(pid: int) -> None:
    """Enter the cgroups in which another process is, of every hierarchy that is mounted.

    Raises OSError: the kernel does not let this one in, or the other has ended.
    """
    own = _memberships("self")
    for _, directory in _directories([entry for entry in _memberships(pid) if entry not in own]):
        enter(directory, os.getpid())


def _memberships(pid: int | str) -> list[tuple[str, str]]:
    """(controllers, path) in each hierarchy, see cgroups(7); version 2 has no controllers there."""
    with open(f"/proc/{pid}/cgroup") as file:
        rows = [line.split(":", 2) for line in file.read().splitlines()]
    return [(names, path) for _, names, path in rows]


def _directories(memberships: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(controllers, directory) of those that are mounted. What lies above a mount's root is out of reach."""
    with open("/proc/self/mountinfo") as file:
        rows = [line.split() for line in file]
    rows = [row for row in rows if row[-3] in ("cgroup", "cgroup2")]
    mounted = [(row[3].rstrip("/"), row[4], row[-3], row[-1].split(",")) for row in rows]
    for names, path in memberships:
        wanted = set(names.split(",")) if names else set()
        kind = "cgroup" if names else "cgroup2"
        for root, place, fstype, options in mounted:
            below = path[len(root) :]
            if fstype == kind and wanted <= set(options) and path.startswith(root) and "/.." not in below:
                yield names, place + below.rstrip("/")
                break


def place_for_more(directory: str) -> str | None:
    """Where in a step's cgroup one more process may sit; "" for a step that has none, None if there is no place.

    Below Slurm's it is the cgroup of a task: Slurm ends what is in it with the step, and removes it. A directory of
    ours beside it would be in Slurm's way, and in the step's own no process may sit.
    """
    if not directory or is_own(directory):
        return directory
    try:
        names = [name for name in os.listdir(directory) if name.startswith("task_") and name[5:].isdigit()]
    except OSError:
        return None
    # Where no plugin limits or counts tasks one by one, all of them stay in the one in which Slurm tracks them
    # (cgroup_v2.c, cgroup_p_step_addto); otherwise it is there only until each has its own.
    if not names:
        place = f"{directory}/task_special"
        return place if words(f"{place}/cgroup.procs") else None
    place = f"{directory}/{min(names, key=lambda name: int(name[5:]))}"
    # With controllers below, a task's cgroup takes no process (delegation.py).
    return f"{place}/inside" if os.path.isdir(f"{place}/inside") else place


def is_own(directory: str) -> bool:
    return directory.startswith(f"{OWN_TREE}/")


def remove(directory: str) -> bool:
    """End what is in a cgroup of our own, and remove it; one that is gone is fine. False if something does not end."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        kill(directory)
        try:
            os.rmdir(directory)
            return True
        except FileNotFoundError:
            return True
        except OSError:  # The kernel is not done with the processes.
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)


def write(path: str, text: str) -> None:
    """Write to a file of a cgroup; one that is not there is never created: its controller is not there."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def words(path: str) -> list[str]:
    """The words of such a file; none where it is not there."""
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []
