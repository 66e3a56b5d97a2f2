"""Which MPI of which image works on which Slurm: run it, and write what came out (docs/mpi-matrix.md).

Images are Debian releases with their own OpenMPI, MPICH and PMIx (mpi_images.py); nodes are trial clusters of each
Slurm release. Each cell is a program of two ranks on two nodes, in containers on a job's network. Runs as root. The
page has a section for each release: `run` makes one, on a cluster that is up; tests compare it with the page's.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from enclos.runtime.cluster import mpi_images, releases
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.mpi_images import LIBRARIES, MpiImage

LAUNCHERS = ("pmix", "pmi2")
# Which launcher suits which library; a program that is linked with it (spank/mpi.c) gets a line under the other one.
SUITS = {"openmpi": "pmix", "mpich": "pmi2", "pmix": "pmix"}
TITLES = {"openmpi": "OpenMPI", "mpich": "MPICH", "pmix": "PMIx"}
NO_LAUNCHER = "not in this Slurm"
NOT_RUN = "not tried"
STEP_SECONDS = 60
# Ranks wait for each other without sleep; four at a time are done in less time on two processors, all the same.
AT_ONCE = 4
COMMAND = "enclos-cluster mpi-matrix docs/mpi-matrix.md"
HEAD = f"""\
# MPI in images, by Slurm release

```
{COMMAND}     # as root, from a checkout: makes this page again, in a minute or some more
```

This page is made by that command, and the tests on each release compare it with what they see. Each cell is a program
of two ranks on two nodes, in containers of that image on a network of the job, started by `srun --mpi=`. *alone* means
that each rank believes to be the only one: the program runs, and is wrong. Where the launcher does not suit OpenMPI or
MPICH (*alone*, *fails*), a line of Enclos' stands before whatever MPI says ("ring is linked with …").

