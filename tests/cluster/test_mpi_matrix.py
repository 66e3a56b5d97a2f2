"""docs/mpi-matrix.md is true: each MPI library of each Debian in an image, started by each launcher of this Slurm.

What came out is in build/mpi-matrix-RELEASE.md, in the page's own form.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Run
from enclos.runtime.cluster import mpi_images, mpi_matrix, releases
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.mpi_matrix import LAUNCHERS, SUITS, Outcomes, Section

pytestmark = pytest.mark.releases

ROOT = Path(__file__).resolve().parents[2]
UNSTABLE = "sid"
OURS = re.compile(r"enclos: \S+ is linked with (\w+), which --mpi=(\w+) possibly does not start; use --mpi=(\w+)")
REWRITE = f"if that is how it is now, run `{mpi_matrix.COMMAND}`, which writes the page anew"


@dataclass(frozen=True, slots=True)
class Matrix:
    """What the page says of this release, what came out, and why an image is not there."""

    page: Section
    seen: Section
    outcomes: Outcomes
    missing: dict[str, str]

    def require(self, suite: str) -> None:
        """Only unstable may be uninstallable; then its rows are not tested, and the run's end says so."""
        if suite in self.missing:
            text = f"MPI OF DEBIAN'S {suite.upper()} WAS NOT TESTED: {self.missing[suite]}"
            if suite == UNSTABLE:
                pytest.skip(text)
            pytest.fail(text)


@pytest.fixture(scope="module")
def matrix(cluster: Cluster, release: str) -> Matrix:
    """All cells of this release, run once."""
    page = mpi_matrix.read((ROOT / "docs/mpi-matrix.md").read_text())[release]
    made = mpi_images.make_all()
    images = [image for image in made.values() if not isinstance(image, Exception)]
    missing = {suite: str(image) for suite, image in made.items() if isinstance(image, Exception)}
    cluster.await_idle()
    outcomes = mpi_matrix.run(cluster, images)
    cluster.await_idle()
    seen = mpi_matrix.section(cluster, images, outcomes)
    notes = [f"{suite} could not be made: {text}\n" for suite, text in missing.items()]
    for suite in releases.SUITES.values():
        notes += mpi_matrix.differences(page, seen, suite)[1]
    (ROOT / f"build/mpi-matrix-{release}.md").write_text("\n".join([seen.text().lstrip(), *notes]))
    return Matrix(page, seen, outcomes, missing)


@pytest.mark.parametrize("suite", releases.SUITES.values())
def test_the_page_says_what_comes_out(matrix: Matrix, suite: str) -> None:
    matrix.require(suite)
    wrong, moved = mpi_matrix.differences(matrix.page, matrix.seen, suite)
    hung = [cell for cell, outcome in matrix.outcomes.items() if cell[0] == suite and outcome.hung]
    for text in [*moved, *(f"{cell} hung at its first attempt" for cell in hung)]:
        warnings.warn(f"docs/mpi-matrix.md: {text}", stacklevel=1)
    assert not wrong, "".join(wrong) + REWRITE


@pytest.mark.parametrize("suite", releases.SUITES.values())
@pytest.mark.parametrize("library", mpi_images.LIBRARIES)
def test_what_cannot_work_is_said_before_mpi_says_anything(matrix: Matrix, suite: str, library: str) -> None:
    """By one task of each node, the only one there; and nothing is said where library and launcher suit each other."""
    matrix.require(suite)
    for launcher in LAUNCHERS:
        outcome = matrix.outcomes.get((suite, library, launcher))
        if outcome is None or outcome.result == mpi_matrix.NO_LAUNCHER:
            continue
        if launcher == SUITS[library]:
            assert not OURS.search(outcome.shown), outcome.shown
            continue
        assert outcome.result in ("alone", "fails"), outcome
        said = [OURS.fullmatch(words) for words in outcome.first_words()]
        expected = (mpi_matrix.TITLES[library], launcher, SUITS[library])
        assert [match.groups() if match else None for match in said] == [expected] * 2, outcome.shown


def test_a_launcher_is_either_run_or_refused_by_slurm(matrix: Matrix, usera: Run) -> None:
    """What is not in the table because Slurm has no such launcher: srun says so itself."""
    for launcher in LAUNCHERS:
        results = {outcome.result for cell, outcome in matrix.outcomes.items() if cell[2] == launcher}
        done = usera(f"srun --mpi={launcher} true")
        if mpi_matrix.NO_LAUNCHER in results:
            assert results == {mpi_matrix.NO_LAUNCHER}
            assert done.returncode != 0 and "Invalid MPI type" in done.stderr, done.stderr
        else:
            assert done.returncode == 0, done.stderr
