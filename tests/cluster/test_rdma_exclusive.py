"""RDMA devices that move into networks of jobs: two tenants on the same two nodes. In a guest: tests/vm.

Each node has two cards (fabric.py). What is asserted is what programs inside see, and what `rdma` and `ip` say outside.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator

import fabric
import mpistacks
import pytest
from conftest import Result, plain, said
from enclos.runtime import environment
from enclos.runtime.cluster.cluster import Cluster, Running
from fabric import IMAGE, on
from vm import cards
from vm.cards import command

pytestmark = pytest.mark.vm_exclusive

CONFIG = """\
rdma:
  devices: ["rx*"]
  hook: /etc/enclos/hook
images:
  idle_seconds: 0
"""
GUIDS = {f"rx{number}": f"5054:00ff:fe00:{2 * number:04x}" for number in range(4)}


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes with two cards each."""
    cards.require()
    made = make_cluster(2, config=CONFIG, cpus=4)
    fabric.plug_into(made)
    fabric.make_image(made.layout.images)
    mpistacks.make_image(made.layout.images)
    return made


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """Each test begins and ends with both cards on each node, and no record of any."""
    assert_home(cluster)
    yield
    for user in ("usera", "userb"):
        cluster.run(["scancel", f"--user={user}"])
    cluster.await_idle(60)
    assert_home(cluster)


def devices(cluster: Cluster, node: str) -> set[str]:
    return {row["ifname"] for row in json.loads(on(cluster, node, "rdma -j dev"))}


def records(cluster: Cluster, node: str) -> list[str]:
    return on(cluster, node, "cd /run/enclos/journal; ls | grep ^rdma || true").split()


def interfaces(cluster: Cluster, node: str) -> dict[str, bool]:
    rows = json.loads(on(cluster, node, "ip -j link"))
    return {row["ifname"]: "UP" in row["flags"] for row in rows if row["ifname"].startswith("vf")}


def is_home(cluster: Cluster) -> bool:
    return all(
        devices(cluster, node) == {f"rx{2 * place}", f"rx{2 * place + 1}"}
        and interfaces(cluster, node) == {f"vf{2 * place}": True, f"vf{2 * place + 1}": True}
        and records(cluster, node) == []
        for place, node in enumerate(cluster.nodes)
    )


def assert_home(cluster: Cluster, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not is_home(cluster):
        if time.monotonic() > deadline:
            said = {
                node: (devices(cluster, node), interfaces(cluster, node), records(cluster, node))
                for node in cluster.nodes
            }
            pytest.fail(f"not as it was: {said}\n{cluster.agent_log('n1')[-3000:]}")
        time.sleep(0.3)


OPTIONS = (f"--container-image={IMAGE}", "--container-network=job")


def srun(cluster: Cluster, *words: str, user: str = "usera", nodes: str = "n1") -> Result:
    count = len(nodes.split(","))
    return cluster.run(["srun", f"-N{count}", "-w", nodes, "--overlap", "-c1", *OPTIONS, *words], user, timeout=120)


def refused(done: Result) -> str:
    assert done.returncode != 0, done.stdout
    return next(plain(line) for line in done.stderr.splitlines() if "enclos: " in line)


class Tenant:
    """A job of a user on both nodes, as long as it is wanted."""

    def __init__(self, cluster: Cluster, user: str) -> None:
        self.cluster, self.user = cluster, user
        words = ["salloc", "-N2", "-n2", "-c1", "--no-shell", "-J", f"tenant-{user}"]
        said = cluster.run(words, user, timeout=60)
        found = re.search(r"Granted job allocation (\d+)", said.stderr)
        assert found, said.stderr
        self.job = found[1]

    def words(self, node: str, *words: str) -> list[str]:
        place = ["srun", f"--jobid={self.job}", "-N1", "-n1", "-w", node, "--overlap", *OPTIONS]
        return [*place, "--container-rdma=1", *words]

    def run(self, node: str, script: str) -> Result:
        return self.cluster.run(self.words(node, "sh", "-c", script), self.user, timeout=120)

    def start(self, node: str, script: str) -> Running:
        return self.cluster.popen(self.words(node, "sh", "-c", script), self.user)

    def ok(self, node: str, script: str) -> str:
        done = self.run(node, script)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def pair(self, server: str, client: str) -> tuple[str, str]:
        """Run a server on n2, a client on n1 as soon as it listens (port 18515 by default), in one step each."""
        running = self.start("n2", f"echo up; exec timeout 60 {server}")
        assert running.stdout is not None
        with running:
            assert running.stdout.readline() == "up\n", running.stderr.read() if running.stderr else ""
            again = f"for i in 1 2 3 4 5 6; do timeout 60 {client} && exit 0; sleep 1; done; exit 1"
            done = self.run("n1", again)
            if done.returncode:
                running.terminate()
            out, err = running.communicate(timeout=90)
            assert (done.returncode, running.returncode) == (0, 0), (done.stdout, done.stderr, out, err)
        return out, done.stdout


@pytest.fixture
def tenants(cluster: Cluster) -> Iterator[tuple[Tenant, Tenant]]:
    """Two users' jobs on the same two nodes."""
    pair = Tenant(cluster, "usera"), Tenant(cluster, "userb")
    yield pair
    for tenant in pair:
        cluster.run(["scancel", tenant.job], tenant.user)
    cluster.await_idle(60)


SHOW = "ls /dev/infiniband; ls /sys/class/infiniband; ls /sys/class/net; ibv_devinfo | grep -e hca_id -e state"


def test_a_device_is_in_the_network_of_its_job_alone(cluster: Cluster) -> None:
    shown = srun(cluster, "--container-rdma=1", "sh", "-c", f"{SHOW}; ip -o -4 addr show dev vf0 | cut -d' ' -f7")
    assert shown.returncode == 0, shown.stderr
    assert re.sub(r"\s+", " ", shown.stdout).strip() == (
        "rdma_cm uverbs0 rx0 enclos0 lo vf0 hca_id: rx0 state: PORT_ACTIVE (4) 10.78.0.1/19"
    )
    kept = {"UCX_NET_DEVICES": "rx0:1", "NCCL_SOCKET_IFNAME": "vf0"}
    words = ["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, "--container-rdma=rx0", "sh", "-c"]
    told = cluster.run([*words, "echo $UCX_NET_DEVICES $NCCL_SOCKET_IFNAME"], "usera", env=kept, timeout=120)
    assert (told.stdout, said(told.stderr)) == ("rx0:1 vf0\n", [])
    without = srun(cluster, "sh", "-c", "ls /dev/infiniband 2> /dev/null; ls /sys/class/infiniband; ls /sys/class/net")
    assert without.stdout.split() == ["enclos0", "lo"]
    assert_home(cluster)


def test_verbs_work_inside_each_tenant_at_the_same_time(tenants: tuple[Tenant, Tenant]) -> None:
    holders = [tenant.start(node, "echo up; sleep 300") for tenant in tenants for node in ("n1", "n2")]
    for holder in holders:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    seen: dict[str, set[str]] = {}
    for tenant in tenants:
        server, client = tenant.pair("ibv_rc_pingpong -g 1 -n 50", "ibv_rc_pingpong -g 1 -n 50 n2")
        assert "50 iters" in server and "50 iters" in client
        server, client = tenant.pair("ib_write_bw -x 1 -n 50 -s 4096", "ib_write_bw -x 1 -n 50 -s 4096 n2")
        assert re.search(r"^\s*4096\s+50\s", client, re.MULTILINE)
        server, client = tenant.pair("rping -s -a 10.78.0.2 -C 3", "rping -c -a 10.78.0.2 -C 3 -v")
        assert client.count("ping data: rdma-ping-") == 3
        for node in ("n1", "n2"):
            seen.setdefault(node, set()).add(tenant.ok(node, "ls /sys/class/infiniband").strip())
    # Each tenant had one device on each node, and never the other's.
    assert seen == {"n1": {"rx0", "rx1"}, "n2": {"rx2", "rx3"}}
    for holder in holders:
        holder.terminate()


def test_nothing_crosses_from_tenant_to_tenant(cluster: Cluster, tenants: tuple[Tenant, Tenant]) -> None:
    """The list of attempts: another's device, node, address index, connection and packets."""
    one, two = tenants
    holders = [one.start("n1", "echo up; sleep 300"), two.start("n1", "echo up; sleep 300")]
    for holder in holders:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    # Visibility: devices, their nodes, their addresses.
    for tenant, own, other in ((one, "rx0", "rx1"), (two, "rx1", "rx0")):
        said = tenant.ok("n1", f"ls /sys/class/infiniband; cat /sys/class/infiniband/*/ports/1/gids/[01]; {SHOW}")
        assert own in said and other not in said
        assert tenant.run("n1", f"ibv_devinfo -d {other}").returncode != 0
    # The other's device node: not in /dev, and the kernel refuses who makes or finds one elsewhere.
    for user in ("usera", "userb", "root"):
        for number in (0, 1):
            words = f"exec 3<> /dev/infiniband/uverbs{number}"
            outside = cluster.run(["bash", "-c", words], user, node="n1")
            assert "Operation not permitted" in outside.stderr
    # Packets and connections: the VLAN of the hook keeps them apart. Both have the same addresses.
    server = two.start("n2", "echo up; exec timeout 90 rping -s -a 10.78.0.2 -C 1")
    assert server.stdout is not None and server.stdout.readline() == "up\n"
    client = "timeout 10 rping -c -a 10.78.0.2 -C 1 -v"
    crossing = one.run("n1", f"{client}; {client}")
    assert crossing.returncode != 0 and "ping data" not in crossing.stdout
    # What fails from there works from here, at the same moment.
    reached = two.run("n1", f"for i in 1 2 3; do {client} && exit 0; done; exit 1")
    out, err = server.communicate(timeout=120)
    assert "ping data" in reached.stdout and server.returncode == 0, (reached.stderr, out, err)
    for holder in holders:
        holder.terminate()


COUNTED = """\
sent=/sys/class/infiniband/rx$((2 * SLURM_NODEID))/ports/1/hw_counters/sent_bytes
before=$(cat $sent)
"$@" || exit
echo "$SLURM_NODEID sent $(($(cat $sent) - before)) bytes"
"""


@pytest.mark.parametrize("name", ["openmpi-ucx", "openmpi-libfabric"])
def test_an_mpi_program_sends_over_its_devices(cluster: Cluster, name: str) -> None:
    """On both nodes the program has the first card; what the library says, and what the cards have sent."""
    stack = mpistacks.STACKS[name]
    place = ["srun", "-N2", "-n2", "-c1", f"--container-image={mpistacks.IMAGE}", "--container-network=job"]
    # What a job has to set for Soft-RoCE, which stands for hardware here.
    words = ["--container-rdma=1", f"--mpi={stack.launcher}", "env", environment.SOFT_ROCE, "sh", "-c", COUNTED, "sh"]
    done = cluster.run([*place, *words, *stack.command()], "usera")
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and mpistacks.is_right(done.stdout), shown
    assert stack.went_over(shown, ["rx0", "rx2"]), shown
    sent = re.findall(r"^[01] sent (\d+) bytes$", done.stdout, re.MULTILINE)
    assert len(sent) == 2 and all(int(count) > mpistacks.LEAST_BYTES for count in sent), shown


def test_a_device_that_another_job_has(cluster: Cluster, tenants: tuple[Tenant, Tenant]) -> None:
    one, two = tenants
    holder = one.start("n1", "echo up; sleep 300")
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    text = f"RDMA device rx0 is in use (job {one.job} has it) on n1"
    for network in ("job", "host"):
        words = ["srun", f"--jobid={two.job}", "-N1", "-n1", "-w", "n1", "--overlap", f"--container-image={IMAGE}"]
        words += [f"--container-network={network}", "--container-rdma=rx0", "true"]
        assert refused(cluster.run(words, "userb", timeout=60)) == f"enclos: --container-rdma=rx0: {text}"
    busy = f"rx0: job {one.job} has it"
    words = [
        "srun",
        f"--jobid={two.job}",
        "-N1",
        "-n1",
        "-w",
        "n1",
        "--overlap",
        *OPTIONS,
        "--container-rdma=2",
        "true",
    ]
    assert refused(cluster.run(words, "userb", timeout=60)) == (
        f"enclos: --container-rdma=2: too few RDMA devices are active and for containers (1) ({busy}) on n1"
    )
    # Another step of the same job shares it, and it stays until the last one ends.
    assert one.ok("n1", "ls /sys/class/infiniband") == "rx0\n"
    assert devices(cluster, "n1") == {"rx1"}
    holder.terminate()


def test_a_device_that_a_step_on_the_host_has(cluster: Cluster) -> None:
    words = ["srun", "-N1", "-w", "n1", "-c1", f"--container-image={IMAGE}", "--container-rdma=rx0", "sh", "-c"]
    holder = cluster.popen([*words, "echo up; sleep 300"], "userb")
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    said = refused(srun(cluster, "--container-rdma=rx0", "true"))
    assert re.fullmatch(
        r"enclos: .*: RDMA device rx0 is in use \(step \d+\.0 on the node's network has it\) on n1", said
    )
    done = srun(cluster, "--container-rdma=1", "ls", "/sys/class/infiniband")
    assert done.stdout == "rx1\n", done.stderr
    holder.terminate()


def test_a_device_that_carries_the_nodes_traffic(cluster: Cluster) -> None:
    on(cluster, "n1", "ip address add 192.0.2.1/24 dev vf0")
    try:
        said = refused(srun(cluster, "--container-rdma=rx0", "true"))
    finally:
        on(cluster, "n1", "ip address del 192.0.2.1/24 dev vf0")
    reason = "its interface vf0 has an address of the node"
    assert said == f"enclos: --container-rdma=rx0: RDMA device rx0 is in use ({reason}) on n1"


def test_what_a_failed_build_took_comes_back(cluster: Cluster) -> None:
    done = srun(cluster, "--container-rdma=2", "--container-mounts=/nowhere:/data", "true")
    assert refused(done).startswith("enclos: --container-mounts=/nowhere:/data: source path does not exist")
    assert_home(cluster)


def test_the_sites_hook_is_told_and_may_refuse(cluster: Cluster) -> None:
    on(cluster, "n1", "rm -f /run/hook.log; touch /etc/enclos/hook-fails")
    try:
        said = refused(srun(cluster, "--container-rdma=rx1", "true"))
        assert said == "enclos: rdma.hook: /etc/enclos/hook failed (the subnet manager does not answer) on n1"
    finally:
        on(cluster, "n1", "rm /etc/enclos/hook-fails")
    assert_home(cluster)
    done = srun(cluster, "--container-rdma=rx1", "sh", "-c", "echo $SLURM_JOB_ID")
    assert done.returncode == 0, done.stderr
    assert_home(cluster)
    told = on(cluster, "n1", "tail -n 2 /run/hook.log").splitlines()
    row = f"job{done.stdout.strip()} rx1 {GUIDS['rx1']} vf1"
    assert told == [f"attach {row}", f"detach {row}"]


def test_a_killed_agent_finds_what_it_moved(cluster: Cluster) -> None:
    """The step goes on with its device; the next agent knows whose it is, and brings it back at the step's end."""
    words = ["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, "--container-rdma=1"]
    holder = cluster.popen([*words, "sh", "-c", "echo up; sleep 300"], "usera")
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    cluster.restart_agent("n1", signal.SIGKILL)
    assert devices(cluster, "n1") == {"rx1"} and len(records(cluster, "n1")) == 1
    (row,) = json.loads(on(cluster, "n1", "enclos ps --json"))
    assert row["devices"] == ["rdma=rx0"]
    holder.terminate()
    assert_home(cluster)


def test_after_sigkill_of_everything(cluster: Cluster) -> None:
    """Agent, slurmstepd and tasks: the kernel takes the device back, and the next agent knows it by its GUID."""
    words = ["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, "--container-rdma=1"]
    holder = cluster.popen([*words, "sh", "-c", "echo up; exec sleep 307"], "usera")
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    cluster.stop_agent("n1", signal.SIGKILL)
    on(cluster, "n1", "kill -9 $(pgrep -f 'slurmstepd: \\['); kill -9 $(pgrep -f '[s]leep 307')")
    holder.terminate()
    holder.wait(timeout=60)
    deadline = time.monotonic() + 60
    while "rx0" not in command("rdma", "dev"):
        assert time.monotonic() < deadline, "the kernel did not take it back"
        time.sleep(0.3)
    assert len(records(cluster, "n1")) == 1
    # The kernel's initial namespace, which is the agent's on a real node: here the test carries it over.
    command("ip", "link", "set", "vf0", "down")
    command("ip", "link", "set", "vf0", "name", "lost0")
    cards.give(0, cluster.node_pid("n1"), "lost0")
    cluster.start_agent("n1")
    assert_home(cluster)
    assert on(cluster, "n1", "tail -n 1 /run/hook.log").startswith("detach ")


def test_a_device_in_a_namespace_that_somebody_holds(cluster: Cluster) -> None:
    """A user outside the job holds the namespace open: it does not die, and the next agent looks for it."""
    words = ["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, "--container-rdma=1"]
    holder = cluster.popen([*words, "sh", "-c", "echo up; exec sleep 309"], "usera")
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    script = "exec 3< /proc/$(pgrep -f '[s]leep 309' | tail -n 1)/ns/net; echo up; exec sleep 300"
    keeper = cluster.popen(script, "usera", "n1")
    assert keeper.stdout is not None and keeper.stdout.readline() == "up\n"
    cluster.stop_agent("n1", signal.SIGKILL)
    on(cluster, "n1", "kill -9 $(pgrep -f 'slurmstepd: \\['); kill -9 $(pgrep -f '[s]leep 309')")
    holder.terminate()
    holder.wait(timeout=60)
    assert devices(cluster, "n1") == {"rx1"}
    cluster.start_agent("n1")
    assert_home(cluster)
    keeper.kill()


def test_rdma_limits_hold_in_a_job_network(cluster: Cluster) -> None:
    """rdma.max of the step: a handle, and as few objects as no program can do with."""
    options = ("--container-rdma=rx0", "--container-limit=rdma=rx0:hca_handle=1:hca_object=2")
    shown = srun(cluster, *options, "sh", "-c", "cat /sys/fs/cgroup/rdma.max; timeout 20 ibv_rc_pingpong -g 1")
    assert "rx0 hca_handle=1 hca_object=2" in shown.stdout
    assert shown.returncode != 0 and re.search("Couldn't (create|register|allocate)", shown.stderr)
    enough = "--container-limit=rdma=rx0:hca_handle=1:hca_object=20"
    ran = srun(cluster, "--container-rdma=rx0", enough, "sh", "-c", "timeout 5 ibv_rc_pingpong -g 1; echo $?")
    # It waits for its peer until it is ended; busybox says so in its own way.
    assert ran.stdout.split()[-1] in ("124", "143"), (ran.stdout, ran.stderr)


def test_check_says_the_mode_and_the_devices(cluster: Cluster) -> None:
    lines = cluster.run(["enclos", "check"], node="n1", timeout=120).stdout.splitlines()
    assert "ok      RDMA: mode exclusive; for containers: rx0 (active), rx1 (active)" in lines
