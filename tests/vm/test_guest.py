"""The guests themselves: what comes back, and what becomes of one that hangs. As root, a few seconds each."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from vm import guest, kernels

ROOT = Path(__file__).resolve().parents[2]

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


def test_a_guest_that_cannot_mount_its_root_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its modules are another kernel's. It does not wait for a hand at its console, but ends."""
    mixed = replace(kernels.fetch("new"), image=kernels.fetch("6.1").image)
    began = time.monotonic()
    assert guest.Guest(mixed, tmp_path, memory_mb=1024).run("true", 200, show=False) == guest.HUNG
    assert time.monotonic() - began < guest.BOOT_SECONDS
    said = capsys.readouterr().out
    assert "ended without a result" in said and "init: cannot mount the host's files" in said and "panic" in said


def test_a_guest_ends_with_who_made_it(tmp_path: Path) -> None:
    """Killed, too: otherwise it would run on, and what it has locked of a folder would be another's."""
    command = [str(ROOT / "tests/vm/vm"), "run", "sleep 1000"]
    variables = {**os.environ, "ENCLOS_VM_RESULTS": str(tmp_path)}
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            pid = await_guest(tmp_path)
            second = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
            assert second.returncode == 1
            assert second.stderr.startswith(f"vm: another guest has {tmp_path}/run-new; ENCLOS_VM_RESULTS=FOLDER")
        finally:
            running.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def await_guest(folder: Path) -> int:
    """The pid of the guest whose results go below a folder."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if words[0].decode() == guest.QEMU and any(f"path={folder}".encode() in word for word in words):
                    return int(path.parent.name)
        time.sleep(0.1)
    raise TimeoutError("no guest")


def test_an_archive_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In apt's words about the network, not as a package that is not there."""
    monkeypatch.setenv("ENCLOS_VM_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "ATTEMPTS", 1)
    monkeypatch.setattr(kernels, "_archive", lambda: "http://127.0.0.1:9/debian")
    with pytest.raises(kernels.KernelUnavailable, match=r"kernel new cannot be fetched: apt-get -qq update: .*127"):
        kernels.fetch("new")


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(kernels.KernelUnavailable, match=r"no kernel 5\.0; there are 6\.1, new"):
        kernels.fetch("5.0")


def test_an_unknown_release_of_slurm_is_refused(tmp_path: Path) -> None:
    command = [str(ROOT / "tests/vm/vm"), "--slurm", "9.9", "test"]
    variables = {**os.environ, "ENCLOS_VM_RESULTS": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vm: --slurm=9.9: no such release; there are 22.05, 24.11, 26.05\n"
