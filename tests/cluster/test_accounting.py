"""What Slurm's accounting says of steps in containers: the same as of others. In a guest, where it reads cgroups."""

from __future__ import annotations

import re
import subprocess

import accounting
import pytest
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"
MEMORY = 40_000_000
# By bash alone, which is the same program in the image: its busybox would take longer than other tools.
TAKE = f"printf -v x %{MEMORY}s"
WORK = f"{TAKE}; for ((i = 0; i < 100000; i++)); do :; done; echo up; read"


@pytest.fixture(scope="module")
def counted(limited: Cluster) -> Cluster:
    """That cluster with slurmdbd, from now on."""
    accounting.start(limited)
    return limited


def work(cluster: Cluster, step: str, *options: str) -> None:
    """A step that takes memory and time, and that is looked at meanwhile."""
    words = ["srun", f"--jobid={step.partition('.')[0]}", "-n1", *options, "bash", "-c", WORK]
    with cluster.popen(words, "usera", stdin=subprocess.PIPE) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        # slurmstepd looks when it is asked to, and otherwise every 30 s.
        cluster.run(["sstat", "-n", "-j", step, "-o", "maxrss"])
        _, err = running.communicate("\n", timeout=100)
    assert (said, running.returncode) == ("up\n", 0), err


@pytest.mark.vm_new
def test_memory_and_processor_time_of_steps(counted: Cluster) -> None:
    """By sacct from a real slurmdbd: of a step in a container with limits as of one without."""
    granted = counted.run(["salloc", "-n1", "--mem=100", "--no-shell"], "usera").stderr
    job = re.findall(r"Granted job allocation (\d+)", granted)[0]
    # First one that pays for reading the image.
    assert counted.run(["srun", f"--jobid={job}", "-n1", IMAGE, "bash", "-c", "true"], "usera").returncode == 0
    work(counted, f"{job}.1")
    work(counted, f"{job}.2", IMAGE, "--container-limit=memory=80M,swap=0,pids=50,cpu=1")
    counted.run(["scancel", job])
    counted.await_idle(60)
    said = counted.run(["sacct", "-n", "-P", "-j", job, "-o", "jobid,user,account,state,maxrss,totalcpu"], "usera")
    rows = {row.split("|")[0]: row.split("|")[1:] for row in said.stdout.splitlines()}
    assert rows[job][:2] == ["usera", "alpha"], said
    plain, contained = (rows[f"{job}.{step}"][2:] for step in (1, 2))
    assert plain[0] == contained[0] == "COMPLETED", said
    memory_kb, in_container_kb = (int(row[1].removesuffix("K")) for row in (plain, contained))
    assert memory_kb > MEMORY // 1024 and abs(in_container_kb - memory_kb) < 0.1 * memory_kb, said
    cpu_s, in_container_s = (seconds(row[2]) for row in (plain, contained))
    assert cpu_s > 0.1 and abs(in_container_s - cpu_s) < 0.2 + 0.2 * cpu_s, said


def seconds(text: str) -> float:
    """Of a time as 00:01.123."""
    minutes, _, rest = text.rpartition(":")
    return 60 * int(minutes) + float(rest)


@pytest.mark.vm_new
def test_a_step_that_a_limit_of_ours_killed(counted: Cluster) -> None:
    """Slurm says that memory was it, of our limit as of its own."""
    too_much = f"printf -v x %{4 * MEMORY}s"
    own = ["srun", "-J", "own", "--mem=80", "bash", "-c", too_much]
    ours = ["srun", "-J", "ours", "--mem=400", IMAGE, "--container-limit=memory=80M,swap=0", "bash", "-c", too_much]
    for command in (own, ours):
        assert counted.run(command, "usera", timeout=100).returncode != 0
    counted.await_idle(60)
    said = counted.run(["sacct", "-n", "-P", "-u", "usera", "-o", "jobname,state,exitcode"], "usera").stdout
    rows = [row for row in said.splitlines() if row.startswith(("own|", "ours|"))]
    # Of each job, and of its only step.
    assert rows == [f"{name}|OUT_OF_MEMORY|0:125" for name in ("own", "own", "ours", "ours")], said
