"""`enclos top` on a node: live use, from cgroups in the guests of `make test-vm`, from /proc elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from enclos.runtime.cluster.cluster import Cluster

SPIN = "echo up; while :; do :; done"


def spin(cluster: Cluster, limits: list[str], image: str) -> list[dict[str, Any]]:
    """What top says on n1 of a step that keeps one processor busy, as its user, and as another."""
    step = ["srun", "-w", "n1", f"--container-image={image}", *limits, "bash", "-c", SPIN]
    with cluster.popen(step, user="usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        shown = cluster.run(["enclos", "top", "--json"], user="usera", node="n1")
        others = cluster.run(["enclos", "top", "--json"], user="userb", node="n1")
        table = cluster.run(["enclos", "top", "-n", "1", "--interval", "0.2"], node="n1").stdout.splitlines()
        running.terminate()
        running.communicate(timeout=100)
    assert [row for row in json.loads(others.stdout) if row["uid"] != 61002] == []
    assert table[0].split()[:3] == ["STEP", "USER", "CPU"] and any("usera" in row for row in table[1:])
    found: list[dict[str, Any]] = json.loads(shown.stdout)
    return found


def test_use_of_a_step_without_cgroups(idle: Cluster, image: str) -> None:
    (row,) = spin(idle, [], image)
    assert row["cpu"] > 0.05 and row["processes"] >= 1 and row["memory_bytes"] > 100_000


@pytest.mark.vm_new
def test_use_of_a_step_against_its_limits(limited: Cluster) -> None:
    limits = "--container-limit=cpu=0.5,pids=30,io=7:0:rbps=1M,hugetlb=2M:4M"
    (row,) = spin(limited, ["--mem=100", limits], "/images/openmpi.sqsh")
    assert 0.1 < row["cpu"] < 0.7 and row["cpu_limit"] == 0.5
    assert row["memory_limit_bytes"] == 100 << 20 and 0 < row["memory_bytes"] < 100 << 20
    assert (row["processes_limit"], row["processes"]) == (30, 1)
    assert row["others"] == [
        {"name": "io=7:0:rbps", "use": 0.0, "limit": 1 << 20},
        {"name": "hugetlb=2M", "use": 0, "limit": 4 << 20},
    ]
