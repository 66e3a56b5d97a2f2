"""--container-limit: in the guests of `make test-vm`, where there are cgroup v2 controllers; refusals also without."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Leftovers, require_cgroup2
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"
CGROUP = "/sys/fs/cgroup"
HUGE = Path(__file__).with_name("hugepages.c")
# That guest's kernel is told to have no controller for huge pages.
OLD = os.uname().release.startswith("6.1.")
# As much memory as the word says, in a shell's variable: busybox has no tool that only allocates.
EAT = 'x=$(head -c {bytes} /dev/zero | tr "\\0" x); echo ${{#x}}'

Result = subprocess.CompletedProcess[str]


def step(cluster: Cluster, limit: str, script: str, *words: str, user: str = "usera", timeout: float = 200) -> Result:
    command = ["srun", *words, IMAGE, *([f"--container-limit={limit}"] if limit else []), "bash", "-c", script]
    return cluster.run(command, user=user, timeout=timeout)


def shown(text: str) -> list[str]:
    return [line.partition("enclos: ")[2] for line in text.splitlines() if "enclos: " in line]


@pytest.mark.vm
@pytest.mark.vm_slurm
def test_limits_are_seen_inside_and_only_inside(limited: Cluster) -> None:
    files = "memory.max memory.swap.max cpu.max cpuset.cpus pids.max"
    limit = "memory=64M,swap=0,cpu=0.5,cpuset=1,pids=50"
    inside = step(limited, limit, f"cd {CGROUP}; cat {files}; nproc", "--mem=100", "-c2", "--cpu-bind=none")
    assert inside.stdout.split() == [str(64 << 20), "0", "50000", "100000", "1", "50", "1"], inside.stderr


@pytest.mark.vm_new
def test_controllers_that_slurm_leaves_off(limited: Cluster) -> None:
    """Enabled on the way down for the step that asks, and for no other: Slurm's own levels have none of our files."""
    done = step(limited, "io=7:0:rbps=1M,hugetlb=2M:0,pids=9", f"cd {CGROUP}; cat io.max hugetlb.2MB.max pids.max")
    assert done.stdout.splitlines() == ["7:0 rbps=1048576 wbps=max riops=max wiops=max", "0", "9"], done.stderr
    without = step(limited, "", f"ls {CGROUP}")
    assert "memory.max" in without.stdout and "io.max" not in without.stdout


@pytest.fixture
def disk(limited: Cluster) -> Iterator[str]:
    """A disk with a file system, which users of n1 find at /tmp/disk; its numbers as 7:3."""
    file = limited.layout.state / "disk"
    with file.open("wb") as made:
        made.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(file)], check=True)
    loop = subprocess.run(["losetup", "--find", "--show", str(file)], check=True, stdout=subprocess.PIPE, text=True)
    device = loop.stdout.strip()
    made_ready = limited.run(f"mkdir /tmp/disk && mount {device} /tmp/disk && chmod 1777 /tmp/disk", node="n1")
    assert made_ready.returncode == 0, made_ready.stderr
    number = os.stat(device).st_rdev
    yield f"{os.major(number)}:{os.minor(number)}"
    limited.run("umount /tmp/disk && rmdir /tmp/disk", node="n1")
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.vm_new
def test_a_disk_is_as_slow_as_asked_for(limited: Cluster, disk: str) -> None:
    """A limit of bytes for what is read and one of requests for what is written; without one it takes a fraction."""
    script = f"""
        cd /disk; dd if=/dev/zero of=file bs=1M count=4 status=none conv=fsync
        times() {{ start=${{EPOCHREALTIME/[.,]/}}; "$@"; echo $(((${{EPOCHREALTIME/[.,]/}} - start) / 1000)); }}
        times dd if=file of=/dev/null bs=1M iflag=direct status=none
        times dd if=/dev/zero of=file bs=4K count=20 oflag=direct conv=notrunc status=none
        grep "^{disk} " {CGROUP}/io.stat 2> /dev/null
    """
    words = ("-w", "n1", "--container-mounts=/tmp/disk:/disk")
    slow = step(limited, f"io={disk}:rbps=4M:wiops=20", script, *words)
    reading, writing, _, read_bytes, *_ = slow.stdout.split()
    assert int(reading) > 800 and int(writing) > 800, slow
    assert int(read_bytes.removeprefix("rbytes=")) >= 4 << 20
    fast = step(limited, "", script, *words)
    assert sum(int(took) for took in fast.stdout.split()[:2]) < 600, fast


