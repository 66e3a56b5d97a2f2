"""--container-cgroup=delegate: in the guests of `make test-vm`, where Slurm makes cgroups of version 2."""

from __future__ import annotations

import subprocess
import time

import pytest
from conftest import Leftovers
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster.cluster import Cluster, Running

IMAGE = "--container-image=/images/openmpi.sqsh"
DELEGATE = "--container-cgroup=delegate"
CGROUP = "/sys/fs/cgroup"
# What a manager of containers does: out of the way, controllers on, a group with a limit of its own, something in it.
MANAGE = (
    f"cd {CGROUP} && mkdir -p own box far/down && echo $$ > own/cgroup.procs && "
    'echo "+memory +pids" > cgroup.subtree_control && echo 20M > box/memory.max || exit 9; '
    "(echo $BASHPID > far/down/cgroup.procs; exec setsid sleep 1000) > /dev/null 2>&1 < /dev/null &"
    f" for i in $(seq 100); do [ -s {CGROUP}/far/down/cgroup.procs ] && break; sleep 0.1; done; "
)
EAT = 'x=$(head -c 60000000 /dev/zero | tr "\\0" x); echo ${#x}'
# Makes cgroups wherever it can below a task's, as fast as it can, until there is nothing of it; says how many.
FILL = """
import glob, itertools, os
places = glob.glob("/sys/fs/cgroup/**/delegated", recursive=True)
places += [os.path.dirname(place) for place in places]
made = 0
for name in itertools.count():
    for place in places:
        try:
            os.mkdir(f"{place}/{name}")
            made += 1
        except OSError:
            pass
    if not os.path.isdir(places[-1]):
        break
print(made)
"""
SECONDS = 200.0
# Slurm waits this long between SIGTERM and SIGKILL.
KILL_WAIT = 30.0

Result = subprocess.CompletedProcess[str]


def step(cluster: Cluster, script: str, *words: str) -> Result:
    command = ["srun", "-w", "n1", "--mem=100", *words, IMAGE, DELEGATE, "bash", "-c", script]
    return cluster.run(command, user="usera", timeout=SECONDS)


def start(cluster: Cluster, script: str) -> Running:
    """A step whose program has said `up`."""
    command = ["srun", "-w", "n1", "--mem=100", IMAGE, DELEGATE, "bash", "-c", script]
    running = cluster.popen(command, user="usera")
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n", running.stderr.read() if running.stderr else ""
    return running


def end(cluster: Cluster, *signal: str) -> None:
    """Cancel what usera runs."""
    cluster.run(["scancel", *signal, "--user=usera"])


