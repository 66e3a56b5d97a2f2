"""Kinds of jobs that make one of many: arrays and heterogeneous jobs, each part with containers of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from enclos.runtime.cluster import image as images
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


def test_parts_of_a_heterogeneous_job(make_cluster: Callable[..., Cluster]) -> None:
    """One step over both parts, and one in each. (Slurm's builtin scheduler starts no such job.)"""
    extra = "SchedulerType=sched/backfill\nSchedulerParameters=bf_interval=1\n"
    cluster = make_cluster(2, slurm_conf_extra=extra)
    images.install(cluster.layout.images)
    part = f"-N1 -n1 {IMAGE}"
    script = f"""
        srun --het-group=0,1 {IMAGE} --container-network=job sh -c 'echo both $(hostname) $(ls /sys/class/net | xargs)'
        srun --het-group=0 {part} --container-remap-root sh -c 'echo first $(hostname) $(id -u)'
        srun --het-group=1 {part} sh -c 'echo second $(hostname) $(id -u)'"""
    words = ["salloc", "-Q", "-N1", "-n1", "-w", "n1", ":", "-N1", "-n1", "-w", "n2", "bash", "-c", script]
    done = cluster.run(words, "usera", timeout=60)
    cluster.down()
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "both n1 enclos0 lo", "both n2 enclos0 lo", "first n1 0", "second n2 61001",
    ]  # fmt: skip
