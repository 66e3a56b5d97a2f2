"""Named containers outlive agents and builders that are killed, and nothing of them outlives what they belong to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, Leftovers, said
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster, Running
from faults import Point, kill, killing, processes, spare, stopping, zygote

IMAGE = "--container-image=/images/openmpi.sqsh"
NAMED = "--container-name=w"
STEP = f"srun -n1 --overlap {IMAGE} {NAMED}"
# `await NAME`: until the test has made that file; `tell NAME`: let the test know.
TALK = """
    await() { while [ ! -e /shared/$1 ]; do sleep 0.02; done; }
    tell() { touch /shared/$1; }
"""


@pytest.fixture
def talk(fragile: Cluster) -> Path:
    """The folder by which script and test tell each other how far they are."""
    shared = fragile.layout.shared
    shared.chmod(0o1777)
    for name in ("first", "go"):
        (shared / name).unlink(missing_ok=True)
    return shared


def start(cluster: Cluster, script: str, *options: str) -> Running:
    return cluster.popen(["salloc", "-Q", "-w", "n1", *options, "bash", "-c", TALK + script], "usera")


def builders(cluster: Cluster) -> list[int]:
    """The builder that waits for the next step on the first node, and the process that forks others."""
    return [spare(cluster, "n1"), zygote(cluster, "n1")]


def await_file(path: Path, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def kept(cluster: Cluster) -> list[str]:
    """What is mounted for named containers on the first node."""
    rows = Path(f"/proc/{cluster.node_pid('n1')}/mountinfo").read_text().splitlines()
    return [row.split()[4] for row in rows if "/run/enclos/named" in row]


def left(clean: Leftovers) -> list[str]:
    """What is more or less than before, after a step through which new agents keep what the old ones kept."""
    clean.cluster.await_idle()
    done = clean.cluster.run(["srun", "-N2", IMAGE, "--container-network=job", "true"], user="usera")
    assert done.returncode == 0, done.stderr
    return clean.rows(exact=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_files_outlive_the_agent(fragile: Cluster, clean: Leftovers, talk: Path, number: int) -> None:
    script = f"""
        {STEP} sh -c 'echo kept > /opt/note'; tell first; await go
        srun -n1 {NAMED} cat /opt/note"""
    with start(fragile, script) as running:
        await_file(talk / "first")
        fragile.restart_agent("n1", number)
        (talk / "go").touch()
        out, err = running.communicate(timeout=30)
    assert (out, said(err)) == ("kept\n", [])
    fragile.await_idle()
    assert kept(fragile) == []
    assert left(clean) == []


@pytest.mark.parametrize("network", ["host", "job"])
def test_one_that_runs_is_entered_after_the_agent_was_killed(
    fragile: Cluster, clean: Leftovers, talk: Path, network: str
) -> None:
    show = "readlink /proc/self/ns/mnt /proc/self/ns/user /proc/self/ns/net | xargs"
    stay = "touch /opt/up; while [ ! -e /opt/down ]; do sleep 0.02; done"
    script = f"""
        {STEP} --container-network={network} sh -c '{show}; {stay}' &
        until srun -n1 --overlap {NAMED}:exec ls /opt/up >/dev/null 2>&1; do sleep 0.05; done; tell first; await go
        srun -n1 --overlap {NAMED}:exec sh -c '{show}; touch /opt/down'; wait"""
    with start(fragile, script) as running:
        await_file(talk / "first")
        fragile.restart_agent("n1", signal.SIGKILL)
        (talk / "go").touch()
        out, err = running.communicate(timeout=30)
    rows = out.splitlines()
    assert (len(rows), len(set(rows))) == (2, 1), (out, err)
    assert left(clean) == []


def test_a_job_that_ended_without_an_agent_leaves_nothing(fragile: Cluster, clean: Leftovers, talk: Path) -> None:
    with start(fragile, f"{STEP} true; tell first; await go") as running:
        await_file(talk / "first")
        assert len(kept(fragile)) == 1
        fragile.stop_agent("n1", signal.SIGKILL)
        (talk / "go").touch()
        running.communicate(timeout=30)
    fragile.await_idle()
    fragile.start_agent("n1")
    deadline = time.monotonic() + 10 * PATIENCE
    while kept(fragile) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert kept(fragile) == []
    assert left(clean) == []


@pytest.mark.parametrize(
    "point",
    [Point("setns", 1), Point("setns", 2), Point("move_mount", 1), Point("unshare", 1), Point("pivot_root", 1)],
    ids=str,
)
def test_a_builder_killed_while_it_creates_one(fragile: Cluster, clean: Leftovers, point: Point) -> None:
    """Twice is an error and leaves nothing; the same name can be created by the next step."""
    script = f"{STEP} echo inside; echo $?"
    with killing(builders(fragile), point):
        out, _ = start(fragile, script).communicate(timeout=60)
    assert out == "1\n"
    out, err = start(fragile, f"{STEP}:create echo inside").communicate(timeout=60)
    assert (out, said(err)) == ("inside\n", [])
    fragile.await_idle()
    assert kept(fragile) == []
    assert clean.rows() == []


def test_a_builder_killed_while_it_enters_one(fragile: Cluster, clean: Leftovers, talk: Path) -> None:
    """Who is in there is not disturbed."""
    script = f"""
        {STEP} sh -c 'touch /opt/up; while [ ! -e /opt/down ]; do sleep 0.02; done; echo first' &
        until srun -n1 --overlap {NAMED}:exec ls /opt/up >/dev/null 2>&1; do sleep 0.05; done; tell first; await go
        srun -n1 --overlap {NAMED}:exec true; echo $?
        tell second
        until srun -n1 --overlap {NAMED}:exec touch /opt/down 2>/dev/null; do sleep 0.05; done; wait"""
    (talk / "second").unlink(missing_ok=True)
    with start(fragile, script) as running:
        await_file(talk / "first")
        with killing(builders(fragile), Point("setns", 3)):
            (talk / "go").touch()
            await_file(talk / "second", 40)
        out, _ = running.communicate(timeout=30)
    assert out == "1\nfirst\n"
    fragile.await_idle()
    assert clean.rows() == []


def test_a_step_that_waits_for_its_turn_gets_it_when_the_first_is_cancelled(
    fragile: Cluster, clean: Leftovers, talk: Path
) -> None:
    script = f"""
        {STEP} echo first & first=$!
        await go; {STEP} echo second & wait $first; wait"""
    with stopping(builders(fragile), Point("pivot_root", 1)) as stopper, start(fragile, script) as running:
        stopper.stopped()
        (talk / "go").touch()
        time.sleep(1)  # The second one has to be waiting, and nothing tells.
        stopper.let_go()
        fragile.run(["bash", "-c", "scancel $(squeue -h -o %A).0"], "usera")
        out, _ = running.communicate(timeout=40)
    assert out == "second\n"
    fragile.await_idle()
    assert clean.rows() == []


def test_tasks_of_a_killed_slurmstepd_in_a_shared_container(fragile: Cluster, clean: Leftovers, talk: Path) -> None:
    """They end at the latest with the last step in it."""
    script = f"""
        {STEP} sh -c 'touch /opt/up; sleep 300' &
        until srun -n1 --overlap {NAMED}:exec ls /opt/up >/dev/null 2>&1; do sleep 0.05; done; tell first; await go
        srun -n1 --overlap {NAMED}:exec sh -c 'echo in'; kill %1; wait"""
    with start(fragile, script) as running:
        await_file(talk / "first")
        for pid in processes(fragile, "n1", "slurmstepd"):
            kill(pid)
        (talk / "go").touch()
        fragile.run("scancel --user=usera")
        running.kill()
        running.communicate(timeout=30)
    fragile.await_idle()
    assert processes(fragile, "n1", "sleep") == []
    assert clean.rows() == []


# -- on disk, for all jobs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(make_cluster: Callable[..., Cluster]) -> Cluster:
    config = "named: {scope: global, directory: /tmp/kept, size: 64M}\nimages: {idle_seconds: 0}\n"
    made = make_cluster(1, config=config)
    images.install(made.layout.images)
    return made


def step(cluster: Cluster, *words: str, user: str = "usera") -> tuple[str, list[str]]:
    done = cluster.run(["srun", "-n1", NAMED, *words], user, timeout=40)
    return done.stdout, [row for row in said(done.stderr) if row.startswith("slurmstepd")]


def test_global_scope(disk: Cluster) -> None:
    """For all jobs of one user, until he removes it; limited; also after the node was started again."""
    assert step(disk, IMAGE, "sh", "-c", "echo one > /opt/note") == ("", [])
    assert step(disk, "cat", "/opt/note") == ("one\n", [])
    missing = 'a container with name "w" does not exist, and --container-image is not set on n1'
    assert step(disk, "true", user="userb")[1] == [f"slurmstepd-n1: error: enclos: --container-name=w: {missing}"]
    full = "dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null || echo full; rm /big; stat -c '%u %a' /opt/note"
    assert step(disk, "sh", "-c", full) == ("full\n61001 644\n", [])
    _crash(disk)
    assert step(disk, "cat", "/opt/note") == ("one\n", [])
    assert step(disk, "--container-remap-root", "sh", "-c", "id -u; cat /opt/note") == ("0\none\n", [])
    (file,) = disk.path_on("n1", "/tmp/kept").glob("*.ext4")
    assert file.stat().st_size == 64 << 20
    assert file.stat().st_mode & 0o777 == 0o600
    removed = disk.run(["enclos", "rm", "w"], "usera", "n1")
    assert (removed.returncode, removed.stderr) == (0, "")
    again = disk.run(["enclos", "rm", "w"], "usera", "n1")
    assert (again.returncode, again.stderr.splitlines()[0]) == (
        1, "enclos: rm w: you have no container of this name here in which no step runs",
    )  # fmt: skip
    assert step(disk, "true")[1] == [f"slurmstepd-n1: error: enclos: --container-name=w: {missing}"]
    assert kept(disk) == []
    assert sorted(path.name for path in disk.path_on("n1", "/tmp/kept").iterdir()) == ["records"]
    assert list(disk.path_on("n1", "/tmp/kept/records").iterdir()) == []


def test_rm_leaves_what_runs_and_what_is_others(disk: Cluster) -> None:
    assert step(disk, IMAGE, "true") == ("", [])
    with disk.popen(["srun", "-n1", NAMED, "sh", "-c", "echo up; sleep 60"], "usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        for user in ("usera", "userb"):
            assert disk.run(["enclos", "rm", "w"], user, "n1").returncode == 1
        running.terminate()
    disk.await_idle()
    assert disk.run(["enclos", "rm", "w"], "userb", "n1").returncode == 1
    assert disk.run(["enclos", "rm", "w"], "usera", "n1").returncode == 0


def _crash(cluster: Cluster) -> None:
    """As when the node loses its power: the agent, all mounts of it and what is in /run are gone, the disk is there."""
    cluster.stop_agent("n1", signal.SIGKILL)
    script = "umount /run/enclos/named/*.*; rm -r /run/enclos"
    done = cluster.run(["bash", "-c", script], "root", "n1")
    assert done.returncode == 0, done.stderr
    cluster.start_agent("n1")
