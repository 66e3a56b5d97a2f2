"""Kinds of jobs that are more than one: arrays, and those that run again. Heterogeneous ones: test_het.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from conftest import PATIENCE
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"


@pytest.fixture(autouse=True)
def _image(image: str) -> None:
    """The image is there."""


def test_tasks_of_an_array_share_nothing(idle: Cluster) -> None:
    """Each is a job: its named container is its own, also on one node at the same time."""
    idle.layout.shared.chmod(0o1777)
    step = f"srun -n1 {IMAGE} --container-name=w sh -c"
    script = (
        f"{step} 'cat /opt/n 2>/dev/null || echo fresh; echo $SLURM_ARRAY_TASK_ID > /opt/n; sleep 1'; "
        "srun -n1 --container-name=w cat /opt/n"
    )
    words = ["sbatch", "-Q", "--wait", "-w", "n1", "--array=1-3", "-o", "/shared/array-%a", "--wrap", script]
    done = idle.run(words, "usera", cwd="/shared", timeout=90)
    assert done.returncode == 0, done.stderr
    for number in (1, 2, 3):
        rows = (idle.layout.shared / f"array-{number}").read_text().splitlines()
        assert [row for row in rows if not row.startswith("srun: ")] == ["fresh", str(number)]


@pytest.mark.parametrize("how", ["requeue", "down", "slurmd"])
def test_a_job_that_runs_again_begins_with_nothing(fragile: Cluster, how: str) -> None:
    """It has the same ids: what its first run left (a named container, a network) is gone, and all is made anew."""
    fragile.await_idle()
    shared = fragile.layout.shared
    shared.chmod(0o1777)
    for name in ("up", "again"):
        (shared / name).unlink(missing_ok=True)
    step = f"srun -N2 -n2 {IMAGE} --container-name=w --container-network=job --container-mounts=/shared sh -c"
    script = f"""
        [ -e /shared/up ] && exec >> /shared/again 2>&1
        {step} 'echo $(hostname) $(cat /opt/n 2>/dev/null || echo fresh) $(ls /sys/class/net); echo used > /opt/n'
        {step} 'cat /opt/n'
        [ -e /shared/again ] || {{ {step} 'echo > /shared/up; sleep 300'; }}"""
    words = ["sbatch", "--parsable", "--requeue", "-N2", "-n2", "-o", "/shared/requeue.out", "--wrap", script]
    job = fragile.run(words, "usera", cwd="/shared").stdout.strip()
    _await((shared / "up").exists)
    if how == "requeue":
        fragile.run(f"scontrol requeue {job}")
    else:
        if how == "slurmd":
            os.kill(fragile.slurmd_pid("n2"), signal.SIGKILL)
        fragile.run("scontrol update NodeName=n2 State=DOWN Reason=test")
        if how == "slurmd":
            fragile.mend()
        fragile.run("scontrol update NodeName=n2 State=RESUME")
    # Slurm would let the job wait for two minutes, in which its first run ends on all nodes.
    records = [fragile.path_on(node, f"/run/enclos/journal/job.{job}") for node in fragile.nodes]
    _await(lambda: not any(record.exists() for record in records))

    def is_over() -> bool:
        # It would wait for two minutes, until no credential of its first run counts any more.
        fragile.run(f"scontrol update JobId={job} StartTime=now")
        state = fragile.run(f"scontrol -o show job {job}").stdout
        return "JobState=COMPLETED" in state and "Restarts=1" in state

    _await(is_over)
    rows = (shared / "again").read_text().splitlines()
    fragile.await_idle()
    assert sorted(rows) == ["n1 fresh enclos0 lo", "n2 fresh enclos0 lo", "used", "used"]


def _await(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60 * PATIENCE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.2)
