"""What a step gets where the kernel lacks something: the documented other way. In the guests of `make test-vm`."""

from __future__ import annotations

import os

import pytest
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"
OLD = os.uname().release.startswith("6.1.")


@pytest.mark.vm
def test_roots_image_is_the_users_with_and_without_idmapped_squashfs(limited: Cluster) -> None:
    """Before Linux 6.2 squashfuse serves it, and nobody else has to know."""
    script = "stat -c %u:%g /usr/bin/busybox; touch /usr/bin/mine && stat -c %u /usr/bin/mine"
    command = ["srun", "-w", "n1", IMAGE, "bash", "-c", f"{script}; echo ready; read -r _"]
    with limited.popen(command, user="usera", stdin=-1) as running:
        assert running.stdout is not None
        told = [running.stdout.readline().strip() for _ in range(3)]
        names = [_name(pid) for pid in limited.processes("n1")]
        running.communicate("\n", timeout=100)
    assert told == ["61001:61001", "61001", "ready"]
    assert [name for name in names if name.startswith("squashfuse")] == (["squashfuse_ll"] if OLD else [])


@pytest.mark.vm
def test_check_says_what_the_kernel_lacks(limited: Cluster) -> None:
    done = limited.run(["enclos", "check"], node="n1", timeout=200)
    rows = [row for row in done.stdout.splitlines() if row.split()[1:2] in (["squashfs"], ["squashfs:"])]
    (squashfs,) = rows
    assert squashfs.split()[0] == ("note" if OLD else "ok")
    assert ("squashfuse serves every image" in squashfs) == OLD
    assert "cgroup v2" in done.stdout


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
