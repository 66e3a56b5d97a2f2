"""The agent is killed and started again: running steps go on, and what ended meanwhile is cleaned up behind them.

Also what a starting agent meets: another agent, damaged records, a full /run, a slurmctld that does not answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import PATIENCE, Leftovers, plain, said
from enclos.runtime.cluster.cluster import Cluster, Running
from faults import Point, kill, points, processes, spare, stopping

IMAGE = "--container-image=/images/openmpi.sqsh"
NETWORK = "--container-network=job"
SAY = ["srun", "-w", "n1", IMAGE, NETWORK, "echo", "inside"]
KILLED_DURING_A_BUILD = (
    "--container-image=/images/openmpi.sqsh: the agent ended while the container was being made on n1",
    "agent is not running (/run/enclos/agent.sock: connection refused) on n1",  # The task had not asked it yet.
)
Origin = Callable[[], Sequence[int]]
CHANGES_OF_IDS = ("setfsuid", "setresuid", "capset")
ADDRESS = ["sh", "-c", "ip -o -4 addr show enclos0"]
# Meanwhile two agents start anew, one after the other: half a minute each in a guest.
RING_SECONDS = "4" if PATIENCE == 1 else "120"


def start(cluster: Cluster, words: list[str] | str) -> Running:
    return cluster.popen(words, user="usera")


def end(running: Running, timeout: float = 40 * PATIENCE) -> tuple[int, str, list[str]]:
    """Exit status, output, and the lines that the user reads."""
    out, err = running.communicate(timeout=timeout)
    return running.returncode, out, said(err)


def await_output(running: Running, text: str) -> None:
    assert running.stdout is not None
    while (line := running.stdout.readline()) != f"{text}\n":
        assert line, running.stderr.read() if running.stderr else ""


def records(cluster: Cluster, node: str = "n1") -> list[str]:
    return sorted(path.name for path in cluster.path_on(node, "/run/enclos/journal").iterdir())


def await_records(cluster: Cluster, number: int, timeout: float = 10) -> None:
    """Wait until the agent of the first node has so many records."""
    deadline = time.monotonic() + timeout
    while len(found := records(cluster)) != number:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def listed(cluster: Cluster, node: str = "n1") -> list[tuple[str, str]]:
    """Image and state of each step that `enclos ps` shows the user."""
    shown = cluster.run(["enclos", "ps", "--json"], node=node, user="usera")
    assert shown.returncode == 0, shown.stderr
    return [(step["image"], step["state"]) for step in json.loads(shown.stdout)]


def left(clean: Leftovers) -> list[str]:
    """What is more or less than before, after a step through which new agents keep what the old ones kept."""
    clean.cluster.await_idle()
    done = clean.cluster.run(["srun", "-N2", IMAGE, NETWORK, "true"], user="usera")
    assert done.returncode == 0, done.stderr
    return clean.rows(exact=False)


def restart_all(cluster: Cluster, number: int) -> None:
    for node in cluster.nodes:
        cluster.restart_agent(node, number)


@pytest.fixture
def allocation(fragile: Cluster, clean: Leftovers) -> Iterator[str]:
    """A job on the first node in which nothing runs yet, as the option that puts a step into it."""
    done = fragile.run(["salloc", "--no-shell", "-w", "n1"], user="usera")
    assert done.returncode == 0, done.stderr
    job = next(word for word in done.stderr.split() if word.isdigit())
    yield f"--jobid={job}"
    fragile.run(["scancel", job])
    fragile.await_idle()


# ---------------------------------------------------------------------------------------------- while steps run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_mpi_goes_on(fragile: Cluster, clean: Leftovers, number: int) -> None:
    ring = ["srun", "-N2", "-n4", "--mpi=pmix", IMAGE, NETWORK, "/usr/bin/ring", "--seconds", RING_SECONDS]
    running = start(fragile, ring)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("rank")
    restart_all(fragile, number)
    for node in fragile.nodes:
        assert listed(fragile, node) == [("/images/openmpi.sqsh", "running")]
    assert fragile.run(["enclos", "ps"], node="n1", user="userb").stdout.count("openmpi") == 0
    status, out, lines = end(running)
    assert (status, lines) == (0, [])
    assert "all data right" in out
    assert left(clean) == []
    assert listed(fragile) == []


def test_a_second_step_of_a_job_meets_the_first(fragile: Cluster, clean: Leftovers, allocation: str) -> None:
    """Its network is the one that the running step of before is in.

    The server does not fork by itself: proctrack/linuxproc misses a process that is forked while scancel kills its
    parent, and slurmstepd then waits 60 s for who has its output open.
    """
    options = ["srun", "--overlap", allocation, IMAGE, NETWORK]
    first = start(fragile, [*options, "sh", "-c", "echo up; exec busybox nc -ll -p 7777 -e echo hello"])
    await_output(first, "up")
    fragile.restart_agent("n1", signal.SIGKILL)
    second = fragile.run([*options, "sh", "-c", "busybox nc 127.0.0.1 7777 < /dev/null"], user="usera", timeout=20)
    assert (second.returncode, second.stdout) == (0, "hello\n"), second.stderr
    # Not by killing srun: slurmstepd would try to reach it for half a minute.
    fragile.run(["scancel", allocation.partition("=")[2]])
    first.communicate(timeout=20)


def test_between_two_steps_of_a_job(fragile: Cluster, clean: Leftovers, allocation: str) -> None:
    """No process held the network, so it is made again, with the same addresses."""
    options = ["srun", "--overlap", allocation, IMAGE, NETWORK]
    before = fragile.run([*options, *ADDRESS], user="usera").stdout
    fragile.restart_agent("n1", signal.SIGKILL)
    after = fragile.run([*options, *ADDRESS], user="usera")
    assert after.returncode == 0, after.stderr
    assert before.split()[3] == after.stdout.split()[3]
    fragile.run(["scancel", allocation.partition("=")[2]])
    assert left(clean) == []


def test_a_tasks_signal_and_status_pass_an_adopted_step(fragile: Cluster, clean: Leftovers) -> None:
    running = start(fragile, [*SAY[:4], "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done"])
    await_output(running, "up")
    fragile.restart_agent("n1", signal.SIGKILL)
    fragile.run("scancel --signal=TERM --user=usera")
    assert end(running)[0] == 5
    assert left(clean) == []


def test_an_adopted_step_is_swept(fragile: Cluster, clean: Leftovers) -> None:
    """What daemonized before the agent's death and outlived its step after it."""
    hidden = "setsid sh -c 'unshare -Urm sleep 301 < /dev/null > /dev/null 2>&1' & echo up; sleep 1"
    running = start(fragile, [*SAY[:4], "sh", "-c", hidden])
    await_output(running, "up")
    fragile.restart_agent("n1", signal.SIGKILL)
    assert end(running)[0] == 0
    assert left(clean) == []


