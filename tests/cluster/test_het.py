"""Heterogeneous jobs and steps: parts of one job that are different.

Slurm's builtin scheduler starts no such job, and a step of several parts in an ordinary allocation has to be allowed:
so they have a cluster of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.releases

IMAGE = "--container-image=/images/openmpi.sqsh"
BACKFILL = "SchedulerType=sched/backfill\nSchedulerParameters=bf_interval=1,sched_interval=1,enable_hetero_steps\n"
PROFILES = {
    "one.toml": 'image = "/images/openmpi.sqsh"\nmounts = ["/shared:/one"]\n[env]\nFROM = "one"\n',
    "two.toml": 'image = "/images/openmpi.sqsh"\nremap_root = true\n[env]\nFROM = "two"\nTWO = "2"\n',
}
# Node, user, the mounts of the parts below, variables of the profiles, whether it has a network; nothing where not.
SHOW = (
    'echo "$(hostname) $(id -u) $(ls -d /one /two 2>/dev/null | tr -d /) $FROM $TWO'
    ' $(test -e /sys/class/net/eth0 && echo host) $(test -d /var/log/apt && echo outside)" | xargs'
)


@pytest.fixture(scope="module")
def het(make_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    made = make_cluster(3, slurm_conf_extra=BACKFILL)
    images.install(made.layout.images)
    folder = made.layout.homes / "usera/.edf"
    folder.mkdir()
    for name, text in PROFILES.items():
        (folder / name).write_text(text)
    yield made
    made.down()


def parts(cluster: Cluster, script: str, *words: str, **env: str) -> list[str]:
    """What a script in a job of two parts, on n1 and n2, prints: its lines sorted."""
    allocation = words or ("-N1", "-n1", "-w", "n1", ":", "-N1", "-n1", "-w", "n2")
    done = cluster.run(["salloc", "-Q", *allocation, "bash", "-c", script], "usera", timeout=60, env={"S": SHOW, **env})
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_steps_of_one_part_and_of_all(het: Cluster) -> None:
    part = f"-N1 -n1 {IMAGE}"
    script = f"""
        srun --het-group=0,1 {IMAGE} --container-network=job sh -c 'echo both $(hostname) $(ls /sys/class/net | xargs)'
        srun --het-group=0 {part} --container-remap-root sh -c 'echo first $(hostname) $(id -u)'
        srun --het-group=1 {part} sh -c 'echo second $(hostname) $(id -u)'"""
    assert parts(het, script) == ["both n1 enclos0 lo", "both n2 enclos0 lo", "first n1 0", "second n2 61001"]


def test_each_part_of_a_step_has_its_own_options(het: Cluster) -> None:
    """Slurm hands the last part's to all. What the first one says, also of networks, is nothing to the second."""
    first = f"{IMAGE} --container-network=none --container-mounts=/shared:/one"
    script = f'srun {first} sh -c "$S" : {IMAGE} --container-remap-root --container-mounts=/shared:/two sh -c "$S"'
    assert parts(het, script) == ["n1 61001 one", "n2 0 two host"]


def test_each_part_of_a_step_has_its_own_profile(het: Cluster) -> None:
    script = 'srun --container-profile=one sh -c "$S" : --container-profile=two sh -c "$S"'
    assert parts(het, script) == ["n1 61001 one one host", "n2 0 two 2 host"]


def test_parts_are_told_by_their_group(het: Cluster) -> None:
    script = f'srun --het-group=1 {IMAGE} --container-remap-root sh -c "$S" : --het-group 0 {IMAGE} sh -c "$S"'
    assert parts(het, script) == ["n1 61001 host", "n2 0 host"]


def test_what_holds_for_a_whole_command_holds_for_each_part(het: Cluster) -> None:
    """Variables, and a job's options, beside those of a part."""
    script = 'srun --container-mounts=/shared:/one sh -c "$S" : --container-readonly sh -c "$S"'
    assert parts(het, script, ENCLOS_CONTAINER_IMAGE="/images/openmpi.sqsh") == ["n1 61001 one host", "n2 61001 host"]


def test_a_part_without_a_container_is_named(het: Cluster) -> None:
    words = ["srun", "-Q", "-wn1", IMAGE, "sh", "-c", SHOW, ":", "-wn2", "sh", "-c", SHOW]
    done = het.run(words, "usera", timeout=60)
    assert sorted(done.stdout.splitlines()) == ["n1 61001 host", "n2 61001 host outside"]
    assert done.stderr.splitlines() == ["enclos: part 1 of this step asks for no container and runs outside"]


def test_a_step_inside_a_part_has_no_parts(het: Cluster) -> None:
    """What the step around it has in its environment is not its own."""
    inner = f"env | grep -c ENCLOS_PARTS=; srun --overlap -N1 -n1 -wn1 {IMAGE} --container-remap-root sh -c \"$S\""
    script = f"srun --overlap -n1 sh -c '{inner}' : --overlap {IMAGE} --container-mounts=/shared:/two true"
    assert parts(het, script) == ["0", "n1 0 host"]


def test_parts_in_an_ordinary_allocation(het: Cluster) -> None:
    """There all have one job id. From 26.05 on nothing tells slurmstepd which part it is: no container is started."""
    script = f'srun -N1 -n1 {IMAGE} --container-mounts=/shared:/one sh -c "$S" : -N1 -n1 {IMAGE} sh -c "$S"'
    if het.release < "26":
        rows = parts(het, script, "-N2", "-n2")
        assert sorted(row.split(" ", 1)[1] for row in rows) == ["61001 host", "61001 one host"]
        return
    done = het.run(["salloc", "-Q", "-N2", "-n2", "bash", "-c", script], "usera", timeout=60, env={"S": SHOW})
    assert done.returncode == 1 and done.stdout == ""
    assert "enclos: container options: which part of the heterogeneous step this is cannot be told" in done.stderr


def test_het_job_has_the_pmix_directories_of_its_leader(het: Cluster) -> None:
    listed = het.run("srun --mpi=list")
    if "pmix" not in listed.stdout + listed.stderr:
        pytest.skip("this Slurm is built without PMIx")
    part = f"-n1 --mpi=pmix {IMAGE} sh -c 'echo $SLURM_JOB_ID $SLURM_HET_JOB_ID_GROUP_0 /run/slurmd/pmix*'"
    done = het.run(f"srun {part} : {part}", "usera")
    rows = [row.split() for row in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 2, done.stderr
    leader = min(row[0] for row in rows)
    assert {row[-1] for row in rows} == {f"/run/slurmd/pmix.{leader}.0"}
    ring = het.run(f"srun -n1 --mpi=pmix {IMAGE} ring : -n1 --mpi=pmix {IMAGE} ring", "usera")
    assert "ring of 2" in ring.stdout, ring.stderr


def test_exit_status_of_a_het_step_is_that_of_the_failed_part(het: Cluster) -> None:
    done = het.run(f"srun -n1 {IMAGE} true : -n1 {IMAGE} sh -c 'exit 9'", "usera")
    assert done.returncode == 9
    failed = het.run(f"srun -n1 {IMAGE} true : -n1 --container-image=/images/none true", "usera")
    assert failed.returncode == 1
    assert "enclos: --container-image=/images/none: image not found on n" in failed.stderr
