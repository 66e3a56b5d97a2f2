"""Where Slurm keeps a step in the cgroup v2 tree, and the end of all that is there; limits are set elsewhere."""

from __future__ import annotations

import os
from contextlib import suppress

MOUNT_POINT = "/sys/fs/cgroup"


def step_cgroup(stepd_pid: int) -> str:
    """Directory of the step's tasks, from slurmstepd's own place in the tree; empty where Slurm uses no cgroup v2.

    slurmstepd sits in `…/step_S/slurm`, its tasks are in `…/step_S/user` (slurm cgroup/v2 plugin). The path is
    never made from the job id: Slurm 26.05 names the job's directory otherwise.
    """
    if not _is_cgroup2():
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


def kill(directory: str) -> None:
    """cgroup.kill (Linux 5.14) ends everything in a step's cgroup at once, however fast it forks."""
    if not directory:
        return
    with suppress(OSError), open(f"{directory}/cgroup.kill", "w") as file:
        file.write("1")


def _is_cgroup2() -> bool:
    return os.path.exists(f"{MOUNT_POINT}/cgroup.controllers")
