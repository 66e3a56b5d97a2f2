"""rdma.mode soft: each job network has a Soft-RoCE device over its overlay. In a guest: tests/vm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fabric
import mpistacks
import pytest
from conftest import Result, plain
from enclos.netns import rdma
from enclos.runtime.cluster.cluster import Cluster
from fabric import IMAGE
from vm.cards import command

CONFIG = "rdma:\n  mode: soft\n  default: auto\n"
OPTIONS = (f"--container-image={IMAGE}", "--container-network=job")


def load() -> None:
    """The driver as the distribution has it."""
    done = subprocess.run(
        ["modprobe", "-a", "rdma_rxe", "ib_uverbs", "rdma_ucm"], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        if "rdma" in os.environ.get("ENCLOS_REQUIRE", ""):
            pytest.fail(f"no Soft-RoCE: {done.stderr}")
        pytest.skip("no Soft-RoCE on this kernel")


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    load()
    made = make_cluster(2, config=CONFIG, cpus=4)
    fabric.make_image(made.layout.images)
    mpistacks.make_image(made.layout.images)
    return made


def knows_namespaces() -> bool:
    """Whether this kernel's rxe can be made in a network namespace: tried, in one."""
    script = (
        "ip link add v0 type veth peer name v1; ip link set v0 up; "
        "rdma link add enclostry type rxe netdev v0 && rdma link delete enclostry"
    )
    load()
    return subprocess.run(["unshare", "-n", "sh", "-c", script], check=False, capture_output=True).returncode == 0


def srun(cluster: Cluster, *words: str, user: str = "usera", nodes: str = "n1") -> Result:
    count = len(nodes.split(","))
    return cluster.run(["srun", f"-N{count}", "-w", nodes, "-c1", *OPTIONS, *words], user, timeout=120)


@pytest.mark.vm
def test_a_kernel_whose_driver_knows_no_namespaces(cluster: Cluster) -> None:
    """Linux 6.1: a clear error, before the program starts."""
    if knows_namespaces():
        pytest.skip("this kernel's rxe works in network namespaces")
    done = srun(cluster, "echo", "ran")
    line = next(plain(line) for line in done.stderr.splitlines() if "enclos: " in line)
    said = r"enclos: --container-rdma=auto: cannot make a Soft-RoCE device in the job's network \(.+\) on n1"
    assert re.fullmatch(said, line) and done.returncode != 0 and done.stdout == ""
    # Over TCP the network works, for who says so.
    assert srun(cluster, "--container-rdma=none", "echo", "ran").stdout == "ran\n"