def test_a_process_that_entered_the_container_does_not_lend_it_its_network(
    fragile: Cluster, clean: Leftovers, allocation: str
) -> None:
    """Its user may send a process of the node's network into the container; no step gets that network for the job's."""
    options = ["srun", "--overlap", allocation, IMAGE, NETWORK]
    first = start(fragile, [*options, "sh", "-c", "echo up; sleep 300"])
    await_output(first, "up")
    shell = "P=$(pgrep -u usera -x sleep); exec nsenter -t $P -U -m --preserve-credentials sh -c 'echo in; sleep 302'"
    for node in ("n1",):
        guest = fragile.popen(["bash", "-c", shell], "usera", node)
    await_output(guest, "in")
    fragile.restart_agent("n1", signal.SIGKILL)
    links = fragile.run([*options, "ls", "/sys/class/net"], user="usera")
    assert (links.returncode, links.stdout.split()) == (0, ["enclos0", "lo"]), links.stderr
    # With the first step alone gone, only the guest is left of its container.
    first.kill()
    first.communicate(timeout=20)
    guest.kill()
    guest.communicate(timeout=20)
    fragile.run(["scancel", allocation.partition("=")[2]])
    assert left(clean) == []
    assert "eth0" in fragile.run("ls /sys/class/net", node="n1").stdout


