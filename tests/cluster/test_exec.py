"""`enclos exec` and `enclos shell`: a program from outside in a running container of one's own, as its tasks are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import PATIENCE, Leftovers, Run, require_cgroup2, said
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster, Running

ENCLOS = "enclos"
HERE = ["/lib", "/lib64", "/usr", "/bin"]
IMAGE = ["--container-image=/images/openmpi.sqsh", f"--container-mounts={','.join(HERE)}"]
# Of /proc/self/status: what a process may do, and who it is.
RIGHTS = "Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|SigIgn|SigBlk"
LOOK = f"grep -E '^({RIGHTS}):' /proc/self/status; readlink /proc/self/ns/net /proc/self/ns/user /proc/self/ns/mnt; pwd"
WAIT = 10 * PATIENCE


class Step:
    """A step of usera's on the first node, in which a program waits."""

    def __init__(self, cluster: Cluster, *options: str, network: str = "job", command: str = "") -> None:
        script = f"{command or LOOK}; echo step $SLURM_JOB_ID.$SLURM_STEP_ID; exec sleep 1000"
        words = ["srun", "-w", "n1", f"--container-network={network}", *IMAGE, *options, "sh", "-c", script]
        self.running: Running = cluster.popen(words, user="usera")
        self.lines: list[str] = []
        assert self.running.stdout is not None
        while not self.lines or not self.lines[-1].startswith("step "):
            line = self.running.stdout.readline()
            assert line, self.running.stderr.read() if self.running.stderr else ""
            self.lines.append(line.rstrip("\n"))
        self.name = self.lines.pop().removeprefix("step ")
        self.job = self.name.partition(".")[0]


@contextlib.contextmanager
def step(cluster: Cluster, *options: str, network: str = "job", command: str = "") -> Iterator[Step]:
    made = Step(cluster, *options, network=network, command=command)
    try:
        yield made
    finally:
        cluster.run(["scancel", made.job])
        made.running.communicate(timeout=30)


@pytest.fixture(scope="module")
def running(cluster: Cluster, image: str) -> Iterator[Step]:
    with step(cluster) as made:
        yield made


def test_it_is_what_a_task_is(running: Step, usera: Run) -> None:
    """Ids, groups, capabilities, no_new_privs, filters, signals, namespaces and directory are the task's own."""
    done = usera([ENCLOS, "exec", running.name, "sh", "-c", LOOK], "n1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == running.lines


@pytest.mark.parametrize("network", ["host", "none"])
def test_it_is_in_the_steps_network(cluster: Cluster, image: str, usera: Run, network: str) -> None:
    with step(cluster, network=network) as made:
        done = usera([ENCLOS, "exec", made.name, "sh", "-c", LOOK], "n1")
        assert done.stdout.splitlines() == made.lines, done.stderr


def test_no_descriptor_is_inherited(running: Step, usera: Run) -> None:
    """The fourth is that of the directory which ls reads."""
    done = usera([ENCLOS, "exec", running.name, "ls", "/proc/self/fd"], "n1")
    assert done.stdout.split() == ["0", "1", "2", "3"]


def test_what_waits_can_not_be_looked_into(running: Step, cluster: Cluster) -> None:
    """It is the user's, and shows nothing of itself; in the container's /proc it is not to be seen at all."""
    words = [ENCLOS, "exec", running.name, "sh", "-c", "echo $PPID; read line"]
    with cluster.popen(words, node="n1", user="usera", stdin=subprocess.PIPE) as session:
        assert session.stdout is not None
        pid = session.stdout.readline().strip()
        look = f"cat /proc/{pid}/comm; for f in mem environ exe fd/0; do cat /proc/{pid}/$f; done; kill -STOP {pid}"
        outside = cluster.run(["sh", "-c", look], node="n1", user="usera")
        inside = cluster.run([ENCLOS, "exec", running.name, "sh", "-c", look], node="n1", user="usera")
        others = cluster.run([ENCLOS, "ps"], node="n1", user="userb")
        cluster.run(["kill", "-KILL", pid], node="n1", user="usera")
        _, err = session.communicate(timeout=WAIT)
    assert (outside.returncode, outside.stdout) == (0, "enclos-enter\n")
    assert outside.stderr.count("ermission denied") == 4
    assert inside.stdout == ""
    assert others.returncode == 0
    assert "the program was ended, possibly with its step" in err


def test_the_script_of_a_job(cluster: Cluster, image: str, usera: Run) -> None:
    script = f"#!/bin/sh\n{{ {LOOK}; }} >/shared/look; mv /shared/look /shared/batch-looked; exec sleep 1000\n"
    (cluster.layout.shared / "batch-script").write_text(script)
    (cluster.layout.shared / "batch-looked").unlink(missing_ok=True)
    options = [word.replace("/bin", "/bin,/shared") for word in IMAGE]
    done = usera(["sbatch", "-w", "n1", "-o", "/dev/null", "--parsable", *options, "/shared/batch-script"])
    job = done.stdout.strip()
    try:
        looked = cluster.layout.shared / "batch-looked"
        deadline = time.monotonic() + 30 * PATIENCE
        while not looked.exists():
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)
        done = usera([ENCLOS, "exec", f"{job}.batch", "sh", "-c", LOOK], "n1")
        assert done.stdout == looked.read_text(), done.stderr
    finally:
        cluster.run(["scancel", job])


