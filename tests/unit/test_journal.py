"""Records are whole or not there, and a damaged one stops nobody."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest
from enclos.runtime import errors
from enclos.runtime.journal import Journal


def test_a_record_is_read_back_by_another_agent(tmp_path: Path) -> None:
    Journal(str(tmp_path)).write("job.7", {"vni": 8, "addresses": ["10.0.0.1"]})
    assert list(Journal(str(tmp_path)).read("job")) == [("job.7", {"vni": 8, "addresses": ["10.0.0.1"]})]


def test_a_record_is_replaced_and_removed(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write("step.7.0", {"state": "building"})
    journal.write("step.7.0", {"state": "running"})
    assert list(journal.read("step")) == [("step.7.0", {"state": "running"})]
    journal.remove("step.7.0")
    journal.remove("step.7.0")
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_apart(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write("job.1", {})
    journal.write("step.1.0", {})
    assert [name for name, _ in journal.read("job")] == ["job.1"]


@pytest.mark.parametrize("content", ["", "{", "[]", "nonsense"])
def test_a_damaged_record_is_removed_with_a_warning(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(str(tmp_path))
    (tmp_path / "job.1").write_text(content)
    journal.write("job.2", {"vni": 3})
    with caplog.at_level(logging.WARNING):
        assert list(journal.read("job")) == [("job.2", {"vni": 3})]
    assert "job.1 is damaged" in caplog.text
    assert not (tmp_path / "job.1").exists()


def test_a_half_written_record_is_not_read(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    (tmp_path / "job.1.new").write_text('{"vni"')
    assert list(journal.read("job")) == []


def test_a_half_written_record_is_gone_after_a_restart(tmp_path: Path) -> None:
    (tmp_path / "job.1.new").write_text('{"vni"')
    Journal(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_record_is_ignored(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    (tmp_path / "job.1").mkdir()
    journal.write("job.2", {"vni": 3})
    assert list(journal.read("job")) == [("job.2", {"vni": 3})]


def test_no_space_is_an_error_in_words_and_keeps_the_old_record(tmp_path: Path) -> None:
    """A record of a step's end must not be lost either: what was there is still readable."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("needs root")
    try:
        journal = Journal(str(mount))
        journal.write("job.1", {"vni": 3})
        (mount / "filler").write_bytes(b"x" * (64 * 1024 - 4096))
        with pytest.raises(errors.EnclosError, match=r"cannot write its records .no space left on device"):
            journal.write("job.1", {"vni": 4})
        assert list(journal.read("job")) == [("job.1", {"vni": 3})]
        assert sorted(path.name for path in mount.iterdir()) == ["filler", "job.1"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_only_root_may_look(tmp_path: Path) -> None:
    Journal(str(tmp_path / "journal"))
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