@pytest.mark.vm_new
def test_a_manager_divides_what_the_step_has(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """Its limit kills in its group only; the step's own holds for all; what it leaves ends with the task."""
    inside = f"(echo $BASHPID > {CGROUP}/box/cgroup.procs; {EAT}); grep -w oom_kill {CGROUP}/box/memory.events"
    look = "cat /proc/self/cgroup cgroup.max.descendants cgroup.subtree_control memory.max; ls -d */"
    done = step(limited, f"{MANAGE} {look}; {inside}; echo alive", "-n1")
    rows = done.stdout.splitlines()
    assert rows[:4] == ["0::/own", "4096", "memory pids", "max"], done.stderr
    assert rows[4:7] == ["box/", "far/", "own/"]
    assert rows[-1] == "alive" and int(rows[-2].split()[1]) > 0 and "60000000" not in done.stdout
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
@pytest.mark.vm_slurm
def test_signals_reach_a_task_where_slurm_does_not_look(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """SIGTERM, before Slurm kills; what the manager has started ends with it."""
    with start(limited, f"trap 'echo told; exit 0' TERM; {MANAGE} echo up; while :; do sleep 0.2; done") as running:
        began = time.monotonic()
        end(limited)
        out, _ = running.communicate(timeout=SECONDS)
    assert "told" in out
    limited.await_idle(60)
    assert time.monotonic() - began < KILL_WAIT
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm
@pytest.mark.vm_slurm
def test_nothing_escapes_a_kill(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """Not a task that heeds no SIGTERM, nor daemons in groups of their own, nor one that forks all the time."""
    fork = "while :; do (trap '' TERM; setsid sleep 0.2 &) ; sleep 0.05; done > /dev/null 2>&1 &"
    with start(limited, f"trap '' TERM INT; {MANAGE} {fork} echo up; while :; do sleep 0.2; done") as running:
        end(limited, "--signal=KILL")
        running.communicate(timeout=SECONDS)
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
def test_nothing_escapes_a_kill_after_the_agents_restart(limited: Cluster) -> None:
    with start(limited, f"trap '' TERM INT; {MANAGE} echo up; while :; do sleep 0.2; done") as running:
        limited.restart_agent("n1", 9)
        end(limited, "--signal=KILL")
        running.communicate(timeout=SECONDS)
    limited.await_idle(60)
    look = f"ls -d {CGROUP}/system.slice/*/job_* 2> /dev/null"
    assert limited.run(f"for i in $(seq 50); do {look} || break; sleep 0.2; done; {look}", node="n1").returncode != 0
    assert limited.run(["pgrep", "--uid", "usera"], node="n1").stdout == ""


@pytest.mark.vm_new
def test_each_task_has_its_own(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """And no task sees or reaches another's."""
    script = f"cd {CGROUP}; mkdir mine-$SLURM_LOCALID; sleep 1; ls -d mine-*; cat cgroup.procs | grep -c ."
    done = step(limited, script, "-n2", "-l")
    for task in ("0", "1"):
        rows = [row.partition(": ")[2] for row in done.stdout.splitlines() if row.startswith(f"{task}:")]
        assert rows[0] == f"mine-{task}" and int(rows[1]) >= 1, done.stderr
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
def test_who_owns_it_gets_no_further(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """Inside and from a bare process of the same user on the node: no limit raised, nobody moved in or out."""
    inside = (
        f"cd {CGROUP}; for file in memory.max pids.max cpu.max cgroup.max.descendants cgroup.max.depth cgroup.freeze "
        "cgroup.kill; do echo max 2> /dev/null > $file && echo wrote $file; done; "
        f"{MANAGE} echo up; while [ ! -e /shared/over ]; do read -t 0.2 < <(:); done"
    )
    outside = (
        f"place=$(find {CGROUP} -type d -name delegated); task=${{place%/*}}; user=${{task%/*}}; "
        "try() { echo $1 2> /dev/null > $2 && echo wrote $2; }; "
        "try $$ $place/cgroup.procs; try $$ $place/own/cgroup.procs; try $$ $task/cgroup.procs; "
        "pid=$(head -n1 $place/own/cgroup.procs); "
        "for up in $task $user ${user%/*} ${user%/*/*}; do try $pid $up/cgroup.procs; try max $up/memory.max; "
        "try -memory $up/cgroup.subtree_control; try 1 $up/cgroup.kill; done; "
        "try max $place/memory.max; try 9999 $place/cgroup.max.descendants; "
        # As fast as it can, while the step ends.
        "(i=0; while [ -d $place ]; do i=$((i+1)); mkdir $place/$i $place/own/$i $task/$i; done > /dev/null 2>&1 &) "
        "> /dev/null 2>&1; echo tried $place"
    )
    limited.run("rm -f /shared/over", user="usera")
    command = ["srun", "-w", "n1", "--mem=100", IMAGE, DELEGATE, "--container-mounts=/shared", "bash", "-c", inside]
    with limited.popen(command, user="usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        tried = limited.run(outside, user="usera", node="n1", timeout=SECONDS)
        limited.run("touch /shared/over", user="usera")
        running.communicate(timeout=SECONDS)
    (row,) = tried.stdout.splitlines()
    assert row.startswith(f"tried {CGROUP}/") and row.endswith("/delegated"), tried.stdout
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
def test_cgroups_that_fill_the_steps_memory(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """slurmstepd shares that memory, and what it frees is taken at once: it ends all the same, and so does the job.

    They are made by a process of the user's outside, whose own memory is the node's.
    """
    # Slurm grants 30 MB at least (cgroup.conf(5), MinRAMSpace).
    command = ["srun", "-w", "n1", "--mem=30", IMAGE, DELEGATE, "bash", "-c", "echo up; read -t 30"]
    with limited.popen(command, user="usera", stdin=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        with limited.popen(["python3", "-c", FILL], user="usera", node="n1") as filler:
            made, _ = filler.communicate(timeout=SECONDS)
            running.communicate(timeout=SECONDS)
    assert int(made) > 1000
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []
    assert limited.run(["srun", "-w", "n1", "--mem=30", "true"], user="usera").returncode == 0


@pytest.mark.vm_new
def test_a_program_that_enters_is_in_the_step_too(limited: Cluster) -> None:
    with start(limited, f"{MANAGE} echo up; while :; do sleep 0.2; done") as running:
        job = limited.run(["squeue", "-h", "-o", "%A", "--user=usera"]).stdout.strip()
        entered = limited.run(["enclos", "exec", job, "cat", "/proc/self/cgroup"], user="usera", node="n1")
        end(limited)
        running.communicate(timeout=SECONDS)
    assert entered.stdout.strip() == "0::/", entered.stderr


def test_it_needs_slurms_cgroups(cluster: Cluster, image: str) -> None:
    if cgroups.available():
        pytest.skip("this kernel has cgroup v2")
    done = cluster.run(["srun", f"--container-image={image}", DELEGATE, "echo", "started"], user="usera")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"enclos: {DELEGATE}: Slurm makes no cgroup of version 2 for the step's tasks on n" in done.stderr


def test_an_unknown_value_is_refused_by_srun(cluster: Cluster, image: str) -> None:
    done = cluster.run(["srun", f"--container-image={image}", "--container-cgroup=mine", "true"], user="usera")
    assert done.returncode != 0
    assert "enclos: --container-cgroup=mine: expected readonly or delegate" in done.stderr