@pytest.fixture
def huge(limited: Cluster) -> Iterator[str]:
    """A program that takes huge pages (hugepages.c), which the node has for a while."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    subprocess.run(["cc", "-static", "-O1", "-o", str(limited.layout.shared / "huge"), str(HUGE)], check=True)
    pool.write_text("8")
    assert int(pool.read_text()) == 8
    yield "/shared/huge"
    pool.write_text("0")


@pytest.mark.vm_new
def test_huge_pages(limited: Cluster, huge: str) -> None:
    """As many as the limit says; more are refused to who reserves them, and end who does not; and that is told."""
    script = f"{huge} 2; {huge} 3; exec {huge} 3 noreserve"
    done = step(limited, "hugetlb=2M:4M", script, "--container-mounts=/shared")
    assert done.stdout.splitlines() == ["2 pages", "Cannot allocate memory"], done.stderr
    assert done.returncode != 0 and "Bus error" in done.stderr
    (line,) = [line for line in shown(done.stderr) if "reached" in line]
    words = "the step reached this limit (huge pages were refused 2 times)"
    assert line.startswith(f"--container-limit=hugetlb=2M:4M: {words}")


@pytest.mark.vm
def test_quota_and_affinity_are_different(limited: Cluster) -> None:
    """A quota leaves both processors to a step, and slows it down; a set leaves it one, and full speed."""
    script = f"""
        nproc; used() {{ grep usage_usec {CGROUP}/cpu.stat | cut -d" " -f2; }}
        start=${{EPOCHREALTIME/[.,]/}}; before=$(used)
        for i in 1 2; do timeout 2 sh -c 'while :; do :; done' & done; wait
        echo $((100 * ($(used) - before) / (${{EPOCHREALTIME/[.,]/}} - start)))
        grep nr_throttled {CGROUP}/cpu.stat
    """
    processors, percent, _, throttled = step(limited, "cpu=0.5", script, "-c2", "--cpu-bind=none").stdout.split()
    assert processors == "2" and int(throttled) > 0 and 25 < int(percent) < 70, percent
    processors, percent, _, throttled = step(limited, "cpuset=0", script, "-c2", "--cpu-bind=none").stdout.split()
    assert (processors, throttled) == ("1", "0") and 70 < int(percent) < 110, percent


@pytest.mark.vm
@pytest.mark.vm_slurm
def test_who_is_killed_is_told_why(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """The whole step ends, tasks that allocate nothing, too; and nothing remains."""
    script = f'[ $SLURM_LOCALID = 0 ] && {EAT.format(bytes=80 << 20)}; sleep 60; echo survived'
    done = step(limited, "memory=40M,swap=0", script, "-N1", "-n2", "--mem=100")
    assert done.returncode != 0 and "survived" not in done.stdout
    (line,) = [line for line in shown(done.stderr) if "reached" in line]
    assert line.startswith("--container-limit=memory=40M: the step reached this limit (")
    assert line.endswith(("killed) on n1", "killed) on n2"))
    limited.await_idle(60)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
@pytest.mark.parametrize(("said", "whole"), [("0", "0"), ("1", "1"), ("", "1")])
def test_a_user_may_keep_the_other_tasks_alive(limited: Cluster, said: str, whole: str) -> None:
    """What --oom-kill-step of Slurm 24.11 leaves in a step's environment counts on releases without it as well."""
    command = ["srun", IMAGE, "--container-limit=memory=40M", "cat", f"{CGROUP}/memory.oom.group"]
    done = limited.run(command, user="usera", timeout=200, env={"SLURM_OOM_KILL_STEP": said} if said else {})
    assert done.stdout == f"{whole}\n", done.stderr


