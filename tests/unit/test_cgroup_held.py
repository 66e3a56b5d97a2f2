"""What holds a command in its cgroup holds its run as well, though that is in another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from enclos.runtime import cgroup, limits


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's slice with limits, and a cgroup of ours beside it without any."""
    monkeypatch.setattr(cgroup, "MOUNT_POINT", str(tmp_path))
    files = {"memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "cpu.max": "max 100000"}
    for name in ("user.slice/user-7.slice/session.scope", "enclos/run"):
        directory = tmp_path
        for part in name.split("/"):
            directory = directory / part
            directory.mkdir()
            for file, text in files.items():
                (directory / file).write_text(text)
            (directory / "cgroup.controllers").write_text("memory pids cpu cpuset")
    (tmp_path / "user.slice/user-7.slice/memory.max").write_text(str(4 << 30))
    (tmp_path / "user.slice/user-7.slice/pids.max").write_text("300")
    (tmp_path / "user.slice/cpu.max").write_text("150000 100000")
    (tmp_path / "cpuset.cpus.effective").write_text("0-7")
    (tmp_path / "user.slice/user-7.slice/session.scope/cpuset.cpus.effective").write_text("0-3")
    (tmp_path / "enclos/run/cpuset.cpus").write_text("")
    return tmp_path


SESSION = "user.slice/user-7.slice/session.scope"


def test_what_holds_there_is_set_here(tree: Path) -> None:
    held = cgroup.held(str(tree / SESSION))
    cgroup.tighten(str(tree / "enclos/run"), limits.parse("pids=100"), held, str(tree / SESSION))
    found = {name: (tree / "enclos/run" / name).read_text() for name in ("memory.max", "pids.max", "cpu.max")}
    assert found == {"memory.max": str(4 << 30), "pids.max": "100", "cpu.max": "150000 100000"}
    assert (tree / "enclos/run/cpuset.cpus").read_text() == "0-3"


def test_more_than_there_is_refused(tree: Path) -> None:
    with pytest.raises(cgroup.Refused) as caught:
        cgroup.tighten(str(tree / "enclos/run"), limits.parse("memory=5G"), [], str(tree / SESSION))
    assert (caught.value.kind, caught.value.detail) == ("above", "4G")


def test_a_process_without_version_2_is_nowhere(tree: Path) -> None:
    assert cgroup.place_of(1) == ""
