"""--container-save: the container at a step's end as a file that is an image again, whole or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import Leftovers, said
from enclos.runtime.cluster.cluster import Cluster
from faults import kill, processes

IMAGE = "--container-image=/images/openmpi.sqsh"


@pytest.fixture(autouse=True)
def shared(cluster: Cluster, image: str) -> Path:
    """A folder that everybody may write to, on all machines."""
    folder = cluster.layout.shared / "saved"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def srun(cluster: Cluster, *words: str, user: str = "usera") -> subprocess.CompletedProcess[str]:
    return cluster.run(["srun", "-w", "n1", *words], user, timeout=60)


def test_what_was_saved_is_an_image(idle: Cluster, shared: Path) -> None:
    """With what was written, links, modes and removed files; again and again; without what belongs to the node."""
    write = """
        echo one > /opt/one; mkdir -p /opt/d; ln /opt/one /opt/d/hard; ln -s ../one /opt/d/soft; chmod 640 /opt/one
        rm /etc/os-release; mkfifo /opt/pipe; echo x > '/opt/a b'; touch -d @1000000000 /opt/d/hard
        echo gone > /tmp/gone; echo gone > /dev/shm/gone; echo here > /here/seen"""
    path = "/shared/saved/my image.sqsh"
    options = [f"--container-save={path}", "--container-mounts=/shared/saved:/here"]
    done = srun(idle, IMAGE, *options, "sh", "-c", write)
    assert (done.returncode, done.stdout, said(done.stderr)) == (0, "", [f"enclos: saved the container to {path}"])
    status = (shared / "my image.sqsh").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (61001, 0o644)
    read = """
        cat /opt/one /opt/d/soft '/opt/a b'; stat -c '%a %h %Y' /opt/one; [ -p /opt/pipe ] && echo pipe
        ls /etc/os-release /tmp/gone /dev/shm/gone /here/seen 2>/dev/null; stat -c %u /bin/busybox; ring >/dev/null 2>&1
        cat /etc/hosts | wc -l; echo two > /opt/two"""
    done = srun(idle, f"--container-image={path}", f"--container-save={path}", "sh", "-c", read)
    rows = done.stdout.splitlines()
    assert rows[:6] == ["one", "one", "x", "640 2 1000000000", "pipe", "61001"], done.stderr
    assert int(rows[6]) > 0
    assert srun(idle, f"--container-image={path}", "cat", "/opt/one", "/opt/two").stdout == "one\ntwo\n"
    assert sorted(entry.name for entry in shared.iterdir()) == ["my image.sqsh", "seen"]


def test_relative_path_and_several_tasks(idle: Cluster, shared: Path) -> None:
    """One file per node-step, when all tasks have ended."""
    script = "echo $SLURM_LOCALID >> /opt/list"
    words = ["-n4", "--chdir=/shared/saved", IMAGE, "--container-save=./own.sqsh", "sh", "-c", script]
    done = srun(idle, *words)
    assert (done.returncode, len(said(done.stderr))) == (0, 1), done.stderr
    listed = srun(idle, "--container-image=/shared/saved/own.sqsh", "cat", "/opt/list").stdout
    assert sorted(listed.split()) == list("0123")


def test_the_commands_status_stays(idle: Cluster, shared: Path) -> None:
    """A command that fails or is killed by a signal is saved, too."""
    for script, status in (("echo x > /opt/x; exit 7", 7), ("echo x > /opt/x; kill -SEGV $$", 139)):
        done = srun(idle, IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c", script)
        assert done.returncode == status, done.stderr
        assert srun(idle, "--container-image=/shared/saved/x.sqsh", "cat", "/opt/x").stdout == "x\n"
        (shared / "x.sqsh").unlink()


def test_named_and_root(idle: Cluster, shared: Path) -> None:
    script = f"""
        srun -n1 {IMAGE} --container-name=w --container-remap-root sh -c 'echo x > /opt/x; chmod 0 /opt/x'
        srun -n1 --container-name=w --container-remap-root --container-save=/shared/saved/w.sqsh cat /opt/x"""
    done = idle.run(["salloc", "-Q", "-w", "n1", "bash", "-c", script], "usera")
    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr
    words = ["--container-image=/shared/saved/w.sqsh", "--container-remap-root", "cat", "/opt/x"]
    assert srun(idle, *words).stdout == "x\n"


def test_terminal(idle: Cluster, shared: Path) -> None:
    """With --pty: it is the program's, with its signals and size."""
    command = ["srun", "-w", "n1", "--pty", IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c",
               "tty > /opt/tty; stty size >> /opt/tty; cut -d\" \" -f5,8 /proc/$$/stat >> /opt/tty"]  # fmt: skip
    line = " ".join(f"'{word}'" for word in command)
    done = idle.run(["script", "-qec", f"stty rows 33 cols 44; {line}", "/dev/null"], "usera", timeout=60)
    assert done.returncode == 0, done.stdout
    told = srun(idle, "--container-image=/shared/saved/x.sqsh", "cat", "/opt/tty").stdout
    terminal, size, groups = told.split("\n")[:3]
    assert (terminal.startswith("/dev/pts/"), size, len(set(groups.split()))) == (True, "33 44", 1), told


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("/shared/none/x.sqsh", "no such file or directory"),
        ("/root/x.sqsh", "permission denied"),
        ("/shared/saved", "is a directory"),
        ("/proc/self/fd/3/x", "too many symbolic links"),
    ],
)
def test_a_target_that_cannot_be_is_said_before_the_command_runs(idle: Cluster, path: str, cause: str) -> None:
    done = srun(idle, IMAGE, f"--container-save={path}", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert cause in done.stderr.lower()
    assert f"--container-save={path}: the container cannot be saved there (" in done.stderr


def test_a_full_disk_fails_the_step_and_leaves_what_was_there(idle: Cluster, shared: Path) -> None:
    small = shared / "small"
    small.mkdir()
    for node in ("n1",):
        words = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "tmpfs", "/shared/saved/small"]
        assert idle.run(words, "root", node).returncode == 0
    try:
        idle.run("echo before > /shared/saved/small/x.sqsh", "usera", "n1")
        path = "/shared/saved/small/x.sqsh"
        script = "dd if=/dev/urandom of=/opt/big bs=1M count=20 2>/dev/null; echo ran"
        done = srun(idle, IMAGE, f"--container-save={path}", "sh", "-c", script)
        assert (done.returncode, done.stdout) == (1, "ran\n")
        text = f"--container-save={path}: the container cannot be saved there (no space left on device) on n1"
        assert f"slurmstepd-n1: error: enclos: {text}" in said(done.stderr)
        assert idle.run("cat /shared/saved/small/x.sqsh; ls -A /shared/saved/small", "usera", "n1").stdout == (
            "before\nx.sqsh\n"
        )
    finally:
        idle.run(["umount", "/shared/saved/small"], "root", "n1")


