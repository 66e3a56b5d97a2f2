"""Cgroups that a user makes below a task's are ended and removed: on a real tree, which needs no controllers here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from enclos.runtime import delegation

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
USER = 61001
# A user's process outside, in each directory that it is given, as fast as it can until the last one is gone.
MAKE = """\
import os, sys
os.setuid(int(sys.argv[1]))
places = sys.argv[2:]
print("up", flush=True)
number = 0
while os.path.isdir(places[-1]):
    number += 1
    for place in places:
        try:
            os.mkdir(f"{place}/{number}")
        except OSError:
            pass
"""
DEEP = """\
import os, sys
os.setuid(int(sys.argv[1]))
os.chdir(sys.argv[2])
for _ in range(1200):
    os.mkdir("deep")
    os.chdir("deep")
"""


@pytest.fixture
def step() -> Iterator[Path]:
    """`…/step_0` with a task's cgroup that is its user's, as Slurm 22.05 makes it, and a delegated one below."""
    # pytest's own directories are closed to other users.
    place = Path(tempfile.mkdtemp(prefix="enclos-cgroups-", dir="/run"))
    place.chmod(0o755)
    mount = ["mount", "-t", "cgroup2", "cgroup2", str(place)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode != 0:
        place.rmdir()
        pytest.skip(f"no cgroup v2 on this kernel: {mounted.stderr}")
    top = place / f"enclos-test-{os.getpid()}"
    own = top / "job_1/step_0/user/task_0/delegated/own"
    own.mkdir(parents=True)
    for directory in (own, own.parent, own.parents[1]):
        os.chown(directory, USER, USER)
    yield top / "job_1/step_0"
    if top.exists():
        delegation.remove_step(str(top / "job_1/step_0/user"))
        top.rmdir()
    subprocess.run(["umount", place], check=True)
    place.rmdir()


def as_user(script: str, *words: Path) -> list[str]:
    return [sys.executable, "-c", script, str(USER), *map(str, words)]


def test_who_makes_more_meanwhile_does_not_keep_them(step: Path) -> None:
    task = step / "user/task_0"
    places = (task, task / "delegated", task / "delegated/own")
    with subprocess.Popen(["sleep", "1000"]) as inside:
        (places[-1] / "cgroup.procs").write_text(str(inside.pid))
        with subprocess.Popen(as_user(MAKE, *places), stdout=subprocess.PIPE, text=True) as maker:
            assert maker.stdout is not None and maker.stdout.readline() == "up\n"
            deadline = time.monotonic() + 20
            while not (task / "delegated/100").is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (task / "delegated/100").is_dir()
            assert delegation.revoke(str(task))
            assert [path for path in task.iterdir() if path.is_dir()] == []
            assert maker.wait(20) == 0
        assert inside.wait(20) == -9


def test_a_step_with_all_below_it(step: Path) -> None:
    """Deeper than a path may be long; and the job's directory, which was the last one's."""
    subprocess.run(as_user(DEEP, step / "user/task_0"), check=True)
    subprocess.run(as_user(DEEP, step / "user/task_0/delegated"), check=True)
    assert delegation.remove_step(str(step / "user"))
    assert not step.parent.exists()
