"""Containers beside Slurm's own cgroups: what Slurm makes, limits and removes stays as it is."""

from __future__ import annotations

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
