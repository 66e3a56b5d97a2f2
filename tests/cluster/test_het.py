"""Heterogeneous jobs and steps: parts of one job that are different.

Slurm's builtin scheduler starts no such job, and a step of several parts in an ordinary allocation has to be allowed:
so they have a cluster of their own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from enclos.netns import names
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
    shutil.copy(Path(__file__).with_name("peer.py"), made.layout.shared / "peer.py")
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


@pytest.mark.parametrize("own", [("--het", "1"), ("--het", "--out"), ("--he=7",), ("--", "--het-group=1")])
def test_arguments_of_a_program_are_not_taken_for_options_of_srun(het: Cluster, own: Sequence[str]) -> None:
    """Taken for --het-group, they gave the first part's container to another part, and it ran outside."""
    first = f"{IMAGE} --container-remap-root sh -c \"$S\" sh {' '.join(own)}"
    script = f'srun -n 1 {first} : -l -n1 {IMAGE} --container-mounts=/shared:/two sh -c "$S"'
    assert sorted(line.removeprefix("1: ") for line in parts(het, script)) == ["n1 0 host", "n2 61001 two host"]


def test_a_part_that_cannot_be_told_does_not_run(het: Cluster) -> None:
    """A flag before the program: srun's options may go on behind it, as far as the plugin knows."""
    script = f'srun {IMAGE} --exclusive plink --het 1 : {IMAGE} --exclusive sh -c "$S"; echo $?'
    done = het.run(["salloc", "-Q", "-n1", "-w", "n1", ":", "-n1", "-w", "n2", "bash", "-c", script], "usera")
    assert done.stdout.splitlines()[-1] == "1"
    assert "which part" in done.stderr


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


@pytest.mark.parametrize("allocation", [(), ("-N2", "-n2")], ids=["of parts", "ordinary"])
def test_a_step_without_containers_is_slurms_alone(het: Cluster, allocation: tuple[str, ...]) -> None:
    script = "srun -N1 -n1 sh -c 'env | grep -c ENCLOS_PARTS=; echo one' : -N1 -n1 echo two"
    assert parts(het, script, *allocation) == ["0", "one", "two"]


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


def test_of_an_allocations_parts_one_holds_for_all_steps(het: Cluster) -> None:
    """Slurm hands on one set of options: of sbatch the first part's, of salloc the last one's."""
    shared = het.layout.shared
    shared.chmod(0o1777)
    (shared / "het.sh").write_text(f"#!/bin/sh\nsrun --het-group=0,1 sh -c '{SHOW}'\n")
    (shared / "het.sh").chmod(0o755)
    part = f"-N1 -n1 {IMAGE} --container-slurm --container-mounts=/shared,/shared:"
    one, two = f"{part}/one", f"{part}/two"
    done = het.run(f"sbatch -Q -W -o /shared/het.out {one} : {two} /shared/het.sh", "usera", timeout=60)
    rows = [row.split(" ", 1)[1] for row in (shared / "het.out").read_text().splitlines()]
    assert (done.returncode, rows) == (0, ["61001 one host"] * 2)
    done = het.run(f"salloc -Q {one} : {two} /shared/het.sh", "usera", timeout=60)
    assert [row.split(" ", 1)[1] for row in done.stdout.splitlines()] == ["61001 two host"] * 2, done.stderr


# -- one network for all parts ----------------------------------------------------------------------------

TOOLS = f"{IMAGE} --container-mounts=/usr:/usr:ro,/shared:/shared --container-network=job"
PEER = "/usr/bin/python3 /shared/peer.py"
THREE = ("-N1", "-n1", "-w", "n3", ":", "-N2", "-n2", "-w", "n1,n2")


@contextmanager
def serving(cluster: Cluster, *words: str) -> Iterator[list[str]]:
    """A job of two parts, n3 and n1-n2, with a service on n1; the body has the ids of its parts."""
    script = "echo $SLURM_JOB_ID_HET_GROUP_0 $SLURM_JOB_ID_HET_GROUP_1 >&2;"
    script += f"srun --overlap --het-group=1 -N1 -n1 -w n1 {TOOLS} {PEER} serve 7777 {30 * PATIENCE} here"
    with cluster.popen(["salloc", "-Q", *(words or THREE), "bash", "-c", script], "usera") as running:
        assert running.stderr is not None and running.stdout is not None
        ids = running.stderr.readline().split()
        assert "serving" in running.stdout.readline()
        try:
            yield ids
        finally:
            cluster.run(["scancel", *ids])
            running.kill()
            running.wait(20)
    cluster.await_idle()


