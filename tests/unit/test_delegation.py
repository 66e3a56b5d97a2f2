"""What a user has made below a task's cgroup is removed, whatever it is. Plain directories stand for cgroups here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from enclos.runtime import cgroup, delegation
from enclos.runtime.steps import Step


def deepen(top: Path, levels: int) -> None:
    """Longer than a path can be: one level at a time."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("far", dir_fd=fd)
        below = os.open("far", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_everything_below_goes(tmp_path: Path) -> None:
    top = tmp_path / "task_0"
    for number in range(300):
        (top / f"{number}/a/b").mkdir(parents=True)
    deepen(top, 3000)
    deepen(top / "7/a", 1200)
    assert delegation._remove_below(str(top))
    assert os.listdir(tmp_path) == ["task_0"] and os.listdir(top) == []


def test_what_is_gone_is_fine_and_what_cannot_go_is_said(tmp_path: Path) -> None:
    assert delegation._remove_below(str(tmp_path / "gone"))
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/c/d").mkdir(parents=True)
    (tmp_path / "top/a/b/file").touch()  # As a process in a cgroup: it cannot be removed now.
    assert not delegation._remove_below(str(tmp_path / "top"))
    assert [path.name for path in (tmp_path / "top").iterdir()] == ["a"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other/kept").mkdir(parents=True)
    (tmp_path / "top").mkdir()
    (tmp_path / "top/link").symlink_to(tmp_path / "other")
    delegation._remove_below(str(tmp_path / "top"))
    assert (tmp_path / "other/kept").is_dir()


def test_the_same_step_of_a_requeued_job_is_left_alone(tmp_path: Path) -> None:
    """Its cgroup has the path of the one before; an agent that was away meanwhile cleans up behind that one only."""
    directory = tmp_path / "job_1/step_0/user"
    directory.mkdir(parents=True)
    record: dict[str, Any] = {"cgroup": str(directory), "cgroup_id": cgroup.ident(str(directory))}
    step = Step(None, record, -1)  # type: ignore[arg-type]
    assert step._cgroup() == str(directory)
    (tmp_path / "job_1/step_0/another").mkdir()  # So that the number is not given again.
    directory.rmdir()
    assert step._cgroup() == ""
    (tmp_path / "job_1/step_0/another").rename(directory)
    assert step._cgroup() == ""
