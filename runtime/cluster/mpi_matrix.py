"""Which MPI of which image works on which Slurm: run it, and write what came out (docs/mpi-matrix.md).

Images are Debian releases with their own OpenMPI and MPICH; nodes are trial clusters of each Slurm release. Each cell
is a program of two ranks on two nodes, in containers on a job's network. Runs as root; takes minutes.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster import releases
from enclos.runtime.cluster.cluster import Cluster, ClusterError
from enclos.runtime.cluster.image import RING_SOURCE

PACKAGES = ["gcc", "libc6-dev", "libmpich-dev", "libopenmpi-dev", "mpich", "openmpi-bin"]
LIBRARIES = ["openmpi", "mpich"]
LAUNCHERS = ["pmix", "pmi2"]
LEFT_OUT = ["proc/*", "sys/*", "dev/*", "usr/include", "usr/lib/gcc*", "usr/libexec/gcc*", "var/cache/*"]
VERSIONS = "dpkg-query -W -f '${Package} ${Version}\\n' openmpi-bin mpich libpmix2 libpmix2t64 2> /dev/null"
STEP_SECONDS = 60
HEAD = """\
# MPI in images, by Slurm release

```
enclos-cluster mpi-matrix docs/mpi-matrix.md     # as root, from a checkout: makes this page again, in some minutes
```

This page is made by that command. Each cell is a program of two ranks on two nodes, in containers of that image on a
network of the job, started by `srun --mpi=`. *alone* means that each rank believes to be the only one: the program
runs, and is wrong. Slurm itself refuses a launcher that it is built without ("Invalid MPI type").
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: on which Slurm, from which image, which library, how started, and what came out."""

    slurm: str
    suite: str
    mpi: str
    launcher: str
    result: str


def write(path: Path, name: str) -> None:
    """Run everything and write the page; `name` is that of the clusters, one after the other."""
    suites = list(releases.SUITES.values())
    images = {suite: image(suite) for suite in suites}
    cells: list[Cell] = []
    hosts: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for slurm in releases.SUITES:
        Cluster.remove(name)
        cluster = Cluster.up(name, 2, release=slurm)
        try:
            for suite, file in images.items():
                shutil.copy(file, cluster.layout.images / f"{suite}.sqsh")
                inside = f"srun -N1 --container-image=/images/{suite}.sqsh sh -c {shlex.quote(VERSIONS)}"
                versions[suite] = _versions(cluster.run(inside, "usera").stdout)
            has_pmix = "pmix" in _launchers(cluster)
            hosts[slurm] = _versions(cluster.run(VERSIONS, node="n1").stdout).get("pmix", "") if has_pmix else ""
            cells += _run(cluster, slurm, suites)
        finally:
            cluster.down()
    path.write_text(page(cells, hosts, versions))


def image(suite: str) -> Path:
    """A squashfs file of that Debian with both libraries and a compiled program for each; made once."""
    digest = hashlib.sha256(repr((PACKAGES, LEFT_OUT)).encode() + RING_SOURCE.read_bytes()).hexdigest()[:12]
    made = releases.cache() / f"mpi-{suite}-{digest}.sqsh"
    made.parent.mkdir(parents=True, exist_ok=True)
    with releases.locked(made.with_suffix(".lock")):
        if not made.exists():
            root = made.with_suffix(".root")
            releases.debootstrap(suite, root, PACKAGES)
            shutil.copy(RING_SOURCE, root / "root/ring.c")
            for library in LIBRARIES:
                compiler = ["chroot", str(root), f"mpicc.{library}", "-O2", "-o", f"/usr/bin/ring-{library}"]
                _tool([*compiler, "/root/ring.c"])
            fresh = made.with_suffix(".new")
            pack = ["mksquashfs", str(root), str(fresh), "-comp", "zstd", "-Xcompression-level", "3", "-noappend"]
            _tool([*pack, "-quiet", "-no-progress", "-wildcards", "-e", *LEFT_OUT])
            shutil.rmtree(root)
            fresh.rename(made)
    return made


def _run(cluster: Cluster, slurm: str, suites: list[str]) -> Iterator[Cell]:
    known = _launchers(cluster)
    for suite in suites:
        for library in LIBRARIES:
            for launcher in LAUNCHERS:
                result = _step(cluster, suite, library, launcher) if launcher in known else "not in this Slurm"
                yield Cell(slurm, suite, library, launcher, result)


def _launchers(cluster: Cluster) -> str:
    listed = cluster.run("srun --mpi=list")
    return listed.stdout + listed.stderr


def _step(cluster: Cluster, suite: str, library: str, launcher: str) -> str:
    options = f"--mpi={launcher} --kill-on-bad-exit=1 --container-image=/images/{suite}.sqsh --container-network=job"
    # UCX of Debian 12 hangs in MPI_Finalize now and then, also without containers; not over TCP alone.
    command = f"UCX_TLS=tcp,self srun -N2 -n2 {options} ring-{library} --rounds 3"
    try:
        done = cluster.run(command, "usera", timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        cluster.run("scancel -u usera")
        return "hangs"
    finally:
        cluster.await_idle()
    return judge(done.returncode, done.stdout)


def judge(status: int, shown: str) -> str:
    """What became of two ranks: they met, each ran for itself, or the program failed."""
    rings = re.findall(r"^ring of (\d+): .*all data right$", shown, re.MULTILINE)
    if status == 0 and rings == ["2"]:
        return "works"
    return "alone" if rings == ["1", "1"] else "fails"


def _versions(shown: str) -> dict[str, str]:
    """Upstream's versions by short names: openmpi, mpich, pmix."""
    names = {"openmpi-bin": "openmpi", "mpich": "mpich", "libpmix2": "pmix", "libpmix2t64": "pmix"}
    found = {}
    for row in shown.splitlines():
        package, _, version = row.partition(" ")
        if package in names and version:
            # Debian writes 4.3.0+really4.2.1-1 where it went back.
            upstream = version.rpartition("+really")[2].partition("+")[0]
            found[names[package]] = upstream.rpartition("-")[0] or upstream
    return found


def page(cells: list[Cell], hosts: dict[str, str], versions: dict[str, dict[str, str]]) -> str:
    """The page: a table per library, images down, releases and launchers across."""
    columns = [(slurm, launcher) for slurm in hosts for launcher in LAUNCHERS]
    found = {(cell.slurm, cell.suite, cell.mpi, cell.launcher): cell.result for cell in cells}
    parts = [HEAD]
    for library, title in (("openmpi", "OpenMPI"), ("mpich", "MPICH")):
        names = [f"{slurm} (PMIx {hosts[slurm] or 'none'}), {launcher}" for slurm, launcher in columns]
        parts.append(f"\n## {title}\n\n| image | {' | '.join(names)} |\n|---|{'---|' * len(columns)}\n")
        for suite, has in versions.items():
            row = [found[slurm, suite, library, launcher] for slurm, launcher in columns]
            pmix = f", PMIx {has.get('pmix', 'none')}" if library == "openmpi" else ""
            parts.append(f"| {suite}: {title} {has.get(library, '?')}{pmix} | {' | '.join(row)} |\n")
    return "".join(parts)


def _tool(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-2000:]}")