@pytest.mark.vm_new
def test_each_job_has_a_device_of_its_own(cluster: Cluster) -> None:
    done = srun(cluster, "sh", "-c", "echo $SLURM_JOB_ID; ls /dev/infiniband; ibv_devinfo | grep -e state")
    assert done.returncode == 0, done.stderr
    job, manager, node, *state = done.stdout.split()
    assert (manager, node[:6], state) == ("rdma_cm", "uverbs", ["state:", "PORT_ACTIVE", "(4)"])
    # It is gone with the job's network.
    cluster.await_idle(60)
    deadline = time.monotonic() + 20
    while f"enclos{job}n" in command("rdma", "dev"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.vm_new
def test_one_device_whatever_is_asked(cluster: Cluster) -> None:
    for words in ("auto", "1"):
        done = srun(cluster, f"--container-rdma={words}", "sh", "-c", "ls /dev/infiniband | wc -l")
        assert done.stdout == "2\n", done.stderr
    done = srun(cluster, "--container-rdma=2", "true")
    assert "too few RDMA devices are active and for containers (1)" in done.stderr and done.returncode != 0
    assert srun(cluster, "--container-rdma=none", "sh", "-c", "ls /dev/infiniband 2> /dev/null").stdout == ""


SCRIPT = """\
device=$(basename $(ls -d /sys/class/infiniband/enclos${SLURM_JOB_ID}n${SLURM_NODEID}))
index=$(grep -l "$(printf ffff:0a4d)" /sys/class/infiniband/$device/ports/1/gids/* | head -n 1 | xargs basename)
peer=10.77.0.2
[ $SLURM_NODEID = 1 ] || sleep 4
"""


BANDWIDTH = "ib_write_bw -d $device -x $index -n 20 -s 1024"


@pytest.mark.vm_new
def test_verbs_over_the_overlay(cluster: Cluster) -> None:
    """Latency, bandwidth and connections between the two nodes of a job."""
    for server, client, said in (
        ("ibv_rc_pingpong -d $device -g $index -n 20", "ibv_rc_pingpong -d $device -g $index -n 20 $peer", "20 iters"),
        (f"{BANDWIDTH}", f"{BANDWIDTH} $peer", "1024"),
        ("rping -s -a $peer -C 3", "rping -c -a $peer -C 3 -v", "ping data: rdma-ping-2"),
    ):
        script = f"{SCRIPT}if [ $SLURM_NODEID = 1 ]; then timeout 60 {server}; else timeout 60 {client}; fi"
        done = srun(cluster, "sh", "-c", script, nodes="n1,n2")
        assert done.returncode == 0 and said in done.stdout, (done.stdout, done.stderr)


def sent(device: str) -> int:
    """How many bytes a device has sent. In shared mode only the initial namespace has its counters."""
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_bytes").read_text())


def allocate(cluster: Cluster, user: str) -> str:
    """A job on both nodes; its devices are there from its first step to its end."""
    said = cluster.run(["salloc", "-N2", "-n2", "-c1", "--no-shell"], user, timeout=60).stderr
    found = re.search(r"Granted job allocation (\d+)", said)
    assert found, said
    return found[1]


@pytest.mark.vm_new
@pytest.mark.parametrize("stack", mpistacks.STACKS.values(), ids=mpistacks.STACKS)
def test_an_mpi_program_sends_over_rdma(cluster: Cluster, stack: mpistacks.Stack) -> None:
    """Across two nodes, beside another job's devices: what the library says, and what the devices have sent."""
    other, job = allocate(cluster, "userb"), allocate(cluster, "usera")
    assert cluster.run(["srun", f"--jobid={other}", *OPTIONS, "true"], "userb").returncode == 0
    words = [f"--container-image={mpistacks.IMAGE}", "--container-network=job", f"--mpi={stack.launcher}"]
    done = cluster.run(["srun", f"--jobid={job}", *words, *stack.command()], "usera")
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and mpistacks.is_right(done.stdout), shown
    devices = [f"enclos{job}n{node}" for node in range(2)]
    assert stack.went_over(shown, devices), shown
    assert min(sent(device) for device in devices) > mpistacks.LEAST_BYTES
    for user in ("usera", "userb"):
        cluster.run(["scancel", f"--user={user}"])
    cluster.await_idle(60)


@pytest.mark.vm_new
def test_what_is_set_for_ucx(cluster: Cluster) -> None:
    """Without it UCX loses all datagrams of such a device; who sets it himself has the last word."""
    script = "echo ${UCX_UD_VERBS_ETH_DGID_CHECK-unset}"
    assert srun(cluster, "sh", "-c", script).stdout == "n\n"
    assert srun(cluster, "--container-rdma=none", "sh", "-c", script).stdout == "unset\n"
    words = ["env", "UCX_UD_VERBS_ETH_DGID_CHECK=y", "srun", "-N1", "-w", "n1", *OPTIONS, "sh", "-c", script]
    assert cluster.run(words, "usera").stdout == "y\n"


@pytest.mark.vm_new
def test_what_another_tenant_sees_in_shared_mode(cluster: Cluster) -> None:
    """The honest list (docs/security.md): names are seen, nodes are not in /dev, address indexes do not work."""
    words = ["srun", "-N2", "-n2", "-c1", *OPTIONS, "sh", "-c", "echo $SLURM_JOB_ID; sleep 300"]
    holder = cluster.popen(words, "userb")
    assert holder.stdout is not None
    other = holder.stdout.readline().strip()
    seen = srun(cluster, "sh", "-c", "ls /sys/class/infiniband; ls /dev/infiniband").stdout
    assert f"enclos{other}n0" in seen, "shared mode shows every device to everybody"
    assert seen.count("uverbs") == 1, "but only the own one's node is there"
    # Outside of containers a node is its user's, because whoever opens it uses its address indexes from anywhere.
    device = next(device for device in rdma.find().devices if device.name == f"enclos{other}n0")
    for user, opens in (("usera", False), ("userb", True), ("root", True)):
        tried = cluster.run(["bash", "-c", f"exec 3<> {device.node}"], user, node="n1")
        assert (tried.returncode == 0) == opens, (user, tried.stderr)
    ping = f"timeout 20 ibv_rc_pingpong -d enclos{other}n0 -g 1 -n 1"
    tried = cluster.run(["sh", "-c", f"{ping} & sleep 1; {ping} 127.0.0.1"], "usera", node="n1", timeout=60)
    assert tried.returncode != 0 and "iters" not in tried.stdout
    holder.terminate()


@pytest.mark.vm_new
def test_check_says_what_soft_needs(cluster: Cluster) -> None:
    shown = cluster.run(["enclos", "check", "--json"], node="n1", timeout=120).stdout
    rows = [row for row in json.loads(shown)["findings"] if row["subject"] == "RDMA"]
    assert [row["status"] for row in rows] == ["ok"], rows
