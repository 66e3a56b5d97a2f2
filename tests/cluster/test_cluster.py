"""The trial cluster itself: real Slurm, separate nodes, two users, MPI, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import Run
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster import nodes
from enclos.runtime.cluster.cluster import Cluster, ClusterError
from enclos.runtime.cluster.daemons import READY_DEADLINE_S
from enclos.runtime.cluster.layout import Layout
from enclos.runtime.cluster.leftovers import await_same, snapshot
from enclos.runtime.cluster.processes import Process, pids_in

COMMAND = [sys.executable, "-m", "enclos.runtime.cluster.main"]


def command(*words: str, **options: float) -> subprocess.CompletedProcess[str]:
    """Run `enclos-cluster` as a person would."""
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def machine_state() -> tuple[list[str], list[str]]:
    """The machine's own links and mounts, which a cluster must not touch."""
    links = sorted(path.name for path in Path("/sys/class/net").iterdir())
    mounts = sorted(row.split()[4] for row in Path("/proc/self/mountinfo").read_text().splitlines())
    return links, mounts


def test_step_runs_on_all_nodes(idle: Cluster, usera: Run) -> None:
    done = usera(["srun", "-N4", "-l", "hostname"])
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["0: n1", "1: n2", "2: n3", "3: n4"]


def test_nodes_have_only_their_own_links(cluster: Cluster) -> None:
    for node in cluster.nodes:
        shown = cluster.run("ls /sys/class/net; ls /tmp; cat /etc/hostname; hostname", node=node).stdout.split()
        own = [name for name in shown if not name.startswith("enclos")]
        assert own == ["eth0", "lo", node, node]


def test_nodes_have_their_own_tmp_run_and_shm(cluster: Cluster) -> None:
    for folder in ("/tmp", "/run", "/dev/shm"):
        cluster.run(f"touch {folder}/only-n1", node="n1")
        assert cluster.run(f"ls {folder}/only-n1", node="n2").returncode != 0
        assert not Path(folder, "only-n1").exists()
        cluster.run(f"rm {folder}/only-n1", node="n1")


def test_a_test_that_fails_ends_its_command(cluster: Cluster) -> None:
    """It would wait for it, perhaps for ever: the failure was never told."""
    with pytest.raises(AssertionError), cluster.popen(["sleep", "20"], node="n1") as sleeper:
        raise AssertionError
    assert sleeper.returncode != 0, "it came to its own end"


def test_nodes_see_only_their_own_processes(cluster: Cluster) -> None:
    with cluster.popen(["sleep", "30"], node="n1") as sleeper:
        while sleeper.command() is None:
            time.sleep(0.01)
        assert "sleep 30" in cluster.run("ps axo args", node="n1").stdout
        assert "sleep 30" not in cluster.run("ps axo args", node="n2").stdout
        sleeper.kill()
        assert sleeper.wait(10) == -signal.SIGKILL


def test_home_and_shared_are_the_same_everywhere(cluster: Cluster, usera: Run) -> None:
    # 700 is how a home is made; other tests of this session open theirs to show what is in it.
    usera("chmod 700 ~; echo home > ~/note; echo all > /shared/note")
    for node in cluster.nodes:
        assert usera("cat ~/note /shared/note", node).stdout == "home\nall\n"
    assert cluster.run("cat /home/usera/note", user="userb").returncode != 0
    assert not Path("/home/usera/note").exists()
    assert not Path("/shared/note").exists()


def test_images_folder_is_roots(cluster: Cluster, usera: Run) -> None:
    assert usera("touch /images/mine").returncode != 0


def test_users_have_groups_and_accounts(idle: Cluster, usera: Run, userb: Run) -> None:
    shown = "srun bash -c 'id -Gn; echo $SLURM_JOB_ACCOUNT'"
    assert usera(shown).stdout.split() == ["usera", "common", "projecta", "alpha"]
    assert userb(shown).stdout.split() == ["userb", "common", "projectb", "beta"]


def test_account_is_not_the_users_choice(idle: Cluster, usera: Run) -> None:
    assert usera("srun -A beta printenv SLURM_JOB_ACCOUNT").stdout == "alpha\n"
    job = usera("sbatch --parsable --hold --wrap true").stdout.strip()
    refused = usera(f"scontrol update jobid={job} account=beta")
    usera(f"scancel {job}")
    assert refused.returncode != 0


def test_cpu_bind_works(idle: Cluster, usera: Run) -> None:
    done = usera("srun -w n1 -n2 --cpu-bind=map_cpu:0,1 -l sh -c 'grep Cpus_allowed_list /proc/self/status'")
    assert sorted(done.stdout.split("\n")) == ["", "0: Cpus_allowed_list:\t0", "1: Cpus_allowed_list:\t1"]


def test_exit_status_and_input_pass_through(cluster: Cluster, usera: Run) -> None:
    assert usera("srun bash -c 'exit 7'").returncode == 7
    assert cluster.run(["srun", "cat"], user="userb", input="through\n").stdout == "through\n"