@pytest.mark.vm_slurm
@pytest.mark.parametrize(("words", "whole"), [(["--oom-kill-step=0"], "0"), (["--oom-kill-step=1"], "1"), ([], "1")])
def test_oom_kill_step_of_srun(limited: Cluster, release: str, words: list[str], whole: str) -> None:
    if release == "22.05":
        pytest.skip("Slurm has it from 24.11 on")
    done = step(limited, "memory=40M", f"cat {CGROUP}/memory.oom.group", *words)
    assert done.stdout == f"{whole}\n", done.stderr


@pytest.mark.vm
def test_who_may_not_fork_is_told_why(limited: Cluster) -> None:
    done = step(limited, "pids=4", "for i in 1 2 3 4 5 6; do sleep 3 & done; wait; exit 3")
    (line,) = [line for line in shown(done.stderr) if "reached" in line]
    assert line.startswith("--container-limit=pids=4: the step reached this limit (a new process or thread was refused")


@pytest.mark.vm
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("memory=3G", "above what Slurm granted (100M)"),
        ("cpu=64", "above what Slurm granted (1)"),
        ("cpuset=0-7", "above what Slurm granted (processors "),
        ("io=250:9:rbps=1M", "no such device (250:9)"),
        ("rdma=mlx5_9:hca_handle=4", "no such device (mlx5_9)"),
        ("hugetlb=32M:32M", f"the kernel cannot limit this ({'hugetlb' if OLD else 'hugetlb.32MB.max'} is missing)"),
    ],
)
def test_what_cannot_be_given_is_refused_before_the_program_starts(limited: Cluster, limit: str, words: str) -> None:
    done = step(limited, limit, "echo started", "--mem=100")
    assert (done.returncode, done.stdout) == (1, "")
    assert shown(done.stderr)[0].startswith(f"--container-limit={limit}: {words}")


@pytest.mark.vm
@pytest.mark.vm_slurm
def test_slurms_own_limits_and_orders_work_as_ever(limited: Cluster, limited_leftovers: Leftovers) -> None:
    """Slurm's memory limit kills below ours, sstat counts, scancel ends, and no cgroup stays."""
    killed = step(limited, "memory=100M", EAT.format(bytes=60 << 20), "--mem=40")
    assert killed.returncode != 0
    assert [line for line in shown(killed.stderr) if "reached" in line] == []
    script = f'srun {IMAGE} --container-limit=pids=100 sh -c "echo up; sleep 100" & wait'
    job = limited.run(["sbatch", "--parsable", "-o", "none", "--wrap", script], user="usera").stdout.strip()
    limited.run(f"for i in $(seq 100); do sstat -n -j {job}.0 -o maxrss | grep -q . && break; sleep 0.3; done")
    used = limited.run(["sstat", "-n", "-P", "-j", f"{job}.0", "-o", "maxrss"], user="usera").stdout
    assert used.strip().rstrip("K").isdigit(), used
    limited.run(["scancel", job])
    limited.await_idle(90)
    assert limited_leftovers.rows(60) == []


