"""The page of MPI libraries: what it is made of, read back, and compared with a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from enclos.runtime.cluster import mpi_images, mpi_matrix, releases
from enclos.runtime.cluster.mpi_matrix import Outcome, Row, Section

PAGE = (Path(__file__).resolve().parents[2] / "docs/mpi-matrix.md").read_text()
ROWS = (
    Row("trixie", "openmpi", "OpenMPI 5.0.7 with PMIx 5.0.7", ("works", "alone")),
    Row("sid", "mpich", "MPICH 5.0.2", ("fails", "works")),
)
SECTION = Section("22.05", "4.2.2", ROWS)


@pytest.mark.parametrize(
    ("status", "shown", "result"),
    [
        (0, "0: rank 0\n0: ring of 2: 3 rounds in 0.1 s, all data right\n", "works"),
        (0, "1: modex of 2: all data right\n", "works"),
        (0, "0: ring of 1: 3 rounds, all data right\n1: ring of 1: 3 rounds, all data right\n", "alone"),
        (1, "0: ring of 2: 3 rounds, all data right\n", "fails"),
        (0, "", "fails"),
    ],
)
def test_what_became_of_two_ranks(status: int, shown: str, result: str) -> None:
    assert mpi_matrix.judge(status, shown) == result


def test_the_first_line_of_each_task() -> None:
    shown = "srun: job 1 queued\n1: enclos: a\n0: Abort\n1: Abort\n0: enclos: b\nsrun: error: n1: task 0: Killed\n"
    assert Outcome("fails", shown).first_words() == ["enclos: a", "Abort"]


def test_the_page_in_the_docs_is_as_the_command_writes_it() -> None:
    sections = mpi_matrix.read(PAGE)
    assert list(sections) == list(releases.SUITES)
    assert mpi_matrix.page(sections.values()) == PAGE
    for section in sections.values():
        cells = [(row.suite, row.mpi, len(row.results)) for row in section.rows]
        width = len(mpi_matrix.LAUNCHERS)
        assert cells == [(s, library, width) for s in releases.SUITES.values() for library in mpi_images.LIBRARIES]


def test_another_result_is_wrong_where_the_versions_are_the_pages() -> None:
    assert mpi_matrix.differences(SECTION, SECTION, "sid") == ([], [])
    seen = replace(SECTION, rows=(ROWS[0], replace(ROWS[1], results=("alone", "works"))))
    assert mpi_matrix.differences(SECTION, seen, "trixie") == ([], [])
    wrong, moved = mpi_matrix.differences(SECTION, seen, "sid")
    assert moved == []
    assert wrong == [
        "Slurm 22.05: the page has | sid: MPICH 5.0.2 | fails | works |\n"
        "but the run gave | sid: MPICH 5.0.2 | alone | works |\n"
    ]


@pytest.mark.parametrize(
    "seen",
    [
        replace(SECTION, rows=(replace(ROWS[1], versions="MPICH 5.1.0", results=("works", "works")),)),
        replace(SECTION, pmix="6.0.0", rows=(replace(ROWS[1], results=("works", "works")),)),
        replace(SECTION, rows=(Row("sid", "pmix", "PMIx 7.0.0 without MPI", ("works", "not tried")),)),
    ],
)
def test_other_versions_are_told_and_nothing_is_wrong(seen: Section) -> None:
    wrong, moved = mpi_matrix.differences(SECTION, seen, "sid")
    assert (wrong, len(moved)) == ([], 1)
    assert seen.rows[0].versions in moved[0]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("openmpi-bin 6.0.0~rc2-2", {"openmpi": "6.0.0~rc2"}),
        ("libmpich12 4.3.0+really4.2.1-1", {"mpich": "4.2.1"}),
        ("libpmix2t64 7.0.0~rc1-2+b1", {"pmix": "7.0.0~rc1"}),
        ("libpmix2 ", {}),
        ("gcc 12.2.0-3", {}),
    ],
)
def test_versions_are_upstreams(row: str, found: dict[str, str]) -> None:
    assert mpi_images.read_versions(f"{row}\n") == found
