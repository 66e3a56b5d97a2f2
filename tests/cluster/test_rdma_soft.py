"""rdma.mode soft, where each job network has a Soft-RoCE device over its overlay, and shared. In a guest: tests/vm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import crossings
import mpistacks
import pytest
from boxes import USERA
from conftest import PATIENCE, Result, plain
from crossings import Tenant
from crossingtable import expected
from enclos.runtime.cluster.cluster import Cluster
from fabric import on
from shells import Shells
from vm import verbs
from vm.cards import command
from vm.verbs import IMAGE

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
    verbs.install(made.layout.images)
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


def srun(cluster: Cluster, *words: str) -> Result:
    return cluster.run(["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, *words], "usera", timeout=120)


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
    deadline = time.monotonic() + 20 * PATIENCE
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


@pytest.mark.vm_new
def test_verbs_over_the_overlay(cluster: Cluster) -> None:
    """Latency, bandwidth and connections between the two nodes of a job."""
    with Shells(cluster, "usera", cluster.nodes, *OPTIONS) as shells:
        tenant = Tenant("usera", dict.fromkeys(cluster.nodes, shells))
        which = {node: f"-d {tenant.device[node]} -{{}} {tenant.index[node]}" for node in cluster.nodes}
        for program, index, said in (
            ("ibv_rc_pingpong -e -n 20", "g", "20 iters"),
            ("ib_write_bw -n 20 -s 1024", "x", "1024"),
        ):
            ends = {node: f"timeout 60 {program} {words.format(index)}" for node, words in which.items()}
            meet(shells, ends["n2"], f"{ends['n1']} 10.77.0.2", said)
        meet(shells, "timeout 60 rping -s -a 10.77.0.2 -C 3", "timeout 60 rping -c -a 10.77.0.2 -C 3 -v", "rdma-ping-2")


def meet(shells: Shells, server: str, client: str, said: str) -> None:
    """A server on n2, and a client on n1 as soon as it listens."""
    shells.tell("n2", server)
    found = shells.run("n1", f"for i in 1 2 3 4 5 6; do {client} && exit 0; sleep 1; done; exit 1")
    other = shells.hear("n2")
    assert (found.status, other.status) == (0, 0) and said in found.text, (found, other)


@pytest.fixture
def meeting(cluster: Cluster) -> None:
    """Where tenants meet who help each other; only root makes anything there."""
    (cluster.layout.shared / "meet").mkdir(exist_ok=True)


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
def test_mpi_programs_send_over_rdma(cluster: Cluster) -> None:
    """Across two nodes, beside another job's devices: what each library says, and what the devices have sent."""
    other, job = allocate(cluster, "userb"), allocate(cluster, "usera")
    assert cluster.run(["srun", f"--jobid={other}", *OPTIONS, "true"], "userb").returncode == 0
    devices = [f"enclos{job}n{node}" for node in range(2)]
    before = [0, 0]
    for name, stack in mpistacks.STACKS.items():
        words = [f"--container-image={mpistacks.IMAGE}", "--container-network=job", f"--mpi={stack.launcher}"]
        done = cluster.run(["srun", f"--jobid={job}", *words, *stack.command()], "usera")
        shown = f"{name}: {done.stdout}{done.stderr}"
        assert done.returncode == 0 and mpistacks.is_right(done.stdout), shown
        assert stack.went_over(shown, devices), shown
        after = [sent(device) for device in devices]
        assert all(now - then > mpistacks.LEAST_BYTES for now, then in zip(after, before, strict=True)), shown
        before = after
    for user in ("usera", "userb"):
        cluster.run(["scancel", f"--user={user}"])
    cluster.await_idle(60)


@pytest.mark.vm_new
def test_what_is_set_for_ucx(cluster: Cluster) -> None:
    """Without the first UCX loses all datagrams of such a device; a UCX without InfiniBand would print that it does not
    know it. Who sets them himself has the last word.
    """
    script = "echo ${UCX_UD_VERBS_ETH_DGID_CHECK-unset} ${UCX_WARN_UNUSED_ENV_VARS-unset}"
    assert srun(cluster, "sh", "-c", script).stdout == "n n\n"
    assert srun(cluster, "--container-rdma=none", "sh", "-c", script).stdout == "unset unset\n"
    own = ["env", "UCX_UD_VERBS_ETH_DGID_CHECK=y", "UCX_WARN_UNUSED_ENV_VARS=y"]
    assert cluster.run([*own, "srun", "-N1", "-w", "n1", *OPTIONS, "sh", "-c", script], "usera").stdout == "y y\n"


@pytest.mark.vm_new
def test_what_crosses_between_soft_devices(cluster: Cluster, meeting: None) -> None:
    """The list of attempts of crossings.py: what the kernel's shared mode shows is seen, and nothing crosses."""
    words = (*OPTIONS, crossings.MOUNT)
    root = (*words, "--container-remap-root")
    with Shells(cluster, "usera", cluster.nodes, *root) as one, Shells(cluster, "userb", cluster.nodes, *words) as two:
        attacker = Tenant("usera", dict.fromkeys(cluster.nodes, one))
        victim = Tenant("userb", dict.fromkeys(cluster.nodes, two))
        assert victim.device == {node: f"enclos{two.job}n{place}" for place, node in enumerate(cluster.nodes)}
        assert crossings.succeeded(cluster, attacker, victim) == expected("soft")
        # Outside of containers a node is its user's, because whoever opens it uses its address indexes from anywhere.
        for user, opens in (("usera", False), ("userb", True), ("root", True)):
            tried = cluster.run(f"exec 3<> /dev/infiniband/{victim.node['n1']}", user, node="n1")
            assert (tried.returncode == 0) == opens, (user, tried.stderr)