def test_remapped_root_has_the_tasks_rights_and_filter(cluster: Cluster, image: str, usera: Run) -> None:
    with step(cluster, "--container-remap-root") as made:
        done = usera([ENCLOS, "exec", made.job, "sh", "-c", LOOK], "n1")
        assert done.stdout.splitlines() == made.lines, done.stderr
        assert usera([ENCLOS, "exec", made.job, "sh", "-c", "chown 7:7 /tmp && id -u"], "n1").stdout == "0\n"


def test_limits_are_the_steps(cluster: Cluster, image: str, usera: Run) -> None:
    """Not the agent's: no more open files or locked memory than a task may have, and no shelter from the OOM killer."""
    hard = "grep -E 'Max (open files|locked|processes)' /proc/self/limits | cut -c47-66; cat /proc/self/oom_score_adj"
    with step(cluster, command=hard) as made:
        done = usera([ENCLOS, "exec", made.name, "sh", "-c", hard], "n1")
        assert done.stdout.splitlines() == made.lines, done.stderr


@pytest.mark.parametrize(
    ("command", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("true", 0)]
)
def test_the_exit_status_is_the_commands(running: Step, usera: Run, command: str, status: int) -> None:
    assert usera([ENCLOS, "exec", running.name, "sh", "-c", command], "n1").returncode == status


def test_output_and_input_are_the_commands(running: Step, cluster: Cluster) -> None:
    """More than a pipe holds, to the end."""
    words = ["sh", "-c", f"head -c 300000 /dev/zero | {ENCLOS} exec {running.name} sh -c 'cat; echo err >&2' | wc -c"]
    done = cluster.run(words, user="usera", node="n1")
    assert (done.stdout.strip(), done.stderr) == ("300000", "err\n")


def test_variables_of_the_shell_and_of_the_image(running: Step, usera: Run) -> None:
    words = ["env", "MINE=1", ENCLOS, "exec", running.name, "sh", "-c", "echo $MINE"]
    assert usera(words, "n1").stdout == "1\n"


@pytest.mark.parametrize(("command", "text", "hint", "status"), [
    ("nothere", "enclos: nothere: command not found in the container",
     "hint: it is looked for along the PATH inside", 127),
    ("/etc", "enclos: /etc: cannot be run in the container (permission denied)",
     "hint: is it a program for this machine?", 126),
])  # fmt: skip
def test_a_command_that_does_not_run(
    running: Step, usera: Run, command: str, text: str, hint: str, status: int
) -> None:
    done = usera([ENCLOS, "exec", running.name, command], "n1")
    assert (done.returncode, done.stderr.splitlines()) == (status, [text, hint])


