"""--container-unshare: which namespaces are the container's own."""

from __future__ import annotations

import pytest
from boxes import shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


def namespaces(cluster: Cluster, *options: str) -> dict[str, str]:
    rows = shell(cluster, "for ns in net ipc uts; do readlink /proc/self/ns/$ns; done", *options).split()
    return {row.partition(":")[0]: row for row in rows}


def on_node(cluster: Cluster) -> dict[str, str]:
    rows = cluster.run("for ns in net ipc uts; do readlink /proc/self/ns/$ns; done", node="n1").stdout.split()
    return {row.partition(":")[0]: row for row in rows}


def test_unshare_net(idle: Cluster) -> None:
    script = "ls /sys/class/net; nc -w 1 127.0.0.1 65535 </dev/null; nc -w 1 192.0.2.1 53 </dev/null; true"
    done = srun(idle, "--container-unshare=net", "sh", "-c", script)
    assert done.stdout == "lo\n"
    assert "refused" in done.stderr.splitlines()[0].lower()
    assert "unreachable" in done.stderr.splitlines()[1].lower()


def test_unshare_is_per_node(idle: Cluster) -> None:
    done = srun(idle, "-n3", "--container-unshare=net", "readlink", "/proc/self/ns/net")
    assert len(done.stdout.split()) == 3
    assert len(set(done.stdout.split()) - {on_node(idle)["net"]}) == 1


def test_unshare_ipc(idle: Cluster) -> None:
    script = "stat -c %d /dev/shm; stat -c %d /dev/mqueue; stat -c %d /dev"
    inside = shell(idle, script, "--container-unshare=ipc").split()
    assert not set(inside) & set(idle.run(script, node="n1").stdout.split())
    assert namespaces(idle, "--container-unshare=ipc")["ipc"] != on_node(idle)["ipc"]


def test_unshare_uts(idle: Cluster) -> None:
    assert namespaces(idle, "--container-unshare=uts")["uts"] != on_node(idle)["uts"]
    assert shell(idle, "hostname", "--container-unshare=uts") == "n1\n"


def test_unshare_all(idle: Cluster) -> None:
    inside, outside = namespaces(idle, "--container-unshare=net,ipc,uts"), on_node(idle)
    assert [name for name in outside if inside[name] == outside[name]] == []


@pytest.mark.parametrize("value", ["foo", "net,foo", "net,,ipc"])
def test_unknown_namespace(idle: Cluster, value: str) -> None:
    done = srun(idle, f"--container-unshare={value}", "true")
    assert done.returncode != 0
    assert f"--container-unshare={value}: unknown namespace" in done.stderr


def test_unshare_pid(idle: Cluster) -> None:
    done = srun(idle, "--container-unshare=net,pid", "true")
    assert done.returncode != 0
    assert "no process can join a pid namespace" in done.stderr


def test_unshare_net_and_a_network(idle: Cluster) -> None:
    done = srun(idle, "--container-unshare=net", "--container-network=job", "true")
    assert done.returncode == 1
    assert "--container-unshare=net: cannot be combined with --container-network=job\n" in done.stderr
    assert shell(idle, "ls /sys/class/net", "--container-unshare=net", "--container-network=none") == "lo\n"