@pytest.mark.vm_new
def test_check_says_what_soft_needs(cluster: Cluster) -> None:
    shown = cluster.run(["enclos", "check", "--json"], node="n1", timeout=120).stdout
    rows = [row for row in json.loads(shown)["findings"] if row["subject"] == "RDMA"]
    assert [row["status"] for row in rows] == ["ok"], rows


# ---------------------------------------------------------------- udev


UDEVD = "/lib/systemd/systemd-udevd"
RULE = Path(__file__).resolve().parents[2] / "conf/60-enclos.rules"
# What a site may have: nodes for a group, and names that stay, but not for jobs' devices (admin guide).
SITE_RULES = {
    "70-site.rules": 'KERNEL=="uverbs*", GROUP="rdma", MODE="0660"',
    "60-rdma-persistent-naming.rules": (
        'ACTION=="add", SUBSYSTEM=="infiniband", KERNEL!="enclos*", PROGRAM="rdma_rename %k NAME_GUID"'
    ),
}


@pytest.fixture
def udev() -> Iterator[None]:
    """A real udevd, with our rule where the admin guide puts it, and a device that is none of ours."""
    if "rdma" not in os.environ.get("ENCLOS_REQUIRE", ""):
        pytest.skip("starts a udevd: in a guest only")
    folder = Path("/etc/udev/rules.d")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(RULE, folder)
    for name, text in SITE_RULES.items():
        (folder / name).write_text(f"{text}\n")
    with subprocess.Popen([UDEVD]) as udevd:
        try:
            # It answers when it has made its socket.
            deadline = time.monotonic() + 10 * PATIENCE
            while subprocess.run(["udevadm", "control", "--ping"], stderr=subprocess.PIPE, check=False).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            command("ip", "link", "add", "vsite", "type", "veth", "peer", "name", "wsite")
            command("ip", "link", "set", "vsite", "up")
            command("rdma", "link", "add", "site0", "type", "rxe", "netdev", "vsite")
            yield
            command("ip", "link", "delete", "vsite")
        finally:
            # It waits for its workers, which may wait for something themselves.
            udevd.terminate()
            with suppress(subprocess.TimeoutExpired):
                udevd.wait(30)
            udevd.kill()
    shutil.rmtree(folder)


@pytest.mark.vm_new
def test_udev_leaves_a_jobs_device_to_its_user(cluster: Cluster, udev: None) -> None:
    """Name, owner and mode; a site's later rule is about others, and works for those."""
    with Shells(cluster, "usera", ["n1"], *OPTIONS) as shells:
        node = shells.ok("n1", "basename /dev/infiniband/uverbs*").strip()
        command("udevadm", "settle", "--timeout=60")
        owner, mode = command("stat", "-c", "%u %a", f"/dev/infiniband/{node}").split()
        assert (owner, mode) == (str(USERA), "600")
        ibdevs = Path("/sys/class/infiniband_verbs").glob("uverbs*/ibdev")
        names = {path.parent.name: path.read_text().strip() for path in ibdevs}
        assert names.pop(node) == f"enclos{shells.job}n0"
        ((other, name),) = names.items()
        assert name.startswith("rocex")
        assert command("stat", "-c", "%G %a", f"/dev/infiniband/{other}").split() == ["rdma", "660"]


# ---------------------------------------------------------------- rdma.mode shared


# Device, node, address of its interface: two on each node, for one tenant each, all on one fabric.
SHARED = (("sh0", "n1", 1), ("sh1", "n1", 3), ("sh2", "n2", 2), ("sh3", "n2", 4))


@pytest.fixture
def shared_devices(cluster: Cluster) -> Iterator[None]:
    """Soft-RoCE in the nodes' namespaces, as hardware is, and agents that give it to containers."""
    command("ip", "link", "add", "fabric", "type", "bridge")
    command("ip", "link", "set", "fabric", "up")
    for name, node, number in SHARED:
        pid = str(cluster.node_pid(node))
        command("ip", "link", "add", f"p{name}", "type", "veth", "peer", "name", f"v{name}", "netns", pid)
        command("ip", "link", "set", "dev", f"p{name}", "master", "fabric", "up")
        on(cluster, node, f"ip link set v{name} up && ip address add 10.79.0.{number}/24 dev v{name}")
        on(cluster, node, f"rdma link add {name} type rxe netdev v{name}")
    for node in cluster.nodes:
        listed = [name for name, place, _ in SHARED if place == node]
        text = f"rdma:\n  mode: shared\n  devices: {json.dumps(listed)}\n"
        (cluster.layout.node_etc(node) / "enclos.yaml").write_text(text)
        cluster.stop_agent(node)
    cluster.mend()
    yield
    for name, node, _ in SHARED:
        on(cluster, node, f"rdma link delete {name}; ip link delete v{name}")
    command("ip", "link", "delete", "fabric")


@pytest.mark.vm_new
def test_what_crosses_in_shared_mode(cluster: Cluster, meeting: None, shared_devices: None) -> None:
    """The same list, and the honest result: a container has its own device's node alone, and that is all.

    The last test on this cluster: its agents keep this mode, because in a guest they take ten seconds to start.
    """
    with ExitStack() as ends:
        tenants: dict[str, dict[str, Shells]] = {}
        for name, node, number in SHARED:
            user = "usera" if number < 3 else "userb"
            words = (*OPTIONS, crossings.MOUNT, f"--container-rdma={name}")
            made = Shells(cluster, user, [node], *words, *(["--container-remap-root"] if user == "usera" else []))
            tenants.setdefault(user, {})[node] = ends.enter_context(made)
        attacker, victim = (Tenant(user, shells) for user, shells in tenants.items())
        assert victim.device == {"n1": "sh1", "n2": "sh3"}
        assert crossings.succeeded(cluster, attacker, victim) == expected("shared")