def test_nobody_elses(running: Step, userb: Run) -> None:
    """A job of somebody else's, one that there is not, and one that runs elsewhere: the same words."""
    for name, node in ((running.name, "n1"), (running.job, "n1"), ("4000000.0", "n1"), (running.name, "n2")):
        done = userb([ENCLOS, "exec", name, "true"], node)
        assert done.returncode == 1
        assert done.stderr.splitlines()[0] == f"enclos: {name}: you have no container of this name here on {node}"


def test_root_enters_as_the_steps_user(running: Step, cluster: Cluster) -> None:
    done = cluster.run([ENCLOS, "exec", running.name, "sh", "-c", LOOK], node="n1")
    assert done.stdout.splitlines() == running.lines, done.stderr
    done = cluster.run(["env", "SECRET=1", ENCLOS, "exec", running.name, "env"], node="n1")
    assert "PATH=" in done.stdout
    assert "SECRET" not in done.stdout


def test_several_containers_need_a_name(cluster: Cluster, image: str, usera: Run) -> None:
    done = cluster.run(["salloc", "--no-shell", "-w", "n1"], user="usera")
    job = next(word for word in done.stderr.split() if word.isdigit())
    with step(cluster, f"--jobid={job}", "--overlap"), step(cluster, f"--jobid={job}", "--overlap"):
        done = usera([ENCLOS, "exec", job, "true"], "n1")
        first = f"enclos: {job}: the job has several containers here ({job}.0, {job}.1) on n1"
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, first)
        assert usera([ENCLOS, "exec", f"{job}.1", "true"], "n1").returncode == 0


def test_signals_reach_it(running: Step, cluster: Cluster) -> None:
    script = "trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    words = [ENCLOS, "exec", running.name, "sh", "-c", script]
    with cluster.popen(words, node="n1", user="usera") as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "up\n"
        session.send_signal(signal.SIGTERM)
        assert session.communicate(timeout=WAIT)[0] == "got\n"
        assert session.returncode == 5


def test_it_ends_with_its_command(running: Step, cluster: Cluster) -> None:
    """Who has gone leaves nothing behind, also of a program that ignores a hang-up."""
    words = [ENCLOS, "exec", running.name, "sh", "-c", "trap '' HUP; echo up; sleep 4321; sleep 4321"]
    with cluster.popen(words, node="n1", user="usera") as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "up\n"
        session.kill()
        await_none("4321")


def test_it_ends_with_its_step(fragile: Cluster, clean: Leftovers) -> None:
    """Also what it has put aside, in another session."""
    with step(fragile) as made:
        words = [ENCLOS, "exec", made.name, "sh", "-c", "setsid sleep 4322 & echo up; exec sleep 4322"]
        session = fragile.popen(words, node="n1", user="usera")
        assert session.stdout is not None
        assert session.stdout.readline() == "up\n"
    _, err = session.communicate(timeout=WAIT)
    assert session.returncode == 1
    assert said(err)[0] == f"enclos: {made.name}: the program was ended, possibly with its step"
    await_none("4322")
    done = fragile.run([ENCLOS, "exec", made.name, "true"], node="n1", user="usera")
    assert "you have no container of this name here" in done.stderr
    assert clean.rows(exact=False) == []