The rows without MPI are a client of PMIx that publishes a number and gets that of the other rank. Debian builds Slurm
26.05 without its PMIx plugin, and what Debian built it from could not be had to add it: nothing is known of PMIx there.
Of unstable's image one line is removed, `btl_tcp_if_include=lo` in /etc/openmpi/openmpi-mca-params.conf: with it no two
nodes meet, in a container or outside ([MPI](user-guide.md#mpi)).
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one step: a word for the page, the stderr of its tasks, and whether an attempt before hung."""

    result: str
    shown: str = ""
    hung: bool = False

    def first_words(self) -> list[str]:
        """The first line that each task wrote to its stderr, as far as they wrote any."""
        first: dict[str, str] = {}
        for task, text in re.findall(r"^(\d+): (.*)$", self.shown, re.MULTILINE):
            first.setdefault(task, text)
        return list(first.values())


@dataclass(frozen=True, slots=True)
class Row:
    """A library of an image, with its versions, and what came of it by launcher."""

    suite: str
    mpi: str
    versions: str
    results: tuple[str, ...]

    def text(self) -> str:
        return f"| {self.suite}: {self.versions} | {' | '.join(self.results)} |\n"


@dataclass(frozen=True, slots=True)
class Section:
    """The page's part for one release of Slurm; `pmix` is the version of its PMIx server, "" without one."""

    slurm: str
    pmix: str
    rows: tuple[Row, ...]

    def text(self) -> str:
        """As it stands in the page."""
        title = f"## Slurm {self.slurm}, {f'PMIx {self.pmix}' if self.pmix else 'no PMIx'}\n"
        names = " | ".join(f"`--mpi={launcher}`" for launcher in LAUNCHERS)
        table = [f"| image | {names} |\n", f"|---|{'---|' * len(LAUNCHERS)}\n", *(row.text() for row in self.rows)]
        return f"\n{title}\n{''.join(table)}"

    def row(self, suite: str, library: str) -> Row | None:
        return next((row for row in self.rows if (row.suite, row.mpi) == (suite, library)), None)


def write(path: Path, name: str) -> None:
    """Run everything and write the page; `name` is that of the clusters, one after the other."""
    images = []
    for made in mpi_images.make_all().values():
        if isinstance(made, Exception):
            raise made
        images.append(made)
    sections = []
    for slurm in releases.SUITES:
        Cluster.remove(name)
        cluster = Cluster.up(name, 2, release=slurm)
        try:
            sections.append(section(cluster, images, run(cluster, images)))
        finally:
            cluster.down()
    path.write_text(page(sections))


def page(sections: Iterable[Section]) -> str:
    """The whole page."""
    return HEAD + "".join(section.text() for section in sections)


def read(text: str) -> dict[str, Section]:
    """The sections of a page, by release."""
    found = {}
    for part in text.split("\n## Slurm ")[1:]:
        title, *rows = part.splitlines()
        slurm, _, pmix = title.partition(", ")
        found[slurm] = Section(slurm, pmix.removeprefix("PMIx ") if pmix != "no PMIx" else "", tuple(_rows(rows)))
    return found


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        match = re.fullmatch(r"\| (\w+): ((\w+) .*?) \| (.*) \|", line)
        if match:
            library = next(library for library in LIBRARIES if TITLES[library] == match[3])
            yield Row(match[1], library, match[2], tuple(cell.strip() for cell in match[4].split("|")))


Outcomes = Mapping[tuple[str, str, str], Outcome]


def section(cluster: Cluster, images: Iterable[MpiImage], outcomes: Outcomes) -> Section:
    """What the page says of a release, from what came out of `run`."""
    rows = []
    for image in images:
        for library in LIBRARIES:
            results = (outcomes.get((image.suite, library, launcher)) for launcher in LAUNCHERS)
            words = tuple(outcome.result if outcome else NOT_RUN for outcome in results)
            rows.append(Row(image.suite, library, _versions(image, library), words))
    return Section(cluster.release, server_version(cluster), tuple(rows))


def _versions(image: MpiImage, library: str) -> str:
    own = f"{TITLES[library]} {image.versions.get(library, '?')}"
    if library == "openmpi":
        return f"{own} with PMIx {image.versions.get('pmix', '?')}"
    return f"{own} without MPI" if library == "pmix" else own


def server_version(cluster: Cluster) -> str:
    """Of the PMIx that the cluster's slurmstepd serves; "" where its Slurm has none."""
    if "pmix" not in launchers(cluster):
        return ""
    command = "dpkg-query -W -f '${Package} ${Version}\\n' libpmix2 libpmix2t64 2> /dev/null"
    return mpi_images.read_versions(cluster.run(command, node="n1").stdout).get("pmix", "?")


def launchers(cluster: Cluster) -> str:
    """What its srun lists."""
    listed = cluster.run("srun --mpi=list")
    return listed.stdout + listed.stderr


def run(cluster: Cluster, images: Iterable[MpiImage]) -> Outcomes:
    """Run each program of each image by each launcher, a few at a time; keys are suite, library, launcher."""
    known = launchers(cluster)
    cells = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for image in images:
            image.install(cluster.layout.images)
            for library in LIBRARIES:
                # PMI-2 means nothing to a client of PMIx.
                for launcher in LAUNCHERS if library != "pmix" else ("pmix",):
                    cell = (image.suite, library, launcher)
                    cells[cell] = pool.submit(_step, cluster, image, library, launcher) if launcher in known else None
    return {cell: future.result() if future else Outcome(NO_LAUNCHER) for cell, future in cells.items()}


def _step(cluster: Cluster, image: MpiImage, library: str, launcher: str) -> Outcome:
    # MPICH of Debian 12 hangs in MPI_Finalize now and then, also without containers; over TCP alone seldom.
    first = _attempt(cluster, image, library, launcher)
    return replace(_attempt(cluster, image, library, launcher), hung=True) if first.result == "hangs" else first


def _attempt(cluster: Cluster, image: MpiImage, library: str, launcher: str) -> Outcome:
    name = f"{image.suite}-{library}-{launcher}"
    # Where both ranks fail by themselves, each is to have its say.
    ends = " --kill-on-bad-exit=1" if launcher == SUITS[library] else ""
    options = f"--label --mpi={launcher}{ends} --container-network=job"
    program = f"{image.programs[library]} --rounds 3" if library != "pmix" else image.programs[library]
    command = f"UCX_TLS=tcp,self srun -J {name} -N2 -n2 {options} --container-image={image.path(library)} {program}"
    try:
        done = cluster.run(command, "usera", timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        cluster.run(f"scancel --name={name}")
        return Outcome("hangs")
    return Outcome(judge(done.returncode, done.stdout), done.stderr)


def judge(status: int, shown: str) -> str:
    """What became of two ranks: they met, each ran for itself, or the program failed."""
    sizes = re.findall(r"^\d+: \w+ of (\d+): .*all data right$", shown, re.MULTILINE)
    if status == 0 and sizes == ["2"]:
        return "works"
    return "alone" if sizes == ["1", "1"] else "fails"


def differences(page: Section, seen: Section, suite: str) -> tuple[list[str], list[str]]:
    """Where a run's rows of one image are not the page's: what is wrong, and what has other versions by now.

    A result is wrong only where the page tells of these very versions: unstable's move.
    """
    wrong, moved = [], []
    for row in (row for row in seen.rows if row.suite == suite):
        known = page.row(suite, row.mpi)
        if known is None or (known.versions, page.pmix) != (row.versions, seen.pmix):
            before = f"{known.versions} under PMIx {page.pmix or 'none'}" if known else "nothing"
            moved.append(f"{suite} has {row.versions} under PMIx {seen.pmix or 'none'} now; the page tells of {before}")
        elif known.results != row.results:
            wrong.append(f"Slurm {seen.slurm}: the page has {known.text()}but the run gave {row.text()}")
    return wrong, moved
