"""Whom the agent takes for a slurmstepd: by its program and its real uid, on real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from enclos.runtime import errors, stepd

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@contextmanager
def program(path: Path, code: str) -> Iterator[int]:
    """A process of that executable, past `code`; gives its pid."""
    shutil.copy(os.path.realpath(sys.executable), path)
    text = f"import os, sys; {code}; print(flush=True); sys.stdin.read()"
    words = [str(path), "-I", "-S", "-c", text]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


def test_slurmstepd_with_a_users_effective_uid(tmp_path: Path) -> None:
    """As it is while it sets up its tasks."""
    with program(tmp_path / "slurmstepd-wlm", "os.setegid(61001); os.seteuid(61001)") as pid:
        assert os.stat(f"/proc/{pid}").st_uid == 61001
        os.close(stepd.open_stepd(pid))


@pytest.mark.parametrize(("name", "code"), [("slurmstepd", "os.setuid(61001)"), ("sleep", "pass")])
def test_others_are_refused(tmp_path: Path, name: str, code: str) -> None:
    """A user's program of that name, and another program of root's."""
    with program(tmp_path / name, code) as pid, pytest.raises(errors.EnclosError, match="is no slurmstepd"):
        stepd.open_stepd(pid)