def test_what_it_leaves_in_a_shared_container_lives_until_the_last_step_ends(
    cluster: Cluster, image: str, usera: Run
) -> None:
    """A session of its own does not end with exec, nor, without cgroups, with the step by whose name it was entered."""
    usera(["salloc", "-Q", "--no-shell", "-w", "n1"])
    job = usera(["squeue", "-h", "--me", "-o", "%A", "--sort=-i"]).stdout.split()[0]
    with step(cluster, f"--jobid={job}", "--overlap", "--container-name=shared", command="true") as first:
        script = "echo second $SLURM_STEP_ID; exec sleep 1000"
        words = ["srun", f"--jobid={job}", "--overlap", "--container-name=shared", "sh", "-c", script]
        with cluster.popen(words, user="usera") as second:
            assert second.stdout is not None
            number = second.stdout.readline().split()[1]
            left = "setsid sleep 4323 > /dev/null 2>&1 & echo left"
            assert usera([ENCLOS, "exec", first.name, "sh", "-c", left], "n1").stdout == "left\n"
            cluster.run(["scancel", first.name])
            first.running.wait(WAIT)
            there = usera([ENCLOS, "exec", f"{job}.{number}", "ps", "-o", "args"], "n1").stdout
            assert "sleep 1000" in there
            # Where steps have cgroups, it is in that of the step that was entered, and ends with it.
            assert ("sleep 4323" in there) is not cgroups.available()
            cluster.run(["scancel", f"{job}.{number}"])
            second.wait(WAIT)
        await_none("4323")


def test_a_new_agent(fragile: Cluster, clean: Leftovers) -> None:
    """What was started goes on, and more can be: the network too is found again."""
    with step(fragile) as made:
        words = [ENCLOS, "exec", made.name, "sh", "-c", "echo up; read line; echo $line"]
        with fragile.popen(words, node="n1", user="usera", stdin=subprocess.PIPE) as session:
            assert session.stdout is not None
            assert session.stdout.readline() == "up\n"
            fragile.restart_agent("n1", signal.SIGKILL)
            done = fragile.run([ENCLOS, "exec", made.name, "sh", "-c", LOOK], node="n1", user="usera")
            assert done.stdout.splitlines() == made.lines, done.stderr
            assert session.communicate("still here\n", timeout=WAIT)[0] == "still here\n"
    fragile.await_idle()
    # New agents keep what the old ones kept.
    assert fragile.run(["srun", "-N2", "--container-network=job", *IMAGE, "true"], user="usera").returncode == 0
    assert clean.rows(exact=False) == []


def test_a_users_number_is_bounded(running: Step, cluster: Cluster) -> None:
    """And others are served meanwhile."""
    words = [ENCLOS, "exec", running.name, "cat"]
    sessions = [cluster.popen(words, node="n1", user="usera", stdin=subprocess.PIPE) for _ in range(20)]
    deadline = time.monotonic() + 30 * PATIENCE
    while sum(session.poll() is None for session in sessions) > 16:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cluster.run([ENCLOS, "ps"], node="n1", user="userb").returncode == 0
    ended = [session.communicate("", timeout=WAIT) for session in sessions]
    refused = [err for _, err in ended if err]
    assert len(refused) >= 4
    assert all("you have 16 programs of 'enclos exec' on this node, or too many are starting" in err for err in refused)
    assert cluster.run([ENCLOS, "exec", running.name, "true"], node="n1", user="usera").returncode == 0


def test_a_terminal_of_its_own(running: Step, cluster: Cluster) -> None:
    """A shell with a terminal that is not the caller's; the caller's is as before."""
    words = ["script", "-qec", f"stty rows 33 cols 77; stty -a >/shared/before; {ENCLOS} shell {running.name}; "
             "echo status $?; stty -a >/shared/after", "/dev/null"]  # fmt: skip
    with cluster.popen(words, node="n1", user="usera", stdin=subprocess.PIPE) as session:
        assert session.stdin is not None
        out, _ = session.communicate("stty size\ntest -t 0 && echo is-$((40+2))\nexit 3\n", timeout=2 * WAIT)
    assert "33 77" in out
    assert "is-42" in out
    assert "status 3" in out
    shared = cluster.layout.shared
    assert (shared / "before").read_text() == (shared / "after").read_text()