def told(cluster: Cluster, words: str, user: str = "usera") -> list[dict[str, Any]]:
    done = cluster.run(f"srun -Q {words}", user, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


def test_parts_share_one_network(het: Cluster) -> None:
    """A service of one part is found by name from the other, and from a node of its own part."""
    with serving(het) as (leader, _):
        for part, node in enumerate(("n3", "n2")):
            step = f"--jobid={leader} --het-group={part} --overlap -N1 -n1 -w {node}"
            answers = told(het, f"{step} {TOOLS} {PEER} ask 7777 n1")
            assert [row.get("text") for row in answers] == ["here"]
        # The same in every part: its nodes in the order of the parts, under the number of the leader.
        shown = told(het, f"--jobid={leader} --het-group=0 --overlap -N1 -n1 {TOOLS} {PEER} resolve n3 n1 n2")
        assert [row["addresses"] for row in shown] == [
            [f"10.77.0.{place}", f"fd65:6e63:6c6f::{names.job_vni(int(leader)):x}:0:{place}"] for place in (1, 2, 3)
        ]


def test_nobody_else_is_in_it(het: Cluster) -> None:
    """Neither another user's job nor another one of the same user, on the same nodes; names are not forged."""
    with serving(het) as (leader, _):
        forged = f"env SLURM_HET_JOB_ID={leader} SLURM_JOB_ID_HET_GROUP_0={leader} srun -Q --export=ALL"
        ask = f"-N2 -n2 -w n1,n2 {TOOLS} {PEER} ask 7777 n1 10.77.0.2 10.90.0.2"
        for user, command in (("userb", "srun -Q"), ("usera", "srun -Q"), ("usera", forged)):
            done = het.run(f"{command} {ask}", user, timeout=60)
            rows = [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]
            assert len(rows) == 6 and [row for row in rows if "text" in row] == [], done.stdout


def test_a_network_of_parts_outlives_the_agent(het: Cluster) -> None:
    """Adopted by an agent after this one, it still has the nodes of all parts; at the end of the job it is gone."""
    with serving(het) as (leader, _):
        for node in ("n1", "n3"):
            het.restart_agent(node, 9)
        answers = told(het, f"--jobid={leader} --het-group=0 --overlap -N1 -n1 {TOOLS} {PEER} ask 7777 n1 n2")
        assert [row.get("text") for row in answers] == ["here", None]
    for node in het.nodes:
        shown = het.run(["sh", "-c", "ip -o link show type vxlan; nft list table inet enclos"], node=node).stdout
        assert "peers4" in shown and "elements" not in shown
        assert set(re.findall(r"^\d+: ([^:@]+)", shown, re.MULTILINE)) == set(names.HOLDER_NAMES.values())


def test_parts_without_slurmctlds_word_have_no_network(het: Cluster) -> None:
    """Not even their own: a container on another network than it asked for would be worse."""
    script = f"srun --het-group=0 -Q {IMAGE} --container-network=job true"
    hide = ["sh", "-c", "mount --bind /bin/false $(command -v squeue)"]
    assert het.run(hide, node="n1").returncode == 0
    try:
        done = het.run(["salloc", "-Q", "-wn1", ":", "-wn2", "bash", "-c", script], "usera", timeout=60)
    finally:
        het.run(["sh", "-c", "umount $(command -v squeue)"], node="n1")
    assert done.returncode == 1
    line = "the nodes of the parts of heterogeneous job"
    assert any(f"enclos: --container-network=job: {line}" in row for row in done.stderr.splitlines()), done.stderr


def test_mpi_runs_across_parts_on_their_network(het: Cluster) -> None:
    listed = het.run("srun --mpi=list")
    if "pmix" not in listed.stdout + listed.stderr:
        pytest.skip("this Slurm is built without PMIx")
    part = f"-N1 -n1 --mpi=pmix {IMAGE} --container-network=job ring"
    done = het.run(f"srun -Q {part} : {part}", "usera", timeout=60)
    assert "ring of 2" in done.stdout, done.stderr


# -- Slurm's own ------------------------------------------------------------------------------------------


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
    # UCX of Debian 12 hangs in MPI_Finalize now and then, also without containers; not over TCP alone.
    ring = het.run(f"UCX_TLS=tcp,self srun -n1 --mpi=pmix {IMAGE} ring : -n1 --mpi=pmix {IMAGE} ring", "usera")
    assert "ring of 2" in ring.stdout, ring.stderr


def test_exit_status_of_a_het_step_is_that_of_the_failed_part(het: Cluster) -> None:
    done = het.run(f"srun -n1 {IMAGE} true : -n1 {IMAGE} sh -c 'exit 9'", "usera")
    assert done.returncode == 9
    failed = het.run(f"srun -n1 {IMAGE} true : -n1 --container-image=/images/none true", "usera")
    assert failed.returncode == 1
    assert "enclos: --container-image=/images/none: image not found on n" in failed.stderr
