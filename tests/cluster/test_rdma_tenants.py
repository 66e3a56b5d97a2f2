"""Two tenants on the same two nodes, each with an RDMA device that moved into its network. In a guest: tests/vm.

Each node has two cards (fabric.py). Both tenants have their devices from the first test to the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import crossings
import pytest
from conftest import plain
from crossings import Tenant
from crossingtable import expected
from enclos.runtime.cluster.cluster import Cluster
from shells import Shells
from vm.verbs import IMAGE

pytestmark = pytest.mark.vm_exclusive

OPTIONS = (f"--container-image={IMAGE}", "--container-network=job", "--container-rdma=1")


@pytest.fixture(scope="module")
def tenants(exclusive: Cluster) -> Iterator[tuple[Tenant, Tenant]]:
    """usera has the first card of each node, and is root in his container; userb has the second."""
    (exclusive.layout.shared / "meet").mkdir()
    asked = {"usera": ("--container-remap-root",), "userb": ()}
    made = [Shells(exclusive, user, ("n1", "n2"), *OPTIONS, crossings.MOUNT, *more) for user, more in asked.items()]
    one, two = (dict.fromkeys(("n1", "n2"), shells) for shells in made)
    yield Tenant("usera", one), Tenant("userb", two)
    for shells in made:
        shells.end()
    exclusive.await_idle(60)


def test_each_has_its_own_and_the_same_addresses(tenants: tuple[Tenant, Tenant]) -> None:
    assert [tenant.device for tenant in tenants] == [{"n1": "rx0", "n2": "rx2"}, {"n1": "rx1", "n2": "rx3"}]
    assert [tenant.address for tenant in tenants] == [{"n1": "10.78.0.1", "n2": "10.78.0.2"}] * 2
    for tenant in tenants:
        for node, device in tenant.device.items():
            assert tenant.ok(node, "ls /sys/class/infiniband") == f"{device}\n"


@pytest.mark.parametrize(
    ("server", "client", "said"),
    [
        ("ibv_rc_pingpong -e -g 1 -n 50", "ibv_rc_pingpong -e -g 1 -n 50 n2", r"50 iters"),
        ("ib_write_bw -x 1 -n 50 -s 4096", "ib_write_bw -x 1 -n 50 -s 4096 n2", r"(?m)^\s*4096\s+50\s"),
        ("rping -s -a 10.78.0.2 -C 3", "rping -c -a 10.78.0.2 -C 3 -v", r"(?s)(ping data: rdma-ping-.*){3}"),
    ],
    ids=["latency", "bandwidth", "connections"],
)
def test_verbs_work_inside_both_at_the_same_time(
    tenants: tuple[Tenant, Tenant], server: str, client: str, said: str
) -> None:
    """Pingpong sleeps until something comes: four that poll leave two processors no time for Soft-RoCE itself."""
    for tenant in tenants:
        tenant.tell("n2", f"timeout 60 {server}")
        tenant.tell("n1", f"for i in 1 2 3 4 5 6; do timeout 60 {client} && exit 0; sleep 1; done; exit 1")
    found = [[tenant.hear(node) for node in ("n1", "n2")] for tenant in tenants]
    for ends in found:
        assert [end.status for end in ends] == [0, 0], found
        assert re.search(said, ends[0].text), found


def test_nothing_crosses_from_tenant_to_tenant(exclusive: Cluster, tenants: tuple[Tenant, Tenant]) -> None:
    """The list of attempts: another's device, node, address index, connection and packets; changes."""
    one, two = tenants
    assert crossings.succeeded(exclusive, one, two) == expected("exclusive")
    # Nor does anybody else outside, root included, open what is with one of them.
    for user in ("userb", "root"):
        outside = exclusive.run(f"exec 3<> /dev/infiniband/{one.node['n1']}", user, "n1")
        assert "Operation not permitted" in outside.stderr


def test_a_device_that_another_job_has(exclusive: Cluster, tenants: tuple[Tenant, Tenant]) -> None:
    one = tenants[0]
    jobs = [tenant.shells["n1"].job for tenant in tenants]

    def srun(user: str, *words: str) -> list[str]:
        place = ["srun", "-N1", "-n1", "-w", "n1", "-c1", f"--container-image={IMAGE}"]
        done = exclusive.run([*place, *words], user, timeout=120)
        return [*done.stdout.splitlines(), *(plain(line) for line in done.stderr.splitlines() if "enclos: " in line)]

    taken = f"enclos: --container-rdma=rx0: RDMA device rx0 is in use (job {jobs[0]} has it) on n1"
    for network in ("job", "host"):
        assert srun("userb", f"--container-network={network}", "--container-rdma=rx0", "true")[0] == taken
    busy = f"rx0: job {jobs[0]} has it; rx1: job {jobs[1]} has it"
    assert srun("userb", "--container-network=job", "--container-rdma=2", "true")[0] == (
        f"enclos: --container-rdma=2: too few RDMA devices are active and for containers (0) ({busy}) on n1"
    )
    # Another step of the same job shares it, and it stays until the last one ends.
    words = (f"--jobid={jobs[0]}", "--overlap", *OPTIONS[1:], "ls", "/sys/class/infiniband")
    assert srun("usera", *words) == ["rx0"]
    assert one.ok("n1", "ls /sys/class/infiniband") == "rx0\n"
