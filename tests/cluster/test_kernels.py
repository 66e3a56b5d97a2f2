"""What a step gets where the kernel lacks something: the documented other way. In the guests of `make test-vm`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from enclos.runtime.cluster.cluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
from layers import Entry, layer, write_layout

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
    (controllers,) = [row for row in done.stdout.splitlines() if "cgroup v2" in row]
    assert ("without hugetlb: limits of these are refused" in controllers) == OLD
    (again,) = [row for row in done.stdout.splitlines() if "tmpfs attributes" in row]
    assert again.split()[0] == ("note" if OLD else "ok")


@pytest.mark.vm
def test_a_removed_directory_of_the_image(limited: Cluster) -> None:
    """Before Linux 6.6 a tmpfs has no attributes in which overlayfs could note that nothing is below it."""
    script = "rm -r /root && mkdir /root && echo made; echo x > /file && mkdir /fresh && echo alive"
    done = limited.run(["srun", "-w", "n1", IMAGE, "bash", "-c", script], user="usera", timeout=200)
    assert done.stdout.split() == (["alive"] if OLD else ["made", "alive"])
    assert ("Input/output error" in done.stderr) == OLD


@pytest.mark.vm
def test_an_image_of_several_layers(limited: Cluster) -> None:
    """Before Linux 6.2 the kernel cannot show them as the user's."""
    folder = limited.layout.shared / "layers"
    busybox = Path("/bin/busybox").read_bytes()
    entries = [[Entry("bin/busybox", data=busybox, mode=0o755)], [Entry("greeting", data=b"hello")]]
    write_layout(folder, [layer(each) for each in entries])
    command = ["srun", "-w", "n1", "--container-image=oci:/shared/layers:t", "/bin/busybox", "cat", "/greeting"]
    done = limited.run(command, user="usera", timeout=200)
    if OLD:
        assert (done.returncode, done.stdout) == (1, "")
        assert "the kernel cannot show its layers as yours (no idmapped mounts of squashfs" in done.stderr
    else:
        assert done.stdout == "hello", done.stderr


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
