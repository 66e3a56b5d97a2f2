"""Cgroups of a cluster's machines, where the machine below has cgroup v2: each is the root of a tree of its own.

Slurm makes `system.slice/slurmstepd.scope/job_J` in the tree that it sees, so nodes that shared one would take each
other's jobs for theirs. A node's first process is put into a cgroup of the node and unshares its cgroup namespace
there; its daemons get a service each, as systemd would give them. Runs as root.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

MOUNT_POINT = Path("/sys/fs/cgroup")
NEEDED = {"cpu", "cpuset", "memory", "pids"}
# What systemd has made on a real node before Slurm starts, with the controllers that it enables there. One has to stand
# behind `memory`: slurmd 22.05 does not see the last word of the list.
FIRST_PROCESS = "init.scope"
SLICE = "system.slice"
IN_SLICE = "+cpuset +cpu +memory +pids"
DEADLINE_S = 10.0

# In the machine, as it starts. slurmstepd 22.05 leaves its cgroup by moving to the root of what it sees; only the true
# root takes processes beside enabled controllers, so here that file leads to the first process' cgroup.
MOUNTS = f"""\
umount -l {MOUNT_POINT}
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 {MOUNT_POINT}
mkdir {MOUNT_POINT}/{FIRST_PROCESS} {MOUNT_POINT}/{SLICE}
echo 0 > {MOUNT_POINT}/{FIRST_PROCESS}/cgroup.procs
mount --bind {MOUNT_POINT}/{FIRST_PROCESS}/cgroup.procs {MOUNT_POINT}/cgroup.procs
"""


def available() -> bool:
    """Whether this machine has the cgroup v2 tree, with the controllers that Slurm uses."""
    try:
        return set((MOUNT_POINT / "cgroup.controllers").read_text().split()) >= NEEDED
    except OSError:
        return False


def place(cluster: str, machine: str) -> Path:
    """The cgroup of a machine, as the host sees it."""
    return MOUNT_POINT / "enclos-cluster" / cluster / machine


def create(cluster: str, machine: str) -> None:
    """Make the cgroup of a machine, with every controller that the host has."""
    folder = place(cluster, machine)
    folder.mkdir(parents=True)
    for above in (MOUNT_POINT, folder.parents[1], folder.parents[0]):
        _enable_all(above)


def delegate(cluster: str, machine: str) -> None:
    """Enable the controllers below a machine's root, and in its slice those that systemd enables.

    Whoever helped to start the machine may still be in its root, and the kernel enables nothing beside processes.

    Raises:
        OSError: the kernel refused for longer than the deadline.
    """
    folder = place(cluster, machine)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        _move_all(folder, folder / FIRST_PROCESS)
        try:
            _enable_all(folder)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    (folder / SLICE / "cgroup.subtree_control").write_text(IN_SLICE)


def remove(cluster: str) -> None:
    """Remove the cgroups of a cluster whose processes have ended; none is fine.

    Raises:
        OSError: something is still in there after the deadline.
    """
    top = MOUNT_POINT / "enclos-cluster" / cluster
    if not top.is_dir():
        return
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                folder.rmdir()
            top.rmdir()
            break
        except OSError:  # A killed process is in its cgroup until the kernel is done with it.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    with suppress(OSError):
        top.parent.rmdir()


def _move_all(source: Path, target: Path) -> None:
    for pid in (source / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (target / "cgroup.procs").write_text(pid)


def _enable_all(folder: Path) -> None:
    known = (folder / "cgroup.controllers").read_text().split()
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in known))
