"""Squashfs files that users bring: squashfuse reads them, as their user, for as long as the step lives.

The images are made by mksquashfs and belong to users; what is looked at is what a program in the container sees, and
the processes and mounts of the node.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, Leftovers, said
from enclos.runtime.cluster.cluster import Cluster, Running
from enclos.runtime.cluster.users import user
from faults import kill, processes

APPLETS = ("sh", "cat", "cut", "dd", "grep", "id", "ls", "mkdir", "rm", "sleep", "stat", "touch", "true")
OWN = "/shared/own.sqsh"
SERVER = "squashfuse_ll"
DENIED = "image is not readable (permission denied) on n1"


def make_image(path: Path, owner: str, mode: int = 0o600, *, large: bool = False) -> Path:
    """A squashfs file with busybox and a few directories, as a user's mksquashfs makes it."""
    tree = path.with_suffix(".tree")
    for name in ("bin", "etc", "lower/deep", "tmp"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "bin/busybox")
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "lower/deep/file").write_text("of the image\n")
    (tree / "etc/environment").write_text("FROM_IMAGE=yes\n")
    if large:  # More than what the kernel reads ahead.
        (tree / "large").write_bytes(os.urandom(64 << 20))
    command = ["mksquashfs", str(tree), str(path), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    os.chown(path, user(owner).uid, user(owner).uid)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def own(cluster: Cluster) -> Path:
    return make_image(cluster.layout.shared / "own.sqsh", "usera")


@pytest.fixture(scope="module")
def fragile_own(fragile: Cluster) -> Path:
    return make_image(fragile.layout.shared / "own.sqsh", "usera", large=True)


def shell(cluster: Cluster, script: str, *options: str, image: str = OWN, name: str = "usera") -> str:
    words = ["srun", "-w", "n1", f"--container-image={image}", *options, "sh", "-ec", script]
    done = cluster.run(words, name, timeout=30)
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    return done.stdout


def refused(cluster: Cluster, image: str, *, name: str = "usera") -> list[str]:
    """The lines that the user reads where no container is made."""
    done = cluster.run(["srun", "-w", "n1", f"--container-image={image}", "echo", "ran"], name, timeout=30)
    assert done.returncode != 0 and done.stdout == ""
    return [row[row.index(word) :] for row in said(done.stderr) for word in ("enclos: ", "hint: ") if word in row]


def begin(cluster: Cluster, script: str, *options: str, first: str = ":") -> Running:
    """A step that has done what is first, said `up`, and goes on with the script."""
    words = ["srun", "-w", "n1", f"--container-image={OWN}", *options, "sh", "-c", f"{first}; echo up; {script}"]
    running = cluster.popen(words, user="usera")
    assert running.stdout is not None
    line = running.stdout.readline()
    assert line == "up\n", running.communicate()
    return running


# -- what the program sees -----------------------------------------------------------------------------------


def test_its_files_are_the_users(idle: Cluster, own: Path) -> None:
    assert shell(idle, "stat -c %u:%g /bin/busybox /lower/deep") == f"{user('usera').uid}:{user('usera').uid}\n" * 2
    assert shell(idle, "stat -c %u:%g /bin/busybox; id -u", "--container-remap-root") == "0:0\n0\n"


def test_it_can_be_written_over(idle: Cluster, own: Path) -> None:
    """An overlay on a FUSE file system in a user namespace: copied up, whited out, made opaque."""
    script = """
    echo changed > /lower/deep/file; cat /lower/deep/file
    rm -r /lower; mkdir /lower; touch /lower/new; ls /lower
    rm /etc/environment; ls /etc/environment 2>&1 || true
    """
    gone = "ls: /etc/environment: No such file or directory\n"
    for options in ((), ("--container-remap-root",)):
        assert shell(idle, script, *options) == f"changed\nnew\n{gone}"
    assert shell(idle, "cat /lower/deep/file; echo $FROM_IMAGE") == "of the image\nyes\n"


def test_the_kernel_does_not_read_it(idle: Cluster, own: Path) -> None:
    """No loop device, and no squashfs mount; a process of the user's has the file open."""
    running = begin(idle, "sleep 60", "--container-network=job")
    (pid,) = processes(idle, "n1", SERVER)
    status = dict(row.split(":\t", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
    uid = str(user("usera").uid)
    assert status["Uid"].split() == [uid] * 4 and status["NoNewPrivs"] == "1"
    assert {status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
    assert status["Groups"].split() == idle.run("id -G", "usera").stdout.split()
    assert own.stat().st_ino in {os.stat(entry.path).st_ino for entry in os.scandir(f"/proc/{pid}/fd")}
    losetup = ["losetup", "--list", "--noheadings", "--output", "BACK-INO"]
    shown = subprocess.run(losetup, capture_output=True, text=True, check=True)
    assert str(own.stat().st_ino) not in shown.stdout.split()
    running.send_signal(signal.SIGKILL)
    idle.run("scancel --user=usera")
    running.communicate(timeout=30)


def test_a_file_that_a_group_may_read(idle: Cluster) -> None:
    """squashfuse has its user's groups, and nothing else opens the file."""
    path = make_image(idle.layout.shared / "group.sqsh", "userb", 0o640)
    os.chown(path, user("userb").uid, 61101)  # projecta: usera is in it, userb is not.
    assert shell(idle, "cat /lower/deep/file", image="/shared/group.sqsh") == "of the image\n"
    os.chown(path, user("userb").uid, 61102)
    image = "--container-image=/shared/group.sqsh"
    assert refused(idle, "/shared/group.sqsh")[0] == f"enclos: {image}: {DENIED}"


def test_a_damaged_one_is_the_users_error(idle: Cluster, own: Path) -> None:
    """The superblock is whole; what it leads to is not."""
    bad = idle.layout.shared / "damaged.sqsh"
    bad.write_bytes(own.read_bytes()[:96] + b"\xff" * (own.stat().st_size - 96))
    os.chown(bad, user("usera").uid, user("usera").uid)
    first, hint = refused(idle, "/shared/damaged.sqsh")
    assert first.startswith("enclos: --container-image=/shared/damaged.sqsh: image cannot be read (")
    assert "build it again" in hint


# -- who may do what to it -----------------------------------------------------------------------------------


ATTEMPTS = {
    "look at its descriptors": "ls -l /proc/{pid}/fd/3 | grep -q -- '->'",
    "use its pipe": "echo forged > /proc/{pid}/fd/2",
    "use its FUSE device": "true < /proc/{pid}/fd/4",
    "go into its root": "ls /proc/{pid}/root/",
    "join its namespaces": "nsenter -t {pid} -U -m true",
    "join its user namespace alone": "nsenter -t {pid} -U --preserve-credentials true",
    "trace it": "timeout 5 strace -p {pid} -o /dev/null",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_its_user_gets_nothing_by_it(idle: Cluster, own: Path, attempt: str) -> None:
    """It stands in the agent's surroundings, in a user namespace where groups could be dropped: not for its user."""
    running = begin(idle, "sleep 60")
    (pid,) = processes(idle, "n1", SERVER)
    inside = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("NSpid:"))
    script = ATTEMPTS[attempt].format(pid=inside.split()[-1])
    allowed = idle.run(f"if {script}; then echo done; fi", "usera", node="n1", timeout=20).stdout
    alive = processes(idle, "n1", SERVER)
    running.send_signal(signal.SIGKILL)
    idle.run("scancel --user=usera")
    running.communicate(timeout=30)
    assert (allowed, alive) == ("", [pid])


# -- its life ------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_it(idle: Cluster, own: Path, leftovers: Leftovers) -> None:
    shell(idle, "cat /lower/deep/file")
    assert leftovers.rows() == []


def test_it_ends_although_its_user_keeps_the_mount(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    """He holds the container's mount namespace by a descriptor, from outside."""
    running = begin(fragile, "sleep 1")
    hold = "exec 9< /proc/$(pgrep -u usera -x sleep | head -1)/ns/mnt; echo held; exec tail -f /dev/null"
    holder = fragile.popen(["bash", "-c", hold], "usera", "n1")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert running.wait(timeout=30) == 0
    await_none(fragile)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert clean.rows() == []


def test_its_death_is_an_error_and_no_hang(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    # In the shell itself, of which all has been read: a page of a program that has not is a bus error (SIGBUS).
    script = "cat /bin/busybox > /dev/null; echo up; while read row < /lower/deep/file; do :; done; echo over; exit 7"
    running = begin(fragile, script)
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    # His own process: he may.
    fragile.run(f"pkill -KILL -u usera -x {SERVER}", "usera", node="n1")
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (7, "over\n")
    # The first if the shell was not waiting for it at that moment.
    reasons = ("Transport endpoint is not connected", "Software caused connection abort")
    assert any(f"can't open /lower/deep/file: {reason}" in err for reason in reasons), err
    fragile.await_idle()
    assert clean.rows() == []


def test_it_cannot_be_stopped(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    """Tasks that wait for a stopped server take no signal: Slurm would drain the node."""
    running = begin(fragile, "while cat /large > /dev/null; do :; done", first="cat /bin/busybox > /dev/null")
    fragile.run(f"pkill -STOP -u usera -x {SERVER}", "usera", node="n1")
    await_none(fragile)
    fragile.run("scancel --user=usera")
    running.communicate(timeout=20)
    fragile.await_idle()
    assert clean.rows() == []


def test_its_guardian_is_not_the_users(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    """It is root's, has nothing open and no image mounted, and squashfuse ends with it."""
    running = begin(fragile, "sleep 60")
    (guardian,) = processes(fragile, "n1", "enclos-serve")
    status = Path(f"/proc/{guardian}/status").read_text()
    assert "Uid:\t0\t0\t0\t0\n" in status
    assert sorted(os.listdir(f"/proc/{guardian}/fd")) == ["0", "1", "2"]
    assert "squashfs" not in Path(f"/proc/{guardian}/mounts").read_text()
    done = fragile.run(f"kill -KILL {guardian} || kill -STOP {guardian}", "usera", node="n1")
    assert done.returncode != 0 and processes(fragile, "n1", SERVER)
    kill(guardian)
    await_none(fragile)
    fragile.run("scancel --user=usera")
    running.communicate(timeout=20)
    fragile.await_idle()
    assert clean.rows() == []


def test_slurms_signals_do_not_reach_it(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    trap = "trap 'cat /large > /dev/null && exit 5' TERM USR1"
    running = begin(fragile, "while :; do sleep 0.1; done", first=trap)
    fragile.run("scancel --signal=TERM --user=usera")
    assert running.wait(timeout=20) == 5
    running.communicate()
    assert clean.rows() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_outlives_the_agent(fragile: Cluster, fragile_own: Path, clean: Leftovers, number: int) -> None:
    """And the next agent ends it, though a user keeps the mount."""
    script = "while [ ! -e /shared/go ]; do sleep 0.1; done; cat /large > /dev/null && echo read; sleep 0.5"
    go = fragile.layout.shared / "go"
    running = begin(fragile, script, "--container-mounts=/shared")
    hold = "exec 9< /proc/$(pgrep -u usera -x sleep | head -1)/ns/mnt; echo held; exec tail -f /dev/null"
    holder = fragile.popen(["bash", "-c", hold], "usera", "n1")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    fragile.restart_agent("n1", number)
    go.touch()
    out, err = running.communicate(timeout=30)
    go.unlink()
    assert (running.returncode, out, said(err)) == (0, "read\n", [])
    await_none(fragile)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    shell(fragile, "true")  # The new agent makes what the old one kept.
    assert clean.rows(exact=False) == []


def test_a_killed_builder_leaves_no_server(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    """Both attempts: the user kills his builders as soon as they are his."""
    hunter = "while :; do pkill -KILL -u usera -x enclos-build && echo; done"
    hunting = fragile.popen(["bash", "-c", hunter], "usera", "n1")
    words = ["srun", "-w", "n1", f"--container-image={OWN}", "true"]
    for _ in range(4):
        fragile.run(words, "usera", timeout=30)
    hunting.send_signal(signal.SIGKILL)
    hunting.communicate()
    fragile.await_idle()
    assert clean.rows() == []


def test_a_killed_agent_leaves_no_server(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> None:
    """While the step is being built: its mount dies with the builder."""
    words = ["srun", "-w", "n1", f"--container-image={OWN}", "true"]
    running = fragile.popen(words, "usera")
    deadline = time.monotonic() + 10 * PATIENCE
    while not processes(fragile, "n1", SERVER) and running.poll() is None and time.monotonic() < deadline:
        pass
    kill(fragile.agent_pid("n1"))
    fragile.stop_agent("n1")
    running.communicate(timeout=30)
    await_none(fragile)
    fragile.start_agent("n1")
    fragile.await_idle()


def await_none(cluster: Cluster, timeout: float = 10) -> None:
    """Wait until the first node has no squashfuse."""
    deadline = time.monotonic() + timeout
    while left := processes(cluster, "n1", SERVER):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


# -- what the site says ----------------------------------------------------------------------------------------


@pytest.fixture
def settings(fragile: Cluster, fragile_own: Path, clean: Leftovers) -> Iterator[Callable[[str], None]]:
    """Give the first node's agent other settings, for one test."""
    path = fragile.layout.node_etc("n1") / "enclos.yaml"
    before = path.read_text()

    def change(text: str) -> None:
        path.write_text(before.replace("images:\n", f"images:\n{text}"))
        fragile.restart_agent("n1")

    yield change
    path.write_text(before)
    fragile.restart_agent("n1")


def test_a_site_may_refuse_them(fragile: Cluster, settings: Callable[[str], None]) -> None:
    settings("  user_files: refuse\n")
    first, hint = refused(fragile, OWN)
    untrusted = "image is not trusted (not owned by root, or writable by others)"
    assert first == f"enclos: --container-image={OWN}: {untrusted} on n1"
    assert hint.startswith("hint: use an image of the site or an unpacked directory")


def test_a_site_may_trust_them(fragile: Cluster, settings: Callable[[str], None]) -> None:
    settings("  user_files: trust\n")
    running = begin(fragile, "sleep 0.5")
    assert processes(fragile, "n1", SERVER) == []
    assert running.wait(timeout=30) == 0
    running.communicate()


def test_without_squashfuse_the_administrator_is_told(fragile: Cluster, clean: Leftovers, fragile_own: Path) -> None:
    """As if it were not installed: hidden on the node, for one step."""
    covered = []
    try:
        for name in ("squashfuse", "squashfuse_ll"):
            fragile.run(["mount", "--bind", "/etc/hostname", f"/usr/bin/{name}"], node="n1")
            covered.append(name)
        lines = refused(fragile, OWN)
    finally:
        for name in covered:
            with suppress(subprocess.SubprocessError):
                fragile.run(["umount", f"/usr/bin/{name}"], node="n1")
    assert lines == [
        "enclos: images.user_files: fuse: squashfuse is not installed on n1",
        "hint: administrator: install squashfuse where the agent's PATH has it; 'enclos check' looks for it",
    ]
