"""The guests themselves: what comes back, and what becomes of one that hangs. As root, a few seconds each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vm import guest, kernels

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize("name", kernels.SUITES)
def test_a_command_runs_on_the_kernel_and_its_status_comes_back(name: str, tmp_path: Path) -> None:
    kernel = kernels.fetch(name)
    machine = guest.Guest(kernel, tmp_path, memory_mb=1024, variables={"COLOUR": "a b"})
    script = "cd /vm; uname -r > release; echo $COLOUR > colour; cat /sys/fs/cgroup/cgroup.controllers > known; exit 7"
    assert machine.run(script, 200, show=False) == 7
    assert (tmp_path / "release").read_text().strip() == kernel.release
    assert (tmp_path / "colour").read_text() == "a b\n"
    assert {"memory", "pids", "rdma", "io"} <= set((tmp_path / "known").read_text().split())
    assert "Linux version" in (tmp_path / "dmesg").read_text()


def test_what_a_guest_writes_stays_in_it(tmp_path: Path) -> None:
    machine = guest.Guest(kernels.fetch("new"), tmp_path, memory_mb=1024)
    assert machine.run("touch /etc/by-a-guest /usr/by-a-guest && ls /usr/by-a-guest", 200, show=False) == 0
    assert not Path("/etc/by-a-guest").exists() and not Path("/usr/by-a-guest").exists()


def test_a_guest_that_hangs_is_ended_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = guest.Guest(kernels.fetch("new"), tmp_path, memory_mb=1024)
    script = "echo stuck here; echo up > /vm/up; trap '' TERM INT; while :; do sleep 1000; done"
    assert machine.run(script, 40, show=False) == guest.HUNG
    assert (tmp_path / "up").exists()
    said = capsys.readouterr().out
    assert "was ended after 40 s; the end of its console:" in said and "stuck here" in said


def test_a_guest_that_does_not_boot_is_started_once_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "BOOT_SECONDS", 0.2)
    machine = guest.Guest(kernels.fetch("new"), tmp_path, memory_mb=1024)
    assert machine.run("true", 120, show=False) == guest.HUNG
    shown = capsys.readouterr().out
    assert shown.count("did not boot; starting it once more") == 1 and shown.count("did not boot; the end of") == 1


def test_a_guest_that_crashes_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = guest.Guest(kernels.fetch("new"), tmp_path, memory_mb=1024)
    assert machine.run("echo c > /proc/sysrq-trigger", 200, show=False) == guest.HUNG
    said = capsys.readouterr().out
    assert "ended without a result" in said and "sysrq" in said


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(kernels.KernelUnavailable, match=r"no kernel 5\.0; there are 6\.1, new"):
        kernels.fetch("5.0")