def test_descriptors_and_namespaces_do_not_grow(fragile: Cluster, clean: Leftovers) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        running = start(fragile, [*SAY[:4], "sh", "-c", "echo up; sleep 0.3"])
        await_output(running, "up")
        fragile.restart_agent("n1", number)
        assert end(running)[0] == 0
        assert fragile.run(SAY, user="usera").stdout == "inside\n"
    for _ in range(10):
        assert fragile.run(SAY, user="usera").stdout == "inside\n"
    assert left(clean) == []


# ---------------------------------------------------------------------------------------------- while it is dead


def test_a_step_that_ended_meanwhile(fragile: Cluster, clean: Leftovers, allocation: str) -> None:
    """The job goes on; what its step left is cleaned up by the next agent."""
    hidden = "setsid sh -c 'sleep 303 < /dev/null > /dev/null 2>&1' & echo up; sleep 0.5"
    running = start(fragile, ["srun", "--overlap", allocation, IMAGE, NETWORK, "sh", "-c", hidden])
    await_output(running, "up")
    fragile.stop_agent("n1", signal.SIGKILL)
    assert end(running)[0] == 0
    while processes(fragile, "n1", "slurmstepd"):
        time.sleep(0.01)
    assert [name for name in records(fragile) if name.startswith("step.")] != []
    fragile.start_agent("n1")
    job = allocation.partition("=")[2]
    await_records(fragile, 1)
    assert records(fragile) == [f"job.{job}"]
    assert processes(fragile, "n1", "sleep") == []
    fragile.run(["scancel", job])
    assert left(clean) == []


@pytest.mark.parametrize("step_alive", [False, True])
def test_a_job_that_ended_meanwhile(fragile: Cluster, clean: Leftovers, step_alive: bool) -> None:
    """Its epilog found no agent. slurmctld tells the next one; also if a step's end has to be dealt with first."""
    script = "echo up; sleep 0.6" if step_alive else "echo up"
    running = start(fragile, [*SAY[:4], "sh", "-c", script])
    await_output(running, "up")
    if not step_alive:
        running.communicate(timeout=20)
    fragile.stop_agent("n1", signal.SIGKILL)
    if step_alive:
        assert end(running)[0] == 0
    fragile.await_idle()
    fragile.start_agent("n1")
    await_records(fragile, 0)
    assert left(clean) == []


