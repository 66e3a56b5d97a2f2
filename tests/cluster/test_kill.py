"""SIGKILL to any process of the product or of Slurm, at any operation: what the user sees, and that nothing is left.

Where the agent itself dies and comes back is test_restart.py's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, Leftovers, said
from enclos.runtime import stepd
from enclos.runtime.cluster.cluster import Cluster, Running
from enclos.runtime.cluster.processes import Process
from faults import (
    CALLS,
    Point,
    child,
    delaying,
    kill,
    killing,
    points,
    processes,
    rehearsal_points,
    spare,
    stopping,
    zygote,
)

IMAGE = "--container-image=/images/openmpi.sqsh"
STEP = ["srun", "-w", "n1", IMAGE, "--container-network=job"]
SAY = [*STEP, "echo", "inside"]
BUILDER_KILLED = [
    "slurmstepd-n1: error: enclos: container: its builder ended (killed) on n1",
    "hint: run the step again; administrator: journalctl -u enclosd",
    "srun: error: n1: task 0: Exited with exit code 1",
]
ESCAPE = Path(__file__).with_name("escape.c")


Origin = Callable[[], Sequence[int]]


@pytest.fixture(scope="module")
def all_points(fragile: Cluster, origin: Origin) -> list[Point]:
    """Every system call that a builder makes for a step: more than a hundred places to be killed at."""
    # The first step of a user makes a namespace that the agent keeps.
    assert fragile.run(SAY, user="usera").returncode == 0
    fragile.await_idle()
    found = points(fragile, origin(), SAY)
    assert len(found) > 100
    return found


@pytest.fixture(scope="module")
def escape(fragile: Cluster) -> str:
    """Path on all machines of a program that tries to outlive its step; see escape.c."""
    binary = fragile.layout.shared / "escape"
    subprocess.run(["cc", "-static", "-pthread", "-O1", "-o", str(binary), str(ESCAPE)], check=True)
    return "/shared/escape"


def some(all_points: list[Point], *calls: str) -> list[Point]:
    """The last time of each call; of sendmsg the one before it, after which the builder waits for the first task."""
    last = {point.call: point for point in all_points}
    last["sendmsg"] = Point("sendmsg", last["sendmsg"].number - 1)
    return [last[call] for call in calls]


def start(cluster: Cluster, words: list[str]) -> Running:
    return cluster.popen(words, user="usera")


def end(running: Running, timeout: float = 40 * PATIENCE) -> tuple[int, str, list[str]]:
    """Exit status, output, and the lines that the user reads."""
    out, err = running.communicate(timeout=timeout)
    return running.returncode, out, said(err)


def await_output(running: Running, text: str) -> None:
    assert running.stdout is not None
    line = running.stdout.readline()
    assert line == f"{text}\n", (line, running.stderr.read() if running.stderr and not line else "")


@pytest.fixture
def sleeper(fragile: Cluster, clean: Leftovers) -> Iterator[Running]:
    """A step on the first node that has begun to sleep."""
    running = start(fragile, [*STEP, "sh", "-c", "echo asleep; sleep 300"])
    await_output(running, "asleep")
    yield running
    running.kill()
    running.communicate(timeout=20)


# ---------------------------------------------------------------------------------------------- the builder


@pytest.mark.parametrize("call", CALLS)
def test_a_builder_killed_once_is_replaced(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point], call: str
) -> None:
    here = [point for point in all_points if point.call == call]
    assert here
    for point in here:
        with stopping(origin(), point) as stopper:
            running = start(fragile, SAY)
            victim = stopper.stopped()
        kill(victim)
        assert end(running) == (0, "inside\n", []), point
    assert clean.rows() == []


@pytest.mark.parametrize("origin", ["fresh"], indirect=True)
@pytest.mark.parametrize("call", CALLS)
def test_a_builder_killed_twice_is_one_clear_error(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point], call: str
) -> None:
    for point in [point for point in all_points if point.call == call]:
        with killing(origin(), point):
            status, out, lines = end(start(fragile, SAY))
            assert (status, out, sorted(lines)) == (1, "", sorted(BUILDER_KILLED)), point
    assert clean.rows() == []


def test_a_builder_that_its_user_stops_is_ended_by_the_deadline(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point]
) -> None:
    """A user may stop his builder, though not look into it; the step gets another one."""
    point = next(point for point in all_points if point.call == "pivot_root")
    with stopping(origin(), point) as stopper:
        running = start(fragile, SAY)
        victim = stopper.stopped()
    while Path(f"/proc/{victim}/stat").read_text().split()[2] not in "Tt":
        time.sleep(0.001)  # Between being traced and standing still.
    assert end(running) == (0, "inside\n", [])
    assert not Path(f"/proc/{victim}").exists()
    assert clean.rows() == []


@pytest.mark.releases
def test_scancel_while_building_ends_everything(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point]
) -> None:
    for point in some(all_points, "fsmount", "pivot_root", "sendmsg"):
        with stopping(origin(), point) as stopper:
            running = start(fragile, [*SAY[:1], "-J", "doomed", *SAY[1:]])
            stopper.stopped()
        begin = time.monotonic()
        fragile.run(["scancel", "--name=doomed"], user="usera")
        status, out, lines = end(running)
        assert (status != 0, out) == (True, ""), lines
        assert clean.rows() == []
        assert time.monotonic() - begin < 5 * PATIENCE, "it waited for the deadline"


# ---------------------------------------------------------------------------------------------- the spare builder


def await_gone(pid: int, timeout: float = 5) -> None:
    deadline = time.monotonic() + timeout
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.002)


def test_the_spare_builder_makes_the_next_container(fragile: Cluster, clean: Leftovers) -> None:
    """And another one takes its place, also while the step runs on."""
    waiting = spare(fragile, "n1")
    with stopping([waiting, zygote(fragile, "n1")], Point("pivot_root", 1)) as stopper:
        running = start(fragile, [*STEP, "sh", "-c", "echo up; sleep 300"])
        assert stopper.stopped() == waiting
    assert processes(fragile, "n1", "enclos-build") == [waiting]
    os.kill(waiting, signal.SIGCONT)
    await_output(running, "up")
    await_gone(waiting)
    assert spare(fragile, "n1") != waiting
    fragile.run("scancel --user=usera")
    running.communicate(timeout=20)
    assert clean.rows() == []


def test_the_spare_builder_holds_nothing_of_a_step(fragile: Cluster, clean: Leftovers) -> None:
    """Ordered while a step runs, with an image and a network in use."""
    running = start(fragile, [*STEP, "sh", "-c", "echo up; sleep 300"])
    await_output(running, "up")
    kill(zygote(fragile, "n1"))
    waiting = spare(fragile, "n1")
    forker = parent(waiting)
    held = {entry.name: os.readlink(entry.path) for entry in os.scandir(f"/proc/{waiting}/fd")}
    channels = [target for name, target in held.items() if name not in ("0", "1", "2")]
    assert [target.partition(":")[0] for target in channels] == ["socket"]
    assert all(held[name] == os.readlink(f"/proc/{forker}/fd/{name}") for name in ("0", "1", "2"))
    status = Path(f"/proc/{waiting}/status").read_text()
    assert re.search(r"^Uid:\t0\t0\t0\t0$", status, re.MULTILINE)
    for kind in ("net", "mnt", "user", "ipc", "uts", "pid", "cgroup"):
        assert os.readlink(f"/proc/{waiting}/ns/{kind}") == os.readlink(f"/proc/{forker}/ns/{kind}")
    fragile.run("scancel --user=usera")
    running.communicate(timeout=20)
    assert clean.rows() == []


def test_a_spare_builder_killed_while_it_waits_is_not_missed(fragile: Cluster, clean: Leftovers) -> None:
    killed = spare(fragile, "n1")
    kill(killed)
    assert end(start(fragile, SAY)) == (0, "inside\n", [])
    assert spare(fragile, "n1") != killed
    assert clean.rows() == []


def test_a_spare_builder_killed_while_it_rehearses_is_not_missed(fragile: Cluster, clean: Leftovers) -> None:
    """At each system call up to where it waits. A step that is refused orders a new one and needs no builder."""
    refused = [*STEP, "true"]
    found = rehearsal_points(fragile, "n1", lambda: fragile.run(refused))
    assert len(found) > 20
    for point in found:
        kill(spare(fragile, "n1"))
        with killing([zygote(fragile, "n1")], point):
            assert fragile.run(refused).returncode == 1
            fragile.await_idle()
        assert end(start(fragile, SAY)) == (0, "inside\n", []), point
    assert clean.rows() == []


# ---------------------------------------------------------------------------------------------- the zygote


@pytest.mark.parametrize("part", range(6))
def test_a_zygote_killed_while_building_is_replaced(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point], part: int
) -> None:
    """Its builders die with it, those that stand still too; the step goes on with the next zygote's."""
    # A change of ids clears the death signal for the moment until it is set again, in which no user can stop it.
    found = [point for point in all_points if point.call not in ("setfsuid", "setresuid", "capset", "setgroups")]
    step = len(found) // 6
    point = found[part * step + step // 2]
    old = zygote(fragile, "n1")
    with stopping(origin(), point) as stopper:
        running = start(fragile, SAY)
        builder = stopper.stopped()
    begin = time.monotonic()
    kill(old)
    assert end(running) == (0, "inside\n", []), point
    assert time.monotonic() - begin < 4 * PATIENCE, "its builder lived on until the deadline"
    assert not Path(f"/proc/{builder}").exists()
    assert zygote(fragile, "n1") != old
    assert clean.rows() == []


def test_a_zygote_killed_while_idle_is_replaced(fragile: Cluster, clean: Leftovers) -> None:
    """With its spare builder; the next zygote brings another."""
    waiting = spare(fragile, "n1")
    kill(zygote(fragile, "n1"))
    await_gone(waiting)
    assert spare(fragile, "n1") != waiting
    assert end(start(fragile, SAY)) == (0, "inside\n", [])
    assert clean.rows() == []
    assert fragile.run(["enclos", "ps"], node="n1", user="usera").returncode == 0


def test_a_zygote_killed_while_a_step_runs_disturbs_nothing(
    fragile: Cluster, clean: Leftovers, sleeper: Running
) -> None:
    kill(zygote(fragile, "n1"))
    assert end(start(fragile, SAY)) == (0, "inside\n", [])
    (task,) = processes(fragile, "n1", "sleep")
    kill(task)
    sleeper.communicate(timeout=20)
    assert clean.rows() == []


# ---------------------------------------------------------------------------------------------- slurmstepd, tasks, srun


def slurmstepd(cluster: Cluster, node: str) -> int:
    """The one slurmstepd that runs on a node."""
    (pid,) = processes(cluster, node, "slurmstepd")
    return pid


def give_up(cluster: Cluster, running: Running) -> None:
    """Cancel and kill the user's command: where slurmstepd is dead, Slurm 22.05 does not tell srun."""
    cluster.run("scancel --user=usera")
    running.kill()
    running.communicate(timeout=20)


def await_none(cluster: Cluster, node: str, name: str, timeout: float = 10) -> None:
    """Wait until no process of that name is on the node."""
    deadline = time.monotonic() + timeout
    while left := processes(cluster, node, name):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.releases
def test_tasks_die_with_slurmstepd(fragile: Cluster, clean: Leftovers, sleeper: Running) -> None:
    kill(slurmstepd(fragile, "n1"))
    await_none(fragile, "n1", "sleep")
    give_up(fragile, sleeper)
    assert clean.rows() == []


@pytest.mark.releases
def test_slurmstepd_killed_while_building(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point]
) -> None:
    for point in some(all_points, "fsopen", "mount_setattr", "unshare", "sendmsg"):
        with stopping(origin(), point) as stopper:
            running = start(fragile, SAY)
            builder = stopper.stopped()
        for pid in processes(fragile, "n1", "slurmstepd"):
            kill(pid)
        give_up(fragile, running)
        assert clean.rows() == []
        assert not Path(f"/proc/{builder}").exists()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    "point", [Point("setns", 1), Point("getppid", 2), Point("setns", 2), Point("setns", 3)], ids=str
)
def test_a_task_whose_slurmstepd_dies_while_it_joins_does_not_run(
    fragile: Cluster, clean: Leftovers, point: Point
) -> None:
    """It stands before or in the middle of the container's namespaces: the agent's sweep may not see it there yet.

    Delayed and not stopped: who is stopped and loses his parent gets a SIGHUP from the kernel.
    """
    mark = fragile.layout.shared / "ran"
    mark.unlink(missing_ok=True)
    answered = fragile.agent_log("n1").count(" ready@")
    with delaying(fragile.slurmd_pid("n1"), point, seconds=1.0):
        running = start(fragile, [*STEP, "--container-mounts=/shared", "sh", "-c", "touch /shared/ran; sleep 300"])
        while fragile.agent_log("n1").count(" ready@") == answered:
            time.sleep(0.005)
        time.sleep(0.2)
        both = processes(fragile, "n1", "slurmstepd")
        (stepd,) = [pid for pid in both if parent(pid) not in both]
        assert len(both) == 2, "the task is not where it is looked for"
        kill(stepd)
        time.sleep(1.2)
    give_up(fragile, running)
    assert clean.rows() == []
    assert not mark.exists()