@pytest.mark.vm_new
def test_limits_survive_the_agents_restart(limited: Cluster) -> None:
    """Killed, too: the limit holds, its user is told of it, and nothing remains."""
    script = "while [ -e /shared/wait ]; do read -t 0.2 < <(:); done; for i in 1 2 3 4 5 6; do sleep 1 & done; exit 3"
    limited.run("touch /shared/wait", user="usera")
    options = [IMAGE, "--container-mounts=/shared", "--container-limit=pids=4"]
    with limited.popen(["srun", "-w", "n1", *options, "bash", "-c", f"echo up; {script}"], user="usera") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        limited.restart_agent("n1", 9)
        limited.run("rm /shared/wait", user="usera")
        _, err = running.communicate(timeout=100)
    assert "--container-limit=pids=4: the step reached this limit" in err
    limited.await_idle(60)
    look = f"ls -d {CGROUP}/system.slice/*/job_* 2>/dev/null"
    assert limited.run(f"for i in $(seq 50); do {look} || break; sleep 0.2; done; {look}", node="n1").returncode != 0


@pytest.fixture(scope="module")
def bare(make_cluster: Callable[..., Cluster]) -> Cluster:
    """One node on which Slurm uses no cgroups, with limits of the site's."""
    require_cgroup2()
    site = "limits:\n  default: [pids=64, 'account:beta pids=32']\n"
    site += "  maximum: ['partition:main memory=64M', 'account:beta cpu=1']\n"
    plugins = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/affinity\n"
    made = make_cluster(1, slurm_conf_extra=plugins, config=site)
    images.install(made.layout.images)
    return made


@pytest.mark.vm_new
def test_without_slurms_cgroups_limits_hold_as_well(bare: Cluster) -> None:
    """In a cgroup of our own, which every task is in, and which is gone afterwards.

    No step needs the controllers in Slurm's slice here: the agent has enabled them at its start.
    """
    enabled = bare.run(f"cat {CGROUP}/system.slice/cgroup.subtree_control", node="n1").stdout.split()
    assert {"pids", "io", "hugetlb", "rdma"} <= set(enabled)
    done = step(bare, "cpu=0.5", f"cd {CGROUP}; cat pids.max cpu.max memory.max; cat /proc/self/cgroup", "-n2", "-l")
    for task in ("0:", "1:"):
        rows = [row.removeprefix(task).strip() for row in done.stdout.splitlines() if row.startswith(task)]
        assert rows == ["64", "50000 100000", str(64 << 20), "0::/"], done.stderr
    over = step(bare, "memory=65M", "echo started")
    assert "above the site's maximum (memory=64M) on n1" in over.stderr and over.stdout == ""
    # userb's account has a default and a maximum of its own.
    assert step(bare, "cpu=1", f"cat {CGROUP}/pids.max", user="userb").stdout == "32\n"
    over = step(bare, "cpu=1.5", "echo started", user="userb")
    assert "above the site's maximum (cpu=1) on n1" in over.stderr and over.stdout == ""
    bare.await_idle(60)
    look = f"ls -d {CGROUP}/enclos/step* 2>/dev/null"
    assert bare.run(f"for i in $(seq 50); do {look} || break; sleep 0.2; done; {look}", node="n1").returncode != 0


def test_limits_need_cgroup2(cluster: Cluster) -> None:
    if cgroups.available():
        pytest.skip("this kernel has cgroup v2")
    done = cluster.run(["srun", IMAGE, "--container-limit=memory=64M", "echo", "started"], user="usera")
    assert (done.returncode, done.stdout) == (1, "")
    words = "--container-limit=memory=64M: limits need cgroup v2 (/sys/fs/cgroup is not) on n"
    assert [line for line in shown(done.stderr) if line.startswith(words)], done.stderr


@pytest.mark.parametrize("limit", ["disk=1G", "memory", "memory=8X", "pids=0", "memory=1G,memory=2G"])
def test_malformed_limits(cluster: Cluster, image: str, limit: str) -> None:
    done = cluster.run(["srun", IMAGE, f"--container-limit={limit}", "echo", "started"], user="usera")
    assert done.returncode != 0 and done.stdout == ""
    subject = f"--container-limit={limit}: "
    assert [line for line in shown(done.stderr) if line.startswith(subject)], done.stderr