def test_a_job_that_ended_meanwhile_and_slurmctld_is_away(fragile: Cluster, clean: Leftovers) -> None:
    """It is asked again until it answers."""
    running = start(fragile, [*SAY[:4], "sh", "-c", "echo up; sleep 0.6"])
    await_output(running, "up")
    fragile.stop_agent("n1", signal.SIGKILL)
    assert end(running)[0] == 0
    fragile.await_idle()
    slurmctld = fragile.record.daemons["slurmctld"]
    slurmctld.send(signal.SIGTERM)  # Killed, it would come back with a state of seconds before.
    slurmctld.wait(20)
    try:
        fragile.start_agent("n1")
        await_records(fragile, 1)
    finally:
        fragile.mend()
        deadline = time.monotonic() + 30 * PATIENCE
        while fragile.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split() != ["idle", "idle"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    await_records(fragile, 0, timeout=40)
    assert left(clean) == []


def test_every_process_of_a_step_dies_with_the_agent(fragile: Cluster, clean: Leftovers) -> None:
    running = start(fragile, [*SAY[:4], "sh", "-c", "echo up; sleep 304"])
    await_output(running, "up")
    fragile.stop_agent("n1", signal.SIGKILL)
    for name in ("slurmstepd", "sleep"):
        for pid in processes(fragile, "n1", name):
            kill(pid)
    fragile.run("scancel --user=usera")
    running.kill()
    running.communicate(timeout=20)
    fragile.await_idle()
    fragile.start_agent("n1")
    await_records(fragile, 0)
    # Its cgroups stay where Slurm has some: slurmstepd would have removed them.
    assert [row for row in left(clean) if "slurmstepd.scope/" not in row] == []


# ---------------------------------------------------------------------------------------------- during a build


def test_the_spare_builder_ends_with_the_agent(fragile: Cluster, clean: Leftovers) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        waiting = spare(fragile, "n1")
        fragile.stop_agent("n1", number)
        deadline = time.monotonic() + 5 * PATIENCE
        while Path(f"/proc/{waiting}").exists():
            assert time.monotonic() < deadline, "the spare builder outlives the agent"
            time.sleep(0.002)
        fragile.start_agent("n1")
    assert fragile.run(SAY, user="usera").stdout == "inside\n"
    assert left(clean) == []


def test_killed_during_a_build(fragile: Cluster, clean: Leftovers, origin: Origin) -> None:
    """At some of its operations, the image's mount among them: one clear error, and nothing is left."""
    found = points(fragile, origin(), SAY)
    fragile.await_idle()
    for point in [*found[3::16], next(point for point in found if point.call == "pivot_root")]:
        with stopping(origin(), point) as stopper:
            running = start(fragile, SAY)
            builder = stopper.stopped()
        fragile.stop_agent("n1", signal.SIGKILL)
        status, out, lines = end(running)
        assert (status, out) == (1, ""), point
        (line,) = [line for line in lines if "enclos: " in line]
        assert plain(line).removeprefix("enclos: ") in KILLED_DURING_A_BUILD, point
        if point.call in CHANGES_OF_IDS:
            # These clear the death signal, and a builder that runs sets it again.
            with contextlib.suppress(ProcessLookupError):
                os.kill(builder, signal.SIGCONT)
        deadline = time.monotonic() + 5 * PATIENCE
        while Path(f"/proc/{builder}").exists():
            assert time.monotonic() < deadline, f"the builder outlives the agent at {point}"
            time.sleep(0.01)
        fragile.start_agent("n1")
        fragile.await_idle()
    assert left(clean) == []


def test_started_again_between_prepare_and_join(fragile: Cluster, clean: Leftovers, origin: Origin) -> None:
    """The task's JOIN carries the whole request, so the new agent builds what the old one began."""
    before = fragile.agent_log("n1").count(" ready@")
    # slurmstepd asks for the user's groups and I/O between the two; a pause there gives the time.
    with stopping(origin(), Point("fsopen", 1)) as stopper:
        running = start(fragile, SAY)
        stopper.stopped()
        stepd = max(processes(fragile, "n1", "slurmstepd"))
    fragile.restart_agent("n1", signal.SIGKILL)
    status, out, lines = end(running)
    if status == 0:
        assert (out, lines) == ("inside\n", [])
        assert fragile.agent_log("n1").count(" ready@") == before + 1
    else:
        assert any(text in line for line in lines for text in KILLED_DURING_A_BUILD), (stepd, lines)
    assert left(clean) == []


# ---------------------------------------------------------------------------------------------- what it meets


def test_two_agents_at_once(fragile: Cluster, clean: Leftovers) -> None:
    """The second one refuses, and disturbs nothing of the first."""
    second = fragile.run(["enclosd", "--foreground"], node="n1", timeout=20)
    assert second.returncode == 1
    assert said(second.stderr)[0] == "enclosd: /run/enclos: another agent is running on n1"
    assert fragile.run(SAY, user="usera").stdout == "inside\n"
    assert left(clean) == []


DAMAGED = {
    "step.1.0.2": "{",
    "step.1.1.2": "[]",
    "step.1.2.2": '{"job": 1}',
    "step.1.3.2": '{"job": [], "step": 3, "uid": 1, "stepd": 2, "state": "running"}',
    "step.1.4.2": json.dumps({"job": 1, "step": 4, "uid": "root", "stepd": -1, "stepd_start": 3, "state": "running"}),
    "step.1.5.2": json.dumps(
        {"job": 1, "step": 5, "uid": 0, "stepd": 1, "stepd_start": 3, "tasks": 1, "state": "running", "started": 0}
        | {"network": "job", "namespace": [1, 2, 3], "netns": None}
    ),
    "job.1": '{"facts": {"job": 1}}',
    "job.2": '{"facts": null, "network": {}}',
    "job.3": '{"facts": {"job": 3, "uid": 1, "nodelist": "n1", "extra": 0}, "network": null}',
    "job.4.new": '{"fac',
    "job.5": "\x00\xff",
}


def test_damaged_records_are_ignored_and_removed(fragile: Cluster, clean: Leftovers) -> None:
    fragile.stop_agent("n1", signal.SIGKILL)
    journal = fragile.path_on("n1", "/run/enclos/journal")
    for name, text in DAMAGED.items():
        (journal / name).write_bytes(text.encode("latin-1"))
    (journal / "job.6").mkdir()
    fragile.start_agent("n1")
    (journal / "job.6").rmdir()
    log = fragile.agent_log("n1")
    assert "Traceback" not in log
    assert log.count("is damaged") >= len(DAMAGED) - 1
    assert fragile.run(SAY, user="usera").stdout == "inside\n"
    assert left(clean) == []


def test_a_lost_record_of_a_job_keeps_its_running_step_working(fragile: Cluster, clean: Leftovers) -> None:
    ring = ["srun", "-N2", "-n2", "--mpi=pmix", IMAGE, NETWORK, "/usr/bin/ring", "--seconds", RING_SECONDS]
    running = start(fragile, ring)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("rank")
    fragile.stop_agent("n1", signal.SIGKILL)
    for path in fragile.path_on("n1", "/run/enclos/journal").glob("job.*"):
        path.unlink()
    fragile.start_agent("n1")
    status, out, lines = end(running)
    assert (status, lines) == (0, []), out
    fragile.restart_agent("n1")  # What its end could not name goes with the next start.
    assert left(clean) == []


def test_entries_of_the_guard_that_nobody_knows_are_removed(fragile: Cluster, clean: Leftovers) -> None:
    fragile.stop_agent("n1", signal.SIGKILL)
    added = fragile.run("nft add element inet enclos peers4 '{ 0x000500 . 10.90.0.9 }'", node="n1")
    assert added.returncode == 0, added.stderr
    fragile.start_agent("n1")
    assert left(clean) == []


@pytest.fixture
def small_journal(fragile: Cluster, clean: Leftovers) -> Iterator[str]:
    """The folder of the first node's records, alone in a file system of 64 KiB."""
    path = "/run/enclos/journal"
    fragile.stop_agent("n1")
    assert fragile.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", path], node="n1").returncode == 0
    fragile.start_agent("n1")
    yield path
    fragile.stop_agent("n1")
    assert fragile.run(["umount", path], node="n1").returncode == 0
    fragile.start_agent("n1")


def test_no_space_for_records_is_a_clear_error(fragile: Cluster, small_journal: str, allocation: str) -> None:
    """The agent lives on, runs no step that it could not clean up behind, and works again when there is space."""
    step = ["srun", "--overlap", allocation, IMAGE, NETWORK, "true"]
    fragile.run(f"dd if=/dev/zero of={small_journal}/filler bs=4k", node="n1")
    status, out, lines = end(start(fragile, step))
    fragile.run(f"rm {small_journal}/filler", node="n1")
    assert (status, out) == (1, "")
    assert [plain(line) for line in lines if "enclos: " in line] == [
        "enclos: /run/enclos/journal: the agent cannot write its records "
        "(no space left on device) on n1"
    ]
    assert fragile.run(step, user="usera").returncode == 0
    assert "Traceback" not in fragile.agent_log("n1")


def test_no_space_for_records_leaves_nothing(fragile: Cluster, clean: Leftovers, small_journal: str) -> None:
    assert fragile.run(SAY, user="usera").returncode == 0
    fragile.await_idle()
    before = Leftovers(fragile)
    fragile.run(f"dd if=/dev/zero of={small_journal}/filler bs=4k", node="n1")
    status, _, _ = end(start(fragile, SAY))
    fragile.run(f"rm {small_journal}/filler", node="n1")
    assert status == 1
    assert left(before) == []