def test_a_killed_task_is_an_ordinary_end(fragile: Cluster, clean: Leftovers, sleeper: Running) -> None:
    (task,) = processes(fragile, "n1", "sleep")
    kill(task)
    status, _, _ = end(sleeper)
    assert status != 0
    assert clean.rows() == []


@pytest.mark.releases
def test_srun_killed_leaves_nothing(fragile: Cluster, clean: Leftovers, sleeper: Running) -> None:
    command = sleeper.command()
    assert command is not None
    command.kill()
    sleeper.communicate(timeout=20)
    fragile.run("scancel --user=usera")
    assert clean.rows(20) == []


def test_srun_killed_while_building_leaves_nothing(
    fragile: Cluster, clean: Leftovers, origin: Origin, all_points: list[Point]
) -> None:
    point = next(point for point in all_points if point.call == "pivot_root")
    with stopping(origin(), point) as stopper:
        running = start(fragile, SAY)
        stopper.stopped()
        command = running.command()
        assert command is not None
        command.kill()
    running.communicate(timeout=20)
    fragile.run("scancel --user=usera")
    assert clean.rows(20) == []


def test_a_killed_relay_ends_with_the_step(fragile: Cluster, clean: Leftovers) -> None:
    """MPI may fail without it, and may not hang beyond its end."""
    ring = ["srun", "-N2", "-n2", "--mpi=pmix", IMAGE, "--container-network=job", "/usr/bin/ring", "--seconds", "3"]
    running = start(fragile, [*ring])
    deadline = time.monotonic() + 10 * PATIENCE
    while not (relays := processes(fragile, "n1", "enclos-relay")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("rank")
    kill(relays[0])
    with suppress(subprocess.TimeoutExpired):
        running.communicate(timeout=8)
    fragile.run("scancel --user=usera")
    running.communicate(timeout=20)
    assert clean.rows(20) == []


def test_a_relay_killed_at_its_start_is_replaced(fragile: Cluster, clean: Leftovers) -> None:
    """Before it serves: without another one MPI_Init would wait for ever."""
    ring = ["srun", "-w", "n1", "-n2", "--mpi=pmix", IMAGE, "--container-network=job", "/usr/bin/ring", "--rounds", "1"]
    with stopping([zygote(fragile, "n1")], Point("setresuid", 1)) as stopper:
        running = start(fragile, ring)
        killed = 0
        while killed == 0:
            victim = stopper.stopped()
            if Path(f"/proc/{victim}/comm").read_text() == "enclos-relay\n":
                kill(victim)
                killed += 1
            else:
                os.kill(victim, signal.SIGCONT)
    for pid in (*processes(fragile, "n1", "enclos-build"), *processes(fragile, "n1", "enclos-relay")):
        with suppress(ProcessLookupError):  # One that was spared has ended meanwhile.
            os.kill(pid, signal.SIGCONT)
    status, out, lines = end(running)
    assert (status, lines) == (0, []), out
    assert "all data right" in out
    assert clean.rows() == []


# ---------------------------------------------------------------------------------------------- what wants to stay


@pytest.mark.parametrize("way", ["daemon", "nested", "thread", "chain", "storm"])
def test_nothing_outlives_its_step(fragile: Cluster, clean: Leftovers, escape: str, way: str) -> None:
    running = start(fragile, [*STEP, "--container-mounts=/shared", escape, way])
    status, out, lines = end(running)
    assert (status, out, lines) == (0, f"{way} is off\n", [])
    assert clean.rows() == []


@pytest.mark.parametrize("way", ["daemon", "nested", "thread", "chain", "storm"])
def test_nothing_outlives_its_killed_slurmstepd(fragile: Cluster, clean: Leftovers, escape: str, way: str) -> None:
    running = start(fragile, [*STEP, "--container-mounts=/shared", "sh", "-c", f"{escape} {way}; sleep 300"])
    await_output(running, f"{way} is off")
    kill(slurmstepd(fragile, "n1"))
    await_none(fragile, "n1", "escape")
    give_up(fragile, running)
    assert clean.rows() == []


def test_the_device_is_gone_at_once_whoever_holds_the_namespace(
    fragile: Cluster, clean: Leftovers, escape: str
) -> None:
    """A process of the user's outside the job has the namespace open, and a killed sender left data unsent."""
    running = start(fragile, [*STEP, "--container-mounts=/shared", escape, "unsent", "300"])
    await_output(running, "unsent is off")
    (task,) = processes(fragile, "n1", "escape")
    inside = _inside_pid(task)
    holder = fragile.popen(["bash", "-c", f"exec 7</proc/{inside}/ns/net; echo held; sleep 300"], "usera", "n1")
    await_output(holder, "held")
    (held,) = processes(fragile, "n1", "sleep")
    namespace = os.readlink(f"/proc/{held}/fd/7")
    assert namespace.startswith("net:") and namespace != fragile.namespaces("n1")["net"]
    assert _links(held) == ["lo", "enclos0"]
    kill(task)
    end(running)
    fragile.await_idle()
    assert _links(held) == ["lo"]
    again = end(start(fragile, SAY))
    holder.kill()
    holder.communicate(timeout=10)
    assert again == (0, "inside\n", [])
    assert clean.rows() == []


def _inside_pid(pid: int) -> int:
    """The pid on its node of a process, which is the only one that a user there can name."""
    row = re.search(r"^NSpid:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert row is not None
    return int(row[1].split()[-1])


def _links(pid: int) -> list[str]:
    """Names of the links in the namespace that a process holds as descriptor 7."""
    command = ["nsenter", f"--net=/proc/{pid}/fd/7", "ip", "-o", "link"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [row.split(":")[1].split("@")[0].strip() for row in shown.splitlines()]


LEAVING = f"""
    step() {{ srun --overlap -n1 -w n1 {IMAGE} --container-name=w "$@"; }}
    step --container-mounts=/shared sh -c 'touch /shared/in; until [ -e /shared/out ]; do sleep 0.05; done' &
    until [ -e /shared/next ]; do sleep 0.05; done
    step --container-mounts=/shared:/here ls -d /here
    wait"""


def test_a_container_that_is_being_left_is_not_entered(fragile: Cluster, clean: Leftovers) -> None:
    """A step's tasks are over, its slurmstepd is not: the next step starts the container with mounts of its own."""
    shared = fragile.layout.shared
    shared.chmod(0o1777)
    for name in ("in", "out", "next"):
        (shared / name).unlink(missing_ok=True)
    running = fragile.popen(["salloc", "-Q", "-w", "n1", "bash", "-c", LEAVING], "usera")
    await_true((shared / "in").exists)
    stopped = slurmstepd(fragile, "n1")
    os.kill(stopped, signal.SIGSTOP)
    try:
        (shared / "out").touch()
        await_true(lambda: not stepd.has_tasks(stopped))
        (shared / "next").touch()
        await_true(lambda: len(processes(fragile, "n1", "slurmstepd")) > 1)
        time.sleep(0.5)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert end(running) == (0, "/here\n", [])
    assert clean.rows(20) == []


def await_true(holds: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------- slurmd


@pytest.mark.releases
def test_slurmd_restarted_while_a_step_runs(fragile: Cluster, clean: Leftovers) -> None:
    running = start(fragile, [*STEP, "sh", "-c", "echo asleep; sleep 2; echo awake"])
    await_output(running, "asleep")
    kill(fragile.slurmd_pid("n1"))
    fragile.mend()
    status, out, lines = end(running)
    assert (status, out) == (0, "awake\n"), lines
    assert end(start(fragile, SAY)) == (0, "inside\n", [])
    assert clean.rows(20) == []


def test_the_helper_sees_a_child(fragile: Cluster) -> None:
    """What `child` finds is what the kernel says."""
    agent = Process.of_pid(fragile.agent_pid("n1"))
    assert agent is not None
    assert zygote(fragile, "n1") == child(agent.pid, "enclos-zygote")
    assert spare(fragile, "n1") == child(zygote(fragile, "n1"), "enclos-spare")
    with pytest.raises(TimeoutError):
        child(agent.pid, "no-such-name", timeout=0.05)