def test_a_step_that_is_killed_is_not_saved(idle: Cluster, leftovers: Leftovers, shared: Path) -> None:
    with idle.popen(["srun", "-w", "n1", IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c",
                     "echo up; sleep 60"], "usera") as running:  # fmt: skip
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        for name in ("enclos-task", "sleep"):
            for pid in processes(idle, "n1", name):
                kill(pid)
        running.communicate(timeout=30)
    assert running.returncode != 0
    assert leftovers.rows() == []
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "status", "saved"), [("kill -9 $$", 137, 0), ("exit 137", 137, 0), ("kill -15 $$", 143, 1)]
)
def test_a_program_that_is_killed(idle: Cluster, shared: Path, end: str, status: int, saved: int) -> None:
    """By SIGKILL: nothing tells that from the end of the step, as a shell's report of it."""
    done = idle.run(["srun", "-w", "n1", IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c", end], "usera")
    assert (done.returncode, len(list(shared.iterdir()))) == (status, saved), done.stderr
    assert done.stderr.count("enclos: saved the container") == saved


def test_of_several_nodes_the_last_one_stays(idle: Cluster, shared: Path) -> None:
    words = ["srun", "-w", "n1,n2", "-n2", IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c"]
    done = idle.run([*words, "hostname > /opt/node; [ $SLURM_NODEID = 0 ] || sleep 2"], "usera")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("enclos: saved the container") == 2
    assert [file.name for file in shared.iterdir()] == ["x.sqsh"]
    read = ["srun", "-w", "n1", "--container-image=/shared/saved/x.sqsh", "cat", "/opt/node"]
    assert idle.run(read, "usera").stdout == "n2\n"


def test_a_saver_that_is_killed(idle: Cluster, leftovers: Leftovers, shared: Path) -> None:
    """It is tried again; in the end it is an error, and no half of a file is there."""
    words = ["srun", "-w", "n1", IMAGE, "--container-save=/shared/saved/x.sqsh", "sh", "-c",
             "dd if=/dev/urandom of=/opt/big bs=1M count=300 2>/dev/null; echo ran"]  # fmt: skip
    with idle.popen(words, "usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "ran\n"
        while running.poll() is None:
            for pid in processes(idle, "n1", "enclos-save"):
                kill(pid)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "--container-save=/shared/saved/x.sqsh: the container cannot be saved there (the process that" in err
    assert list(shared.iterdir()) == []
    assert leftovers.rows() == []
