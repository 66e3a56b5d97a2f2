"""What all tests on a real Slurm share: one cluster for the session, its images, and a count of what is left behind.

A test that stops daemons, fills nodes or needs other settings makes a cluster of its own with `make_cluster`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import fabric
import pytest
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.layout import Layout
from enclos.runtime.cluster.leftovers import Snapshot, await_same, snapshot
from enclos.runtime.cluster.releases import own_slurm
from faults import await_spares, spare, zygote
from patience import PATIENCE as PATIENCE
from vm import cards, verbs

# Two processors are what a guest has, and memory is what its jobs ask for.
LIMITED_SLURM = "SelectTypeParameters=CR_CPU_Memory\nDefMemPerCPU=100\nJobAcctGatherType=jobacct_gather/cgroup\n"
LIMITED_CGROUPS = "ConstrainRAMSpace=yes\nConstrainCores=yes\n"

# Output of commands stays in a buffer until their end, as at users'; some machines' environment says otherwise.
os.environ.pop("PYTHONUNBUFFERED", None)

Result = subprocess.CompletedProcess[str]


class Run(Protocol):
    """Cluster.run with the user filled in."""

    def __call__(self, words: str | list[str], node: str | None = None, *, timeout: float = 60) -> Result: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slurm`: on which release the clusters of these tests run."""
    parser.addoption("--slurm", default="", metavar="RELEASE", help="Slurm of the trial clusters (default: own)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test below this folder needs the cluster."""
    for item in items:
        if "tests/cluster" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def release(pytestconfig: pytest.Config) -> str:
    """Which Slurm the clusters run, as `24.11`."""
    return pytestconfig.getoption("--slurm") or own_slurm()


@pytest.fixture(scope="session")
def make_cluster(release: str) -> Iterator[Callable[..., Cluster]]:
    """Make clusters of a test's own; they are taken down at the end of the session, or earlier by the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made: list[str] = []

    def make(nodes: int = 2, **options: str | int) -> Cluster:
        name = f"test-{os.getpid()}-{len(made)}"
        made.append(name)
        return Cluster.up(name, nodes, release=release, **options)  # type: ignore[arg-type]

    yield make
    for name in made:
        _keep_logs(name)
        Cluster.remove(name)


def _keep_logs(name: str) -> None:
    """Copy a cluster's logs where they outlive it, if somebody wants them."""
    wanted = os.environ.get("ENCLOS_TEST_LOGS")
    if wanted and Layout(name).logs.is_dir():
        shutil.copytree(Layout(name).logs, Path(wanted) / name, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Four nodes for the whole session."""
    return make_cluster(4)


@pytest.fixture(scope="session")
def pmix(cluster: Cluster) -> None:
    """Slurm has its PMIx plugin."""
    require_pmix(cluster)


def require_pmix(cluster: Cluster) -> None:
    """Debian builds 26.05 without (its changelog: "Remove pmix")."""
    listed = cluster.run("srun --mpi=list")
    if "pmix" not in listed.stdout + listed.stderr:
        pytest.skip("this Slurm is built without PMIx")


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """Path, on every machine of the cluster, of the squashfs image with the OpenMPI program `ring`; root's file."""
    images.install(cluster.layout.images)
    return "/images/openmpi.sqsh"


@pytest.fixture(scope="session")
def image_directory(image: str) -> str:
    """The same image as a folder."""
    return image.removesuffix(".sqsh")


@pytest.fixture(scope="session")
def mpich_image(cluster: Cluster) -> str:
    """The image with the MPICH program `ring`.

    One rank a node: with more, MPICH 4.0 over UCX often hangs in MPI_Finalize, also outside containers.
    """
    images.install(cluster.layout.images, "mpich")
    return "/images/mpich.sqsh"


@pytest.fixture(scope="session")
def box(cluster: Cluster, image: str) -> Path:
    """An image with everything odd in it, as a folder and as a file: both root's."""
    from boxes import make_box

    return make_box(cluster.layout.images)


@pytest.fixture(scope="session")
def shared(cluster: Cluster) -> Path:
    """Files that are mounted, in the folder that is everybody's to write."""
    from boxes import fill_shared

    return fill_shared(cluster.layout.shared)


def _run_as(cluster: Cluster, user: str) -> Run:
    def run(words: str | list[str], node: str | None = None, *, timeout: float = 60) -> Result:
        return cluster.run(words, user=user, node=node, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def usera(cluster: Cluster) -> Run:
    """Run something as usera: on the submit host, or on a node."""
    return _run_as(cluster, "usera")


@pytest.fixture(scope="session")
def userb(cluster: Cluster) -> Run:
    """Run something as userb, who is in another Slurm account."""
    return _run_as(cluster, "userb")


@pytest.fixture
def idle(cluster: Cluster) -> Cluster:
    """The cluster with no job running or completing, so that a step on all nodes starts at once."""
    cluster.await_idle()
    return cluster


class Leftovers:
    """Compare what exists on the nodes now with what was there when this was made."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        await_spares(cluster)
        self.before: Snapshot = snapshot(cluster)

    def rows(self, timeout: float = 10, *, exact: bool = True) -> list[str]:
        """What came or went, waiting up to `timeout` seconds for all to be as before (see `await_same`)."""
        return await_same(self.cluster, self.before, timeout, exact=exact)


@pytest.fixture
def leftovers(idle: Cluster, image: str) -> Leftovers:
    """A count taken now, with the image in use before: an image stays mounted for a while by design."""
    warm = idle.run(["srun", f"-N{len(idle.nodes)}", f"--container-image={image}", "true"], user="usera", timeout=60)
    if warm.returncode != 0:
        pytest.fail(f"cannot run in a container: {warm.stderr}")
    idle.await_idle()
    return Leftovers(idle)


@pytest.fixture(scope="session")
def fragile(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes whose processes a test may kill.

    An image is unmounted as soon as nobody uses it, so that each step mounts one, and a count afterwards is exact.
    """
    made = make_cluster(2, config=FRAGILE)
    images.install(made.layout.images)
    return made


FRAGILE = f"images:\n  idle_seconds: 0\nstep:\n  build_deadline_seconds: {6 * PATIENCE}\n"


@pytest.fixture(scope="module", params=["fresh", "spare"])
def origin(fragile: Cluster, request: pytest.FixtureRequest) -> Iterator[Callable[[], Sequence[int]]]:
    """The processes to follow to meet the next builder on the first node: both ways in which one may come to be.

    A fresh one is forked for its step, by the zygote; a spare one has been forked before and waits.
    """
    if request.param == "spare":

        def follow() -> Sequence[int]:
            try:
                waiting = spare(fragile, "n1", timeout=1)
            except TimeoutError:  # A test has killed it; another is forked when a step has ended.
                fragile.run("srun -w n1 --container-image=/images/openmpi.sqsh true", user="usera")
                waiting = spare(fragile, "n1")
            return zygote(fragile, "n1"), waiting

        yield follow
        return
    path = fragile.layout.node_etc("n1") / "enclos.yaml"
    path.write_text(f"{FRAGILE}  spare_builder: false\n")
    fragile.restart_agent("n1")
    yield lambda: [zygote(fragile, "n1")]
    path.write_text(FRAGILE)
    fragile.restart_agent("n1")


@pytest.fixture
def clean(fragile: Cluster) -> Iterator[Leftovers]:
    """A count on the fragile cluster, taken now; all agents run, before the test and after it."""
    for node in fragile.nodes:
        fragile.start_agent(node)
    fragile.await_idle()
    # The agent keeps a user namespace for each user's idmapped mounts, from his first step on.
    first = ["srun", "-N2", "--container-image=/images/openmpi.sqsh", "--container-network=job", "true"]
    assert (done := fragile.run(first, user="usera")).returncode == 0, done.stderr
    fragile.await_idle()
    yield Leftovers(fragile)
    for node in fragile.nodes:
        fragile.start_agent(node)
    fragile.run("scancel --user=usera; scancel --user=userb")
    fragile.await_idle()
    assert set(fragile.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) == {"idle"}


def plain(row: str) -> str:
    """A line of an error without what Slurm puts before it: the program, or slurmstepd's clock (from 26.05 on)."""
    return re.sub(r"^((srun|sbatch|salloc|slurmstepd\S*):|\[\S+\]) error: ", "", row)


@pytest.fixture(scope="session")
def limited(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes of two processors, on which Slurm constrains memory and processors by cgroups: guests have that."""
    require_cgroup2()
    made = make_cluster(2, cpus=2, slurm_conf_extra=LIMITED_SLURM, cgroup_conf_extra=LIMITED_CGROUPS)
    images.install(made.layout.images)
    return made


@pytest.fixture
def limited_leftovers(limited: Cluster) -> Leftovers:
    """A count on that cluster, when no job runs and the image is mounted already."""
    warm = ["srun", "-N2", "--container-image=/images/openmpi.sqsh", "true"]
    assert (done := limited.run(warm, user="usera", timeout=200)).returncode == 0, done.stderr
    limited.await_idle(60)
    await_calm(limited)
    return Leftovers(limited)


def await_calm(cluster: Cluster) -> None:
    """Wait until nothing comes or goes: a job is over for squeue while slurmstepd cleans up, for seconds in a guest."""
    deadline = time.monotonic() + 60
    calm_since, before = time.monotonic(), snapshot(cluster)
    while time.monotonic() < min(calm_since + 3, deadline):
        time.sleep(0.2)
        if before.differences(now := snapshot(cluster)):
            calm_since, before = time.monotonic(), now


EXCLUSIVE = """\
rdma:
  devices: ["rx*"]
  hook: /etc/enclos/hook
images:
  idle_seconds: 0
"""


@pytest.fixture(scope="session")
def exclusive(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes with two RDMA cards each, which move between namespaces: one kind of guest has that."""
    cards.require()
    made = make_cluster(2, config=EXCLUSIVE, cpus=4)
    fabric.plug_into(made)
    verbs.install(made.layout.images)
    return made


def require_cgroup2() -> None:
    """Skip where the kernel has no cgroup v2 controllers; fail where the run says that it has them."""
    if cgroups.available():
        return
    if "cgroup2" in os.environ.get("ENCLOS_REQUIRE", ""):
        pytest.fail("this kernel has no cgroup v2 controllers")
    pytest.skip("needs cgroup v2 controllers: `make test-vm` runs it in a guest")


def said(text: str) -> list[str]:
    """The lines that a user has to read: without srun's notices that a job waits for another to complete."""
    notices = ("queued and waiting for resources", "has been allocated resources")
    return [line for line in text.splitlines() if not line.endswith(notices)]
