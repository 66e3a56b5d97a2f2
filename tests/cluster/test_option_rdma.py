"""--container-rdma: the nodes of chosen devices, on the node's network. With devices only in a guest (tests/vm)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
from boxes import make_box, shell, srun
from conftest import Result, said
from enclos.netns import rdma
from enclos.runtime.cluster.cluster import Cluster

NAMES = ("enclosrdma0", "enclosrdma1", "enclosrdma2")
CONFIG = 'rdma:\n  devices: ["*rdma0", enclosrdma1]\n'


def refused(done: Result) -> str:
    assert done.returncode != 0
    return next(line[line.index("enclos: ") :] for line in done.stderr.splitlines() if "enclos: " in line)


@pytest.mark.parametrize("value", ["0", "100", "mlx5_0,", "-1", "a/b", "auto,,none"])
def test_srun_refuses_another_form(cluster: Cluster, value: str) -> None:
    done = srun(cluster, f"--container-rdma={value}", "true", image="/x")
    words = "invalid format: expected auto, none, names of RDMA devices or how many (1 to 99)"
    assert refused(done) == f"enclos: --container-rdma={value}: {words}"


@pytest.mark.skipif(bool(rdma.find().mode), reason="this kernel has RDMA")
def test_a_node_without_rdma(cluster: Cluster, box: object) -> None:
    for value in ("auto", "2", "mlx5_0"):
        done = srun(cluster, f"--container-rdma={value}", "true")
        assert refused(done) == f"enclos: --container-rdma={value}: this node has no RDMA on n1"
    assert shell(cluster, "ls /dev/infiniband 2>/dev/null || echo none", "--container-rdma=none") == "none\n"


# ---------------------------------------------------------------- with devices


@pytest.fixture(scope="module")
def devices() -> Iterator[None]:
    """Soft-RoCE on veth pairs, in the machine's namespace: in shared mode every node of the cluster sees them."""
    try:
        subprocess.run(["modprobe", "-a", "rdma_rxe", "ib_uverbs", "rdma_ucm"], check=False, capture_output=True)
        for name in NAMES:
            pair = ["ip", "link", "add", f"v{name[6:]}", "type", "veth", "peer", "name", f"w{name[6:]}"]
            subprocess.run(pair, check=True, capture_output=True)
            for end in "vw":
                subprocess.run(["ip", "link", "set", f"{end}{name[6:]}", "up"], check=True)
            rxe = ["rdma", "link", "add", name, "type", "rxe", "netdev", f"v{name[6:]}"]
            subprocess.run(rxe, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        for name in NAMES:
            subprocess.run(["ip", "link", "delete", f"v{name[6:]}"], check=False, capture_output=True)
        if "rdma" in os.environ.get("ENCLOS_REQUIRE", ""):
            pytest.fail(f"no Soft-RoCE device: {getattr(error, 'stderr', error)}")
        pytest.skip("no Soft-RoCE device on this kernel")
    yield
    for name in NAMES:
        subprocess.run(["rdma", "link", "delete", name], check=True)
        subprocess.run(["ip", "link", "delete", f"v{name[6:]}"], check=True)


@pytest.fixture(scope="module")
def fabric(make_cluster: Callable[..., Cluster], devices: None) -> Cluster:
    made = make_cluster(1, config=CONFIG)
    make_box(made.layout.images)
    return made


def inside(cluster: Cluster, *options: str) -> list[str]:
    done = srun(cluster, *options, "sh", "-c", "ls /dev/infiniband 2>/dev/null; true")
    assert (done.returncode, said(done.stderr)) == (0, [])
    return done.stdout.split()


def uverbs(name: str) -> str:
    return next(os.path.basename(device.node) for device in rdma.find().devices if device.name == name)


@pytest.mark.vm_new
def test_the_nodes_of_its_devices_and_no_others(fabric: Cluster) -> None:
    zero, one = uverbs("enclosrdma0"), uverbs("enclosrdma1")
    assert inside(fabric) == []
    assert inside(fabric, "--container-rdma=none") == []
    assert inside(fabric, "--container-rdma=enclosrdma1") == sorted(["rdma_cm", one])
    assert inside(fabric, "--container-rdma=1") == sorted(["rdma_cm", zero])
    assert inside(fabric, "--container-rdma=auto") == sorted(["rdma_cm", zero, one])


@pytest.mark.vm_new
def test_owner_and_mode_are_the_nodes(fabric: Cluster) -> None:
    script = "stat -c %a:%t:%T /dev/infiniband/uverbs*"
    outside = fabric.run(f"stat -c %a:%t:%T /dev/infiniband/{uverbs('enclosrdma0')}", node="n1").stdout
    assert shell(fabric, script, "--container-rdma=enclosrdma0") == outside


@pytest.mark.vm_new
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("enclosrdma2", "RDMA device enclosrdma2 is not for containers (not in rdma.devices)"),
        ("3", "too few RDMA devices are active and for containers (2)"),
    ],
)
def test_refusals(fabric: Cluster, value: str, text: str) -> None:
    assert refused(srun(fabric, f"--container-rdma={value}", "true")) == (
        f"enclos: --container-rdma={value}: {text} on n1"
    )


@pytest.mark.vm_new
@pytest.mark.parametrize(
    ("network", "text"),
    [
        ("job", "RDMA isolation needs namespace mode exclusive, found shared"),
        ("none", "not possible on --container-network=none"),
    ],
)
def test_a_private_network_promises_what_shared_mode_cannot_give(fabric: Cluster, network: str, text: str) -> None:
    done = srun(fabric, "--container-rdma=auto", f"--container-network={network}", "echo", "ran")
    assert (refused(done), done.stdout) == (f"enclos: --container-rdma=auto: {text} on n1", "")


@pytest.mark.vm_new
def test_check_says_the_mode_and_the_devices(fabric: Cluster) -> None:
    lines = fabric.run(["enclos", "check"], node="n1", timeout=120).stdout.splitlines()
    assert "ok      RDMA: mode shared; for containers: enclosrdma0 (active), enclosrdma1 (active)" in lines
    text = "note    RDMA: job networks are refused RDMA: isolation needs namespace mode exclusive, found shared"
    place = next(index for index, line in enumerate(lines) if line.startswith(text))
    said = " ".join(lines[place : place + 3])
    assert "netns_mode=0" in said and "while no other network namespace exists" in said
