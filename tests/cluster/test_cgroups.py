"""Containers beside Slurm's own cgroups: what Slurm makes, limits and removes stays as it is."""

from __future__ import annotations

import json

import pytest
from conftest import Leftovers
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"


@pytest.mark.vm
def test_a_task_sees_its_steps_cgroup_alone(limited: Cluster) -> None:
    """With Slurm's limit of the job's memory in it, read-only."""
    script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max; echo 1 > /sys/fs/cgroup/memory.max"
    done = limited.run(["srun", "--mem=64", IMAGE, "sh", "-c", script], user="usera", timeout=120)
    assert done.stdout.split() == ["0::/", str(64 << 20)]
    assert "Read-only file system" in done.stderr


@pytest.mark.vm
def test_slurm_removes_its_cgroups(limited: Cluster, limited_leftovers: Leftovers) -> None:
    done = limited.run(["srun", "-N2", IMAGE, "hostname"], user="usera", timeout=120)
    assert sorted(done.stdout.split()) == ["n1", "n2"], done.stderr
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


# In a task's cgroup, which Slurm 22.05 gives to its user: many, and some that no path is long enough for.
FLOOD = """\
import glob, os
(task,) = glob.glob("/sys/fs/cgroup/system.slice/*/job_*/step_0/user/task_0")
os.chdir(task)
for number in range(300):
    os.mkdir(f"wide{number}")
for number in range(1200):
    os.mkdir("deep")
    os.chdir("deep")
print("made")
"""


@pytest.mark.vm_new
@pytest.mark.parametrize("delegate", [False, True])
def test_cgroups_that_another_process_of_the_user_makes_go_with_the_step(
    limited: Cluster, limited_leftovers: Leftovers, release: str, delegate: bool
) -> None:
    """From a shell on the node. Slurm leaves its own there, because it cannot remove them, or was killed itself."""
    if release != "22.05":
        pytest.skip("later releases of Slurm keep a task's cgroup for themselves")
    options = ["--container-cgroup=delegate"] if delegate else []
    command = ["srun", "-w", "n1", "--mem=100", IMAGE, *options, "sh", "-c", "echo up; exec sleep 1000"]
    with limited.popen(command, user="usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        made = limited.run(["python3", "-c", FLOOD], user="usera", node="n1", timeout=100)
        assert made.stdout == "made\n", made.stderr
        if not delegate:
            (row,) = json.loads(limited.run(["enclos", "ps", "--json"], node="n1").stdout)
            limited.run(["kill", "-9", str(row["stepd"])], node="n1")
        limited.run(["scancel", "--user=usera"])
        running.communicate(timeout=100)
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []
