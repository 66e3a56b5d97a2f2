"""RDMA devices that move into networks of jobs and back, whatever happens meanwhile. In a guest: tests/vm.

Each node has two cards (fabric.py). What is asserted is what programs inside see, and what the kernel shows outside.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator

import mpistacks
import pytest
from conftest import PATIENCE, Result, plain, said
from enclos.runtime import environment
from enclos.runtime.cluster.cluster import Cluster, Running
from fabric import on
from vm import cards
from vm.cards import command
from vm.verbs import IMAGE

pytestmark = pytest.mark.vm_exclusive

IFF_UP = 1
GUIDS = {f"rx{number}": f"5054:00ff:fe00:{2 * number:04x}" for number in range(4)}


@pytest.fixture(scope="module")
def cluster(exclusive: Cluster) -> Cluster:
    assert_home(exclusive)
    mpistacks.make_image(exclusive.layout.images)
    return exclusive


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """Each test ends with both cards on each node, and no record of any."""
    yield
    cluster.run("scancel --user=usera; scancel --user=userb")
    cluster.await_idle(60)
    assert_home(cluster)


def devices(cluster: Cluster, node: str) -> set[str]:
    """As the node's own /sys has them, which is the kernel's list for its namespace; no program has to be started."""
    return {path.name for path in cluster.path_on(node, "/sys/class/infiniband").iterdir()}


def records(cluster: Cluster, node: str) -> list[str]:
    return [path.name for path in cluster.path_on(node, "/run/enclos/journal").glob("rdma*")]


def interfaces(cluster: Cluster, node: str) -> dict[str, bool]:
    """Those of cards, and whether they are up."""
    found = cluster.path_on(node, "/sys/class/net").glob("vf*")
    return {path.name: bool(int((path / "flags").read_text(), 16) & IFF_UP) for path in found}


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
        time.sleep(0.1)


OPTIONS = (f"--container-image={IMAGE}", "--container-network=job")


def srun(cluster: Cluster, *words: str, env: dict[str, str] | None = None) -> Result:
    return cluster.run(["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, *words], "usera", timeout=120, env=env)


def refused(done: Result) -> str:
    assert done.returncode != 0, done.stdout
    return next(plain(line) for line in done.stderr.splitlines() if "enclos: " in line)


SHOW = "ls /dev/infiniband; ls /sys/class/infiniband; ls /sys/class/net; ibv_devinfo | grep -e hca_id -e state"


def test_a_device_is_in_the_network_of_its_job_alone(cluster: Cluster) -> None:
    address = "ip -o -4 addr show dev vf0 | cut -d' ' -f7"
    script = f"{SHOW}; {address}; echo $UCX_NET_DEVICES $NCCL_SOCKET_IFNAME"
    kept = {"UCX_NET_DEVICES": "rx0:1", "NCCL_SOCKET_IFNAME": "vf0"}
    shown = srun(cluster, "--container-rdma=1", "sh", "-c", script, env=kept)
    assert (shown.returncode, said(shown.stderr)) == (0, [])
    assert re.sub(r"\s+", " ", shown.stdout).strip() == (
        "rdma_cm uverbs0 rx0 enclos0 lo vf0 hca_id: rx0 state: PORT_ACTIVE (4) 10.78.0.1/19 rx0:1 vf0"
    )
    without = srun(cluster, "sh", "-c", "ls /dev/infiniband 2> /dev/null; ls /sys/class/infiniband; ls /sys/class/net")
    assert without.stdout.split() == ["enclos0", "lo"]


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


def test_a_device_that_a_step_on_the_host_has(cluster: Cluster) -> None:
    words = ["srun", "-N1", "-w", "n1", "-c1", f"--container-image={IMAGE}", "--container-rdma=rx0", "sh", "-c"]
    holder = cluster.popen([*words, "echo up; exec sleep 300"], "userb")
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


def hold(cluster: Cluster, user: str, device: str, script: str) -> Running:
    """A step that has a device as long as it runs; returns when it runs."""
    words = ["srun", "-N1", "-w", "n1", "-c1", *OPTIONS, f"--container-rdma={device}", "sh", "-c"]
    holder = cluster.popen([*words, f"echo up; exec {script}"], user)
    assert holder.stdout is not None and holder.stdout.readline() == "up\n"
    return holder


def test_a_killed_agent_finds_what_it_moved(cluster: Cluster) -> None:
    """The step goes on with its device; the next agent knows whose it is, and brings it back at the step's end."""
    holder = hold(cluster, "usera", "1", "sleep 300")
    cluster.restart_agent("n1", signal.SIGKILL)
    assert devices(cluster, "n1") == {"rx1"} and len(records(cluster, "n1")) == 1
    (row,) = json.loads(on(cluster, "n1", "enclos ps --json"))
    assert row["devices"] == ["rdma=rx0"]
    holder.terminate()
    assert_home(cluster)


def test_after_sigkill_of_everything(cluster: Cluster) -> None:
    """Agent, slurmstepds and tasks of two jobs: the next agent knows the devices by their GUIDs, wherever they are.

    The namespace of rx0 has died, and the kernel has taken the device back. That of rx1 is held open by a user outside
    of the job, and does not die.
    """
    holders = [hold(cluster, "usera", "rx0", "sleep 307"), hold(cluster, "userb", "rx1", "sleep 309")]
    script = "exec 3< /proc/$(pgrep -f '[s]leep 309' | tail -n 1)/ns/net; echo up; exec sleep 300"
    keeper = cluster.popen(script, "userb", "n1")
    assert keeper.stdout is not None and keeper.stdout.readline() == "up\n"
    cluster.stop_agent("n1", signal.SIGKILL)
    on(cluster, "n1", "kill -9 $(pgrep -f 'slurmstepd: \\['); kill -9 $(pgrep -f '[s]leep 30[79]')")
    for holder in holders:
        holder.terminate()
        holder.wait(timeout=60)
    deadline = time.monotonic() + 60 * PATIENCE
    while "rx0" not in command("rdma", "dev"):
        assert time.monotonic() < deadline, "the kernel did not take it back"
        time.sleep(0.1)
    assert devices(cluster, "n1") == set() and len(records(cluster, "n1")) == 2
    # The kernel's initial namespace, which is the agent's on a real node: here the test carries it over.
    command("ip", "link", "set", "vf0", "down")
    command("ip", "link", "set", "vf0", "name", "lost0")
    cards.give(0, cluster.node_pid("n1"), "lost0")
    cluster.start_agent("n1")
    assert_home(cluster)
    keeper.kill()
    told = on(cluster, "n1", "tail -n 2 /run/hook.log").splitlines()
    assert [line.partition(" ")[0] for line in told] == ["detach", "detach"]


def test_rdma_limits_hold_in_a_job_network(cluster: Cluster) -> None:
    """rdma.max of the step: a handle, and as few objects as no program can do with."""
    options = ("--container-rdma=rx0", "--container-limit=rdma=rx0:hca_handle=1:hca_object=2")
    shown = srun(cluster, *options, "sh", "-c", "cat /sys/fs/cgroup/rdma.max; timeout 20 ibv_rc_pingpong -g 1")
    assert "rx0 hca_handle=1 hca_object=2" in shown.stdout
    assert shown.returncode != 0 and re.search("Couldn't (create|register|allocate)", shown.stderr)
    assert "--container-limit=rdma=rx0:hca_object=2: the step reached this limit (objects of the device" in shown.stderr
    enough = "--container-limit=rdma=rx0:hca_handle=1:hca_object=20"
    ran = srun(cluster, "--container-rdma=rx0", enough, "sh", "-c", "timeout 5 ibv_rc_pingpong -g 1; echo $?")
    # It waits for its peer until it is ended; busybox says so in its own way.
    assert ran.stdout.split()[-1] in ("124", "143"), (ran.stdout, ran.stderr)


def test_check_says_the_mode_and_the_devices(cluster: Cluster) -> None:
    lines = cluster.run(["enclos", "check"], node="n1", timeout=120).stdout.splitlines()
    assert "ok      RDMA: mode exclusive; for containers: rx0 (active), rx1 (active)" in lines


def test_a_mode_that_needs_shared_devices_is_refused(cluster: Cluster) -> None:
    """Soft-RoCE would be made in the node's namespace here: an error of srun, not a container without isolation."""
    path = cluster.layout.node_etc("n1") / "enclos.yaml"
    before = path.read_text()
    path.write_text(before.replace("rdma:\n", "rdma:\n  mode: soft\n"))
    cluster.restart_agent("n1")
    try:
        done = srun(cluster, "--container-rdma=1", "echo", "ran")
        lines = cluster.run(["enclos", "check"], node="n1", timeout=120).stdout.splitlines()
    finally:
        path.write_text(before)
        cluster.restart_agent("n1")
    words = "rdma.mode soft needs namespace mode shared, found exclusive"
    assert (refused(done), done.stdout) == (f"enclos: --container-rdma=1: {words} on n1", "")
    place = next(index for index, line in enumerate(lines) if line.startswith(f"mend    RDMA: {words}"))
    assert "set rdma.mode to exclusive, or boot with ib_core netns_mode=1" in " ".join(lines[place : place + 3])
