"""Where in a step's cgroup a program that joins later sits."""

from __future__ import annotations

from pathlib import Path

from enclos.runtime import cgroup


def make(place: Path, pids: str = "") -> None:
    place.mkdir()
    (place / "cgroup.procs").write_text(pids)


def test_the_first_tasks(tmp_path: Path) -> None:
    """By number."""
    for name in ("task_10", "task_2", "task_special", "other"):
        make(tmp_path / name, "17\n")
    assert cgroup.place_for_more(str(tmp_path)) == f"{tmp_path}/task_2"


def test_that_of_all_tasks(tmp_path: Path) -> None:
    """Where none has its own; while there are any."""
    make(tmp_path / "task_special", "17\n")
    assert cgroup.place_for_more(str(tmp_path)) == f"{tmp_path}/task_special"
    (tmp_path / "task_special/cgroup.procs").write_text("")
    assert cgroup.place_for_more(str(tmp_path)) is None


def test_nowhere(tmp_path: Path) -> None:
    """When the tasks have ended nobody may come any more: what is there then, nobody would end."""
    assert cgroup.place_for_more(str(tmp_path)) is None
    assert cgroup.place_for_more(str(tmp_path / "gone")) is None


def test_without_one_of_slurms() -> None:
    own = f"{cgroup.OWN_TREE}/step.1.0.77"
    assert (cgroup.place_for_more(own), cgroup.place_for_more("")) == (own, "")