def test_run_gives_a_terminal(cluster: Cluster) -> None:
    words = [*COMMAND, "run", "--name", cluster.name, "--user", "usera", "srun", "--pty", "tty"]
    script = ["script", "--quiet", "--return", "--command", " ".join(words), "/dev/null"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout
    assert re.search(r"/dev/pts/\d+", done.stdout)


def test_signal_reaches_the_command_not_its_helper(idle: Cluster) -> None:
    with idle.popen("trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.terminate()
        out, _ = running.communicate(timeout=20)
    assert (out, running.returncode) == ("caught\n", 3)


def test_openmpi_runs_bare_with_pmix(idle: Cluster, usera: Run, image: str, image_directory: str) -> None:
    done = usera(f"srun --mpi=pmix -N2 -n4 --ntasks-per-node=2 {image_directory}/usr/bin/ring --rounds 2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:4] for line in done.stdout.splitlines()[:4]] == [
        ["rank", str(rank), "node", f"n{rank // 2 + 1}"] for rank in range(4)
    ]
    assert "ring of 4: 2 rounds" in done.stdout
    assert "interface eth0" in done.stdout


def test_mpich_runs_bare_with_pmi2(idle: Cluster, usera: Run, mpich_image: str) -> None:
    folder = mpich_image.removesuffix(".sqsh")
    done = usera(f"UCX_TLS=tcp,self srun --mpi=pmi2 -N2 -n2 {folder}/usr/bin/ring --rounds 2")
    assert done.returncode == 0, done.stderr
    assert "ring of 2: 2 rounds" in done.stdout


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_image_has_all_its_libraries(mpi: str) -> None:
    directory = images.make(mpi).directory
    binaries = [path for path in directory.rglob("*.so*") if path.is_file()] + [directory / "usr/bin/ring"]
    assert len(binaries) > 10
    inside = [f"/{path.relative_to(directory)}" for path in binaries]
    for path in inside:
        done = subprocess.run(
            ["chroot", str(directory), "/lib64/ld-linux-x86-64.so.2", "--list", path],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "not found" not in done.stdout + done.stderr, path
    if mpi == "openmpi":
        assert not [path for path in inside if "libucp" in path or "libfabric" in path]


def test_image_forms_belong_to_root() -> None:
    made = images.make()
    assert made.squashfs.stat().st_uid == 0
    assert made.squashfs.read_bytes()[:4] == b"hsqs"
    listed = subprocess.run(["unsquashfs", "-lln", str(made.squashfs)], capture_output=True, text=True, check=True)
    assert {row.split()[1] for row in listed.stdout.splitlines() if row[:1] in "-dl" and "/" in row} == {"0/0"}


def test_up_twice_changes_nothing(make_cluster: Callable[..., Cluster]) -> None:
    first = make_cluster(2)
    again = Cluster.up(first.name, 2)
    assert again.record == first.record
    first.down()


def test_up_mends_a_dead_daemon(make_cluster: Callable[..., Cluster]) -> None:
    broken = make_cluster(2)
    old = broken.slurmd_pid("n2")
    os.kill(old, signal.SIGKILL)
    broken.record.daemons["n2.slurmd"].wait(10)
    assert command("status", "--name", broken.name).returncode != 0
    mended = Cluster.up(broken.name, 2)
    assert mended.slurmd_pid("n2") != old
    assert mended.run(["srun", "-N2", "true"]).returncode == 0
    mended.down()


def test_two_clusters_side_by_side(make_cluster: Callable[..., Cluster], cluster: Cluster) -> None:
    other = make_cluster(2)
    assert other.run(["srun", "-N2", "hostname"]).stdout.split() != []
    assert other.namespaces()["net"] != cluster.namespaces()["net"]
    assert cluster.run(["sinfo", "-h", "-o", "%D"]).stdout == "4\n"
    assert other.run(["sinfo", "-h", "-o", "%D"]).stdout == "2\n"
    other.down()
    assert cluster.run(["srun", "-N4", "true"]).returncode == 0


def hold_namespaces(machines: Iterable[Process]) -> list[int]:
    """Descriptors of machines' pid namespaces: while they are open, no other namespace gets the same number."""
    return [os.open(f"/proc/{machine.pid}/ns/pid", os.O_RDONLY) for machine in machines]


def assert_gone(name: str, held: list[int]) -> None:
    """Nothing of a cluster is left: state, processes in its pid namespaces, first processes with its cookie."""
    spaces = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in held]
    left = [Path(f"/proc/{pid}/cmdline").read_bytes() for space in spaces for pid in pids_in(space)]
    for descriptor in held:
        os.close(descriptor)
    assert not Layout(name).state.exists()
    assert left == []
    assert nodes.find_stray_inits(Layout(name)) == []


def test_down_leaves_nothing(make_cluster: Callable[..., Cluster]) -> None:
    before = machine_state()
    doomed = make_cluster(2)
    held = hold_namespaces(doomed.record.machines.values())
    assert machine_state() == before
    # A daemon of a user that gets away from everything Slurm knows.
    doomed.run("setsid -f sleep 1000 < /dev/null > /dev/null 2>&1", user="usera", node="n1")
    doomed.down()
    assert_gone(doomed.name, held)
    assert machine_state() == before
    assert command("down", "--name", doomed.name).returncode == 0


@pytest.mark.parametrize("victim", ["submit", "n1", "munged", "slurmctld", "n1.slurmd"])
def test_down_after_a_crash_leaves_nothing(make_cluster: Callable[..., Cluster], victim: str) -> None:
    doomed = make_cluster(2)
    held = hold_namespaces(doomed.record.machines.values())
    process = {**doomed.record.machines, **doomed.record.daemons}[victim]
    process.kill()
    Cluster.remove(doomed.name)
    assert_gone(doomed.name, held)


@pytest.mark.parametrize("delay_ms", [20, 60, 120, 200, 300])
def test_up_killed_half_way_is_cleaned_by_down(delay_ms: int) -> None:
    name = f"test-{os.getpid()}-half"
    with subprocess.Popen([*COMMAND, "up", "--name", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as up:
        while not Layout(name).state.exists():
            assert up.poll() is None
            time.sleep(0.005)
        time.sleep(delay_ms / 1000)
        up.kill()
    held = hold_namespaces(nodes.find_stray_inits(Layout(name)))
    assert command("down", "--name", name).returncode == 0
    assert_gone(name, held)


def test_a_record_with_foreign_pids_kills_nobody(make_cluster: Callable[..., Cluster]) -> None:
    doomed = make_cluster(1)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        text = doomed.layout.record.read_text()
        pid = doomed.node_pid("n1")
        doomed.layout.record.write_text(text.replace(f'"pid": {pid},', f'"pid": {bystander.pid},'))
        Cluster.remove(doomed.name)
        assert bystander.poll() is None
        bystander.kill()


def test_status_and_errors_are_words(cluster: Cluster) -> None:
    shown = command("status", "--name", cluster.name)
    assert shown.returncode == 0
    assert all(re.search(rf"^{node} +runs", shown.stdout, re.MULTILINE) for node in cluster.nodes)
    absent = command("run", "--name", "no-such", "true")
    assert (absent.returncode, absent.stderr.count("\n")) == (1, 1)
    assert "no cluster no-such is up" in absent.stderr
    stranger = command("run", "--name", cluster.name, "--user", "eve", "true")
    assert "no user eve" in stranger.stderr
    with pytest.raises(ClusterError, match="letters"):
        Cluster.up("../evil")


def test_a_reader_that_goes_away_gets_no_traceback(cluster: Cluster) -> None:
    status = subprocess.Popen(
        [*COMMAND, "status", "--name", cluster.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert status.stdout is not None
    status.stdout.close()
    _, messages = status.communicate(timeout=60)
    assert (status.returncode, messages) == (1, "")


def test_a_closed_standard_output_is_no_traceback() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "--help"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_slurm_conf_extra_replaces_our_rows(make_cluster: Callable[..., Cluster]) -> None:
    changed = make_cluster(1, cpus=3, slurm_conf_extra="KillWait=17\n", plugstack="optional")
    assert re.search(r"KillWait\s+= 17 sec", changed.run(["scontrol", "show", "config"]).stdout)
    assert changed.run(["sinfo", "-h", "-o", "%c"]).stdout == "3\n"
    changed.down()


def test_a_slurmd_that_does_not_start_is_told_at_once(make_cluster: Callable[..., Cluster]) -> None:
    """slurmctld would wait for it; with the reason, which is gone with the cluster."""
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"slurmd on n1 ended while starting: .*/dev/null/none.*Not a directory"):
        make_cluster(1, slurm_conf_extra="SlurmdSpoolDir=/dev/null/none\n")
    assert time.monotonic() - began < READY_DEADLINE_S


def test_barriers_of_mpi_hold(cluster: Cluster) -> None:
    """Slurm reads mpi.conf: with its default, a rank may leave MPI_Init while another is in it, and crash that one."""
    assert re.search(r"PMIxCollFence\s+= ring", cluster.run(["scontrol", "show", "config"]).stdout)


def test_leftovers_are_noticed(make_cluster: Callable[..., Cluster]) -> None:
    """The counting helper must see each kind of thing, or tests that use it prove nothing."""
    own = make_cluster(1)
    own.await_idle()
    before = snapshot(own)
    assert await_same(own, before, timeout=5) == []
    own.run(
        "mkdir -p /run/enclos; touch /run/enclos/extra; ip link add extra0 type veth peer name extra1;"
        "mount -t tmpfs extra /mnt; setsid -f unshare --net sleep 100 < /dev/null > /dev/null 2>&1;"
        "nft add table inet extra; nft 'add set inet extra s { type ipv4_addr; elements = { 10.1.2.3 } ; }'",
        node="n1",
    )
    rows = "\n".join(await_same(own, before, timeout=0.2))
    for word in (
        "files: +1 n1 extra",
        "links: +1 n1 extra0",
        "/mnt tmpfs",
        "processes: +1 n1 sleep",
        "net:[",
        "10.1.2.3",
    ):
        assert word in rows
    own.down()