def test_the_terminal_changes_its_size(running: Step, cluster: Cluster) -> None:
    """A new size reaches the program, and Ctrl-C its foreground."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    script = "trap 'stty size' WINCH; trap 'exit 3' INT; stty size; readlink /proc/$$/fd/0; while :; do sleep 0.1; done"
    words = [ENCLOS, "exec", running.name, "sh", "-c", script]
    with (
        os.fdopen(ours, "r+b", buffering=0) as terminal,
        cluster.popen(words, node="n1", user="usera", stdin=theirs, stdout=theirs, stderr=theirs) as session,
    ):
        assert "33 77" in read_until(terminal, b"/dev/pts/")
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 77, 0, 0))
        session.send_signal(signal.SIGWINCH)
        assert "44 77" in read_until(terminal, b"44 77")
        terminal.write(b"\x03")
        assert session.wait(WAIT) == 3
        assert termios.tcgetattr(theirs)[3] & termios.ICANON, "left as it was"
    os.close(theirs)


def read_until(terminal: BinaryIO, text: bytes) -> str:
    """What comes until that text, with the line that it is in; not longer than a program needs to start."""
    seen = b""
    while text not in seen or not seen.endswith(b"\n"):
        assert select.select([terminal], [], [], 6 * WAIT)[0], seen
        seen += os.read(terminal.fileno(), 4096)
    return seen.decode()


def await_none(seconds: str) -> None:
    """No `sleep` of so many seconds runs any more."""
    deadline = time.monotonic() + WAIT
    while f"sleep\0{seconds}\0".encode() in [words(path) for path in sleeps()]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def words(process: Path) -> bytes:
    """Its command line; nothing when it has ended."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def sleeps() -> list[Path]:
    """Processes whose program is called sleep."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text() == "sleep\n":
                found.append(path)
    return found


def enter_and_cancel(cluster: Cluster, *options: str) -> tuple[list[str], str]:
    """Enter a step on n1 and cancel it: three lines of the program that entered, and where it was in the tree."""
    words = ["srun", "-w", "n1", *options, "--container-image=/images/openmpi.sqsh", "sh", "-c"]
    with cluster.popen([*words, "echo $SLURM_JOB_ID; exec sleep 1000"], user="usera") as running:
        assert running.stdout is not None
        job = running.stdout.readline().strip()
        script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max; echo up; exec sleep 4323"
        session = cluster.popen([ENCLOS, "exec", job, "sh", "-c", script], node="n1", user="usera")
        assert session.stdout is not None and session.stderr is not None
        shown = [session.stdout.readline().strip() for _ in range(3)]
        assert shown[2] == "up", session.stderr.read()
        (pid,) = (path.name for path in sleeps() if b"4323" in (path / "cmdline").read_bytes())
        place = Path(f"/proc/{pid}/cgroup").read_text().strip()
        cluster.run(["scancel", job])
        session.communicate(timeout=60)
        running.communicate(timeout=60)
    assert session.returncode != 0
    return shown, place


@pytest.mark.vm
@pytest.mark.vm_slurm
def test_it_is_below_the_steps_cgroup(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """With its limits, in a cgroup namespace of its own; Slurm ends it and removes all, the node stays in use."""
    shown, place = enter_and_cancel(limited, "--mem=64")
    assert shown == ["0::/", str(64 << 20), "up"]
    assert place.endswith("/step_0/user/task_0")
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.fixture(scope="module")
def tracked(make_cluster: Callable[..., Cluster]) -> Cluster:
    """One node on which Slurm only tracks processes by their cgroups: nothing limits or counts tasks one by one."""
    require_cgroup2()
    made = make_cluster(1, cpus=2)
    images.install(made.layout.images)
    done = made.run(["srun", "--container-image=/images/openmpi.sqsh", "true"], user="usera", timeout=200)
    assert done.returncode == 0, done.stderr
    made.await_idle(60)
    return made


@pytest.mark.vm_new
def test_where_no_task_has_a_cgroup_of_its_own(tracked: Cluster) -> None:
    """It is where the tasks are, and ends with them."""
    leftovers = Leftovers(tracked)
    _, place = enter_and_cancel(tracked)
    assert place.endswith("/step_0/user/task_special")
    tracked.await_idle(60)
    assert leftovers.rows(60) == []
