"""Attacks of a user with a shell on a node, as himself: each test makes the attempt and shows what becomes of it.

What the attacker runs is in attacker.py. Traffic stays on the cluster's own underlay; every attempt is bounded. Where a
test expects that something does not arrive, another one of its packets does, so that silence proves something.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from enclos.netns import names
from enclos.runtime.cluster.cluster import Cluster, Running
from enclos.runtime.cluster.daemons import DaemonFailed
from faults import await_spares

PYTHON = "/usr/bin/python3"
ATTACKER = "/shared/attacker.py"
TOOLS = "--container-mounts=/usr:/usr:ro,/shared:/shared"
# A builder that does much as the user, so that an attacker has time.
SLOW = "--container-mounts=" + ",".join(f"/usr:/mnt/{number}" for number in range(150))
DENIED = {"EPERM", "EACCES"}
VICTIM_PORT = "9999"


@pytest.fixture(scope="module", autouse=True)
def attacker(cluster: Cluster, image: str) -> None:
    """The attacker's tools, where everybody on every node can read them."""
    shutil.copy(Path(__file__).with_name("attacker.py"), cluster.layout.shared / "attacker.py")


def tells(text: str) -> list[dict[str, Any]]:
    """What attacker.py told."""
    return [json.loads(row) for row in text.splitlines() if row.startswith("{")]


def attack(cluster: Cluster, *words: str, user: str = "usera", node: str = "n1") -> list[dict[str, Any]]:
    """Run attacker.py on a node to its end."""
    done = cluster.run([PYTHON, ATTACKER, *words], user, node, timeout=60)
    assert done.returncode == 0, done.stderr
    return tells(done.stdout)


@contextmanager
def going_on(cluster: Cluster, *words: str, user: str = "usera", node: str | None = "n1") -> Iterator[Running]:
    """Something that runs meanwhile, killed at the end; it has printed its first line when the body begins."""
    with cluster.popen(list(words), user, node) as running:
        assert running.stdout is not None
        running.first = running.stdout.readline()  # type: ignore[attr-defined]
        try:
            yield running
        finally:
            running.kill()
            running.wait(20)


def step(cluster: Cluster, image: str, *words: str, user: str = "usera", options: Sequence[str] = (),
         timeout: float = 60) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """One task in a container on n1."""
    return cluster.run(["srun", "-w", "n1", f"--container-image={image}", *options, *words], user, timeout=timeout)


def inside(cluster: Cluster, image: str, *words: str, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """attacker.py in a container of usera's on n1."""
    done = step(cluster, image, PYTHON, ATTACKER, *words, options=[TOOLS, *options])
    assert done.returncode == 0, done.stderr
    return tells(done.stdout)


@contextmanager
def settings(cluster: Cluster, node: str, text: str) -> Iterator[None]:
    """Another enclos.yaml on one node."""
    path = cluster.layout.node_etc(node) / "enclos.yaml"
    before = path.read_text()
    path.write_text(text)
    cluster.restart_agent(node)
    try:
        yield
    finally:
        path.write_text(before)
        cluster.restart_agent(node)


# -- the tunnels ------------------------------------------------------------------------------------------


@contextmanager
def victim(cluster: Cluster, image: str) -> Iterator[tuple[Running, int]]:
    """A job of userb on n1 and n2 whose first task prints the datagrams it gets; with the job's VNI."""
    program = f"[ $SLURM_PROCID = 0 ] && exec {PYTHON} {ATTACKER} listen {VICTIM_PORT} 40; sleep 40"
    words = ["srun", "-N2", "-w", "n1,n2", f"--container-image={image}", TOOLS, "--container-network=job"]
    with going_on(cluster, *words, "sh", "-c", f"echo $SLURM_JOB_ID; {program}", user="userb", node=None) as running:
        assert running.stdout is not None
        rows = [running.first.strip(), running.stdout.readline().strip(), running.stdout.readline().strip()]  # type: ignore[attr-defined]
        assert '{"state": "listening"}' in rows
        job = int(next(row for row in rows if row.isdigit()))
        yield running, names.job_vni(job)


def crafted(vni: int, text: str) -> list[str]:
    """Arguments of a packet for the victim, as from its own peer on n2."""
    return [str(vni), names.mac(vni, 0), "10.77.0.2", "10.77.0.1", VICTIM_PORT, text]


def received(running: Running) -> list[str]:
    """What the victim got, up to the word `stop`."""
    assert running.stdout is not None
    rows = tells("".join(iter(running.stdout.readline, '{"state": "over"}\n')))
    return [row["got"].rstrip("\0") for row in rows if "got" in row]


def assert_unsent(told: list[dict[str, Any]]) -> None:
    """The node's guard refused each packet; some ways have no route in the first place (bound to lo)."""
    assert {row["result"] for row in told if row["way"] != "bound"} == {"EPERM"}, told
    assert {row["result"] for row in told} <= {"EPERM", "ENETUNREACH"}, told


def test_crafted_packets_reach_no_tenant(idle: Cluster, image: str) -> None:
    towards = ["10.90.0.1", "127.0.0.1", "10.90.0.2", "fd90:656e:636c::1", "::1"]
    with victim(idle, image) as (running, vni):
        for node in ("n1", "n2", "n3"):
            told = attack(idle, "inject", *crafted(vni, f"host-{node}"), *towards, node=node)
            assert_unsent(told)
        # Root of a node may not either: what root runs for others (a proxy, a container runtime) is no way in.
        told = attack(idle, "inject", *crafted(vni, "root"), *towards, user="root")
        assert_unsent(told)
        for network in ("host", "job"):
            told = inside(idle, image, "inject", *crafted(vni, network), *towards,
                          options=[f"--container-network={network}", "--overlap"])  # fmt: skip
            if network == "host":
                assert_unsent(told)
        # A machine that is no peer of the job, with its own address, then with that of a peer: the last is the
        # site's underlay to forbid, and shows that a packet made like this one does arrive.
        forged = ["forge", "10.90.0.3", "10.90.0.1", *crafted(vni, "stranger")]
        attack(idle, *forged, user="root", node="submit")
        attack(idle, "forge", "10.90.0.1", "10.90.0.1", *crafted(vni, "own"), user="root", node="submit")
        attack(idle, "forge", "10.90.0.2", "10.90.0.1", *crafted(vni + 1, "other vni"), user="root", node="submit")
        for text in ("peer", "stop"):
            attack(idle, "forge", "10.90.0.2", "10.90.0.1", *crafted(vni, text), user="root", node="submit")
        assert received(running) == ["peer"]


def assert_unbound(told: list[dict[str, Any]]) -> None:
    """Taken; but for addresses that an interface does not have."""
    assert {row["result"] for row in told if row["device"] == ""} == {"EADDRINUSE"}, told
    assert {row["result"] for row in told} <= {"EADDRINUSE", "EADDRNOTAVAIL"}, told


def test_the_tunnels_port_can_not_be_bound(cluster: Cluster) -> None:
    told = attack(cluster, "bind")
    assert len(told) == 72
    assert_unbound(told)


def test_the_port_stays_held_without_an_agent(idle: Cluster) -> None:
    idle.stop_agent("n4", signal.SIGKILL)
    try:
        assert_unbound(attack(idle, "bind", node="n4"))
        told = attack(idle, "inject", *crafted(5, "x"), "10.90.0.1", "127.0.0.1", node="n4")
        assert_unsent(told)
    finally:
        idle.start_agent("n4")


def test_an_agent_that_finds_the_port_taken_says_by_whom(idle: Cluster, image: str) -> None:
    idle.stop_agent("n4")
    # As on a node that boots: the holders are not there yet.
    idle.run("ip link delete enclos-hold4; ip link delete enclos-hold6", node="n4")
    with going_on(idle, PYTHON, ATTACKER, "hold", "60", node="n4") as holder:
        assert json.loads(holder.first)["result"] == "ok"  # type: ignore[attr-defined]
        with pytest.raises(DaemonFailed) as refused:
            idle.start_agent("n4")
        assert "4789" in str(refused.value)
        assert "61001" in str(refused.value) or "usera" in str(refused.value), refused.value
        assert "Traceback" not in str(refused.value)
    idle.start_agent("n4")
    assert_unbound(attack(idle, "bind", node="n4"))
    done = idle.run(["srun", "-w", "n4", f"--container-image={image}", "--container-network=job", "hostname"], "usera")
    assert done.stdout == "n4\n"


# -- what a job says of itself ----------------------------------------------------------------------------

FORGED = {
    "SLURM_NODELIST": "n[3-4]", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_STEP_NODELIST": "n4", "SLURM_NNODES": "2",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "7", "SLURM_JOB_UID": "61002", "SLURM_JOB_USER": "userb",
    "SLURM_JOB_ID": "77", "SLURM_JOBID": "77", "SLURM_HET_JOB_ID": "77", "SLURM_PACK_JOB_ID": "77",
    "SLURM_HET_JOB_OFFSET": "1", "SLURMD_NODENAME": "n3", "SLURM_LOCALID": "3", "SLURM_CLUSTER_NAME": "x",
}  # fmt: skip
WHO_AM_I = "cat /etc/hosts; ip addr show enclos0 | grep inet; id -u"


def identity(text: str, job: int) -> list[str]:
    """What of a container's network differs between two that are made alike: nothing but what follows from the job."""
    vni = names.job_vni(job)
    assert f"fd65:6e63:6c6f::{vni:x}:0:1 n1" in text, text
    rows = [row.replace(f"::{vni:x}:0:", "::VNI:0:").strip() for row in text.splitlines()]
    return sorted(row for row in rows if row.startswith(("10.77.", "fd65:")) or "inet" in row or row.isdigit())


def test_forged_variables_change_nothing(idle: Cluster, image: str) -> None:
    options = ["-N2", "-w", "n1,n2", f"--container-image={image}", "--container-network=job"]
    found = []
    for forged in ({}, FORGED):
        export = ",".join(["ALL", *(f"{name}={value}" for name, value in forged.items())])
        program = f'echo job $SLURM_JOB_ID; srun {" ".join(options)} "--export={export}" sh -c "$0"'
        words = ["salloc", "-Q", "-N2", "-w", "n1,n2", "sh", "-c", program, WHO_AM_I]
        done = idle.run(words, "usera")
        assert done.returncode == 0, done.stderr
        first, _, rest = done.stdout.partition("\n")
        found.append(identity(rest, int(first.split()[1])))
        idle.await_idle()
    assert found[0] == found[1]
    assert any(row.startswith("10.77.0.2") and row.endswith("n2") for row in found[0])


def test_a_batch_job_with_forged_variables_changes_nothing(idle: Cluster, image: str) -> None:
    script = idle.layout.shared / "forged.sh"
    exports = "\n".join(f"export {name}={value!r}" for name, value in FORGED.items() if "JOB_ID" not in name)
    script.write_text(f"""#!/bin/bash
own=$SLURM_JOB_ID
{exports}
export SLURM_JOB_ID=$own SLURM_NODELIST='n[3-4]' SLURM_HET_JOB_ID=77
unset SLURM_NNODES SLURM_JOB_NUM_NODES SLURM_HET_JOB_OFFSET
srun -N2 -w n1,n2 --container-image={image} --container-network=job sh -c '{WHO_AM_I}'
""")
    out = "/shared/forged.out"
    done = idle.run(["sbatch", "-W", "--parsable", "-N2", "-w", "n1,n2", "-o", out, "/shared/forged.sh"], "usera")
    text = (idle.layout.shared / "forged.out").read_text()
    assert done.returncode == 0, text + done.stderr
    rows = identity(text, int(done.stdout.split()[0]))
    assert "10.77.0.1 n1" in rows and "10.77.0.2 n2" in rows, text
    assert "61001" in rows and "61002" not in rows


def test_the_relay_goes_where_slurmstepd_listens(idle: Cluster, image: str) -> None:
    with going_on(idle, PYTHON, ATTACKER, "serve", str(4 * PATIENCE), user="userb") as service:
        port = json.loads(service.first)["port"]  # type: ignore[attr-defined]
        uri = f"pmix.evil.0;tcp4://127.0.0.1:{port}"
        variables = ",".join(f"PMIX_SERVER_URI{suffix}={uri}" for suffix in ("", "2", "21", "3", "4", "41", "_EVIL"))
        program = f"{PYTHON} {ATTACKER} connect 127.0.0.1/{port}; {PYTHON} {ATTACKER} listeners"
        done = step(idle, image, "sh", "-c", program,
                    options=["--mpi=pmix", "--container-network=job", TOOLS, f"--export=ALL,{variables}"])  # fmt: skip
        tried, listening = tells(done.stdout)
        assert tried["result"] == "ECONNREFUSED"
        # PMIx of the step is there, and nothing else.
        assert len(listening["ports"]) >= 1 and port not in listening["ports"]
        # The service does answer on the node itself.
        assert attack(idle, "connect", f"127.0.0.1/{port}")[0]["result"] == "ok"
        out, _ = service.communicate(timeout=30 * PATIENCE)
    assert tells(out)[-1] == {"came": 1}


# -- processes --------------------------------------------------------------------------------------------

HIDDEN = ("attach", "seize", "getfd", "mem", "environ", "maps", "fd", "root", "cwd", "exe", "mnt", "user")


def assert_hidden(found: dict[str, str]) -> None:
    assert {found[name] for name in HIDDEN} <= DENIED, found


def test_the_agents_processes_can_not_be_looked_into(idle: Cluster, image: str) -> None:
    options = ["-w", "n1", f"--container-image={image}", "--container-network=job", "--mpi=pmix"]
    with going_on(idle, "srun", *options, "sh", "-c", "echo; sleep 30", node=None):
        await_spares(idle)
        ours = ["enclosd", "enclos-zygote", "enclos-spare", "enclos-relay", "enclos-visitors"]
        told = attack(idle, "inspect", *ours)
        running = {row["name"][:15] for row in told}
        assert {"enclosd", "enclos-zygote", "enclos-spare", "enclos-relay"} <= running, running
        for row in told:
            assert_hidden(row["found"])
            assert row["found"]["signal"] == "EPERM"


def test_a_stopped_exec_shows_nothing_and_holds_up_nobody(idle: Cluster, image: str) -> None:
    """Stopped at the first moment at which it is the user's: while it enters."""
    words = ["srun", "-w", "n1", f"--container-image={image}", TOOLS, "sh", "-c", "echo $SLURM_JOB_ID; sleep 60"]
    with going_on(idle, *words, node=None) as job:
        name = job.first.strip()  # type: ignore[attr-defined]
        with (
            going_on(idle, PYTHON, ATTACKER, "hunt", "enclos-enter", str(5 * PATIENCE)) as hunter,
            idle.popen(["enclos", "exec", name, "true"], "usera", "n1") as stopped,
        ):
            assert hunter.stdout is not None
            assert_hidden(json.loads(hunter.stdout.readline())["found"])
            begin = time.monotonic()
            assert idle.run(["enclos", "ps"], user="userb", node="n1").returncode == 0
            assert time.monotonic() - begin < 4 * PATIENCE
            stopped.kill()


def test_a_stopped_builder_shows_nothing_and_holds_up_nobody(idle: Cluster, image: str) -> None:
    with settings(idle, "n1", f"step: {{build_deadline_seconds: {2 * PATIENCE}}}\n"):
        with going_on(idle, PYTHON, ATTACKER, "hunt", "enclos-build", str(9 * PATIENCE)) as hunter:
            begin = time.monotonic()
            with idle.popen(["srun", "-w", "n1", f"--container-image={image}", SLOW, "true"], "usera") as stopped:
                assert hunter.stdout is not None
                rows = [json.loads(hunter.stdout.readline())]
                # Another user's step, with the same image, while the builder stands still.
                other = step(idle, image, "hostname", user="userb", timeout=8 * PATIENCE)
                assert (other.stdout, other.returncode) == ("n1\n", 0), other.stderr
                assert stopped.poll() is None
                _, err = stopped.communicate(timeout=20 * PATIENCE)
            assert time.monotonic() - begin < 9 * PATIENCE
            rows += tells(hunter.communicate(timeout=20 * PATIENCE)[0])
        assert stopped.returncode != 0
        assert "enclos:" in err and f"{2 * PATIENCE} s" in err, err
        assert len(rows) >= 2  # The second attempt was stopped as well.
        for row in rows:
            assert_hidden(row["found"])
    assert step(idle, image, "hostname").stdout == "n1\n"
    assert "enclos-build" not in idle.run("ps axo comm", node="n1").stdout


def test_a_user_who_kills_his_builders_gets_a_clear_error(idle: Cluster, image: str) -> None:
    with going_on(idle, PYTHON, ATTACKER, "slay", "enclos-build", "6"):
        done = step(idle, image, "hostname", options=[SLOW])
    assert done.returncode != 0
    assert done.stdout == ""
    assert "enclos:" in done.stderr and "killed" in done.stderr, done.stderr
    assert idle.run(["sinfo", "-h", "-n", "n1", "-o", "%T"]).stdout.strip() in ("idle", "completing", "allocated")


# -- files ------------------------------------------------------------------------------------------------


def test_a_group_that_denies_can_not_be_dropped(idle: Cluster, image: str) -> None:
    path = idle.layout.shared / "denied"
    path.write_text("secret\n")
    os.chown(path, 0, int(idle.run(["getent", "group", "projecta"]).stdout.split(":")[2]))
    path.chmod(0o604)
    assert attack(idle, "groups", "/shared/denied", user="userb")[0]["read"] == "ok"  # Others may read it.
    for options in ([], ["--container-remap-root"]):
        first, second, third = inside(idle, image, "groups", "/shared/denied", options=options)
        assert first["read"] == third["read"] == "EACCES", (first, second, third)
        assert options or first["setgroups"] == "EPERM"
        assert second["setgroups"] != "ok" or options
    done = step(idle, image, "sh", "-c", "newgrp usera -c 'cat /shared/denied'; cat /shared/denied", options=[TOOLS])
    assert "secret" not in done.stdout


@pytest.fixture(scope="module")
def private(cluster: Cluster, image: str) -> Iterator[str]:
    """A directory of userb's that nobody else may enter, with a squashfs image; and a process of userb's in it."""
    cluster.run("mkdir -p ~/private && echo secret > ~/private/file && chmod 700 ~/private", "userb")
    place = cluster.layout.homes / "userb" / "private"
    shutil.copy(cluster.layout.images / Path(image).name, place / "image.sqsh")
    os.chown(place / "image.sqsh", 0, 0)
    cluster.run("ln -sfn /home/userb/private/image.sqsh ~/link.sqsh; ln -sfn /home/userb/private ~/link", "usera")
    with going_on(cluster, "sh", "-c", "cd ~/private; echo $$; exec sleep 600", user="userb") as sleeper:
        yield sleeper.first.strip()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "source",
    ["/proc/1/root", "/proc/1/cwd", "/proc/{pid}/root", "/proc/{pid}/cwd", "/proc/{pid}/fd", "/proc/self/root",
     "/proc/self/cwd", "/proc/self/fd", "/proc/self/fd/3", "/proc/thread-self/root", "/home/userb/private",
     "/home/userb/private/file", "/home/usera/link", "/home/usera/link/file", "/run/enclos/journal/job.1",
     "/run/enclos/images/1", "/root/.ssh"],
)  # fmt: skip
def test_no_source_that_the_user_could_not_open(cluster: Cluster, image: str, private: str, source: str) -> None:
    path = source.format(pid=private)
    done = step(cluster, image, "sh", "-c", "ls -R /stolen; cat /stolen; cat /stolen/file",
                options=[f"--container-mounts={path}:/stolen"])  # fmt: skip
    assert "secret" not in done.stdout
    if source in ("/proc/{pid}/fd", "/proc/self/fd"):
        # A directory of proc, which is the user's to see; of himself only.
        assert len(done.stdout.split()) < 20
        return
    assert done.returncode != 0 and done.stdout == ""
    assert f"enclos: --container-mounts={path}:/stolen: source path" in done.stderr, done.stderr


def test_no_descriptor_of_the_builder_is_a_source(cluster: Cluster, image: str) -> None:
    for number in range(3, 12):
        option = f"--container-mounts=/proc/self/fd/{number}:/stolen"
        done = step(cluster, image, "ls", "/stolen", options=[option])
        assert done.returncode != 0 and "source path" in done.stderr, (number, done.stdout, done.stderr)


@pytest.mark.parametrize("node_directory", ["images", "journal"])
def test_the_agents_directories_stay_closed(cluster: Cluster, image: str, node_directory: str) -> None:
    option = "--container-mounts=/run/enclos:/enclos"
    done = step(cluster, image, "ls", f"/enclos/{node_directory}", options=[option])
    assert done.returncode != 0
    assert done.stdout == ""


def test_modes_of_what_the_agent_keeps(cluster: Cluster) -> None:
    modes = {"agent.sock": 600, "user.sock": 666, "journal": 700, "images": 700, "stage": 755, ".": 755}
    shown = cluster.run(["stat", "-c", "%n %a %U", *modes], node="n1", cwd="/run/enclos")
    assert shown.stdout.splitlines() == [f"{name} {mode} root" for name, mode in modes.items()]


@pytest.mark.parametrize("image_path", ["/home/userb/private/image.sqsh", "/home/usera/link.sqsh"])
def test_no_image_that_the_user_could_not_open(cluster: Cluster, private: str, image_path: str) -> None:
    done = step(cluster, image_path, "true")
    assert done.returncode != 0
    assert f"enclos: --container-image={image_path}: image is not readable" in done.stderr


def test_the_kernel_mounts_no_image_that_a_user_wrote(cluster: Cluster, image: str) -> None:
    cluster.run(f"cp {image} ~/own.sqsh; ln -f ~/own.sqsh ~/hard.sqsh", "usera")
    # Root's, but anybody may write it.
    path = cluster.layout.shared / "open.sqsh"
    shutil.copy(cluster.layout.images / Path(image).name, path)
    path.chmod(0o666)
    for name in (image, "/home/usera/own.sqsh", "/home/usera/hard.sqsh", "/shared/open.sqsh"):
        done = step(cluster, name, "true")
        assert done.returncode == 0, done.stderr
    # squashfuse read them: what the kernel has mounted once stays mounted for ten minutes.
    losetup = ["losetup", "--list", "--noheadings", "--output", "BACK-INO"]
    loops = set(subprocess.run(losetup, capture_output=True, text=True, check=True).stdout.split())
    own = cluster.layout.homes / "usera/own.sqsh"
    assert not loops & {str(file.stat().st_ino) for file in (own, path)}
    assert str((cluster.layout.images / Path(image).name).stat().st_ino) in loops, "the test shows nothing"


def test_a_symlink_exchanged_during_the_build_gains_nothing(cluster: Cluster, image: str, private: str) -> None:
    cluster.run("mkdir -p ~/own && echo mine > ~/own/file; ln -sfn ~/own ~/a; ln -sfn /home/userb/private ~/b", "usera")
    seen = set()
    with going_on(cluster, "sh", "-c", f"echo; exec {PYTHON} {ATTACKER} swap /home/usera/a /home/usera/b 30"):
        for _ in range(12):
            done = step(cluster, image, "cat", "/in/file", options=["--container-mounts=/home/usera/a:/in"])
            seen.add(done.stdout)
    assert seen <= {"", "mine\n"}


@pytest.fixture(scope="module")
def own_directory(cluster: Cluster) -> str:
    """An image that the user unpacked himself, full of symlinks that lead out of it."""
    cluster.run(
        "rm -rf ~/rootfs; mkdir -p ~/rootfs/bin ~/rootfs/dev ~/rootfs/proc ~/rootfs/sys ~/rootfs/tmp; cd ~/rootfs;"
        "cp $(command -v busybox) bin/busybox; for one in sh cat ls mount touch; do ln -s busybox bin/$one; done;"
        "ln -s ../../../../../../../shared up; ln -s /shared absolute; ln -s /proc/1/root magic;"
        "ln -s /proc/self/fd fds; ln -s /shared etc; ln -s loop loop; chmod 755 ~",
        "usera",
    )
    return "/home/usera/rootfs"


TARGETS = ["/up/new", "/absolute/new", "/magic/shared/new", "/fds/0", "/loop/x", "/etc/new", "/../new"]


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_leads_out_of_the_image(cluster: Cluster, own_directory: str, target: str) -> None:
    before = sorted(os.listdir(cluster.layout.shared))
    mounts_before = cluster.run("cat /proc/self/mountinfo", node="n1").stdout
    cluster.run("mkdir -p ~/own", "usera")
    done = step(cluster, own_directory, "true", options=[f"--container-mounts=/home/usera/own:{target}"])
    assert sorted(os.listdir(cluster.layout.shared)) == before, done.stderr
    assert cluster.run("cat /proc/self/mountinfo", node="n1").stdout == mounts_before
    # The accounts are written below /etc, which leads out here.
    assert not (cluster.layout.shared / "passwd").exists()


def test_the_image_does_not_show_what_mounts_cover(idle: Cluster) -> None:
    # The node's root has mounts below it; an overlay over it would show the directories under them.
    done = step(idle, "/", "ls", "/tmp")
    assert done.returncode != 0
    assert "enclos: --container-image=/: image directory has other file systems mounted below it on n1" in done.stderr


def test_the_owner_of_a_container_gains_nothing_from_outside(idle: Cluster, image: str) -> None:
    options = [f"--container-image={image}", "--container-mounts=/:/host,/run:/secret", "--container-network=job"]
    with going_on(idle, "srun", "-w", "n1", *options, "sh", "-c", "echo; exec sleep 77", node=None):
        pid = idle.run("pgrep -n -u usera -x sleep", node="n1").stdout.strip()
        rows = {
            "umount /host/run || umount -l /host/run": "what the host mounted is locked",
            "umount /host/tmp || umount -l /host/tmp": "what the host mounted is locked",
            "mount --bind /host /mnt && ls /mnt/run/enclos": "without what is mounted below it",
            "mount -o remount,size=99G /dev/shm": "its size is the site's",
            "mount -o remount,size=99G /": "its size is the site's",
            "mount -o remount,hidepid=0 /proc": "its options are the site's",
            "mount -t sysfs none /mnt": "of a network namespace that is not his",
            "mknod /tmp/null c 1 3 && cat /tmp/null": "no devices",
            "mount -o remount,bind,rw /sys; echo 1 > /sys/class/net/lo/mtu": "root's files",
            "ip link set lo down": "not his network namespace",
            "ip link delete enclos0": "not his network namespace",
        }
        entered, *tried = [row for row in attack(idle, "enter", pid, *rows) if row.get("enter") or row.get("row")]
        results = {row["enter"]: row["result"] for row in [entered, *tried] if "enter" in row}
        # He owns the container's user namespace, so he may enter it and its mounts; never the network.
        assert results == {"user": "ok", "net": "EPERM", "mnt": "ok"}
        for row in tried:
            if "row" in row:
                assert row["status"] != 0, (row, rows[row["row"]])


def test_nobody_in_a_container_has_power_over_its_network(cluster: Cluster, image: str) -> None:
    for options in ([], ["--container-remap-root"]):
        for row in inside(cluster, image, "network_power", options=["--container-network=job", *options]):
            assert set(row.values()) <= DENIED, row


# -- the agent's sockets ----------------------------------------------------------------------------------


def test_the_agents_own_socket_is_roots(cluster: Cluster, image: str) -> None:
    program = (
        "import socket\nfor path in ('/run/enclos/agent.sock', '/enclos/agent.sock'):\n"
        " try: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(path); print('connected')\n"
        " except OSError as error: print(error.errno)"
    )
    assert cluster.run([PYTHON, "-c", program], "usera", "n1").stdout.split() == ["13", "2"]
    for options in ([], ["--container-remap-root"]):
        done = step(cluster, image, PYTHON, "-c", program,
                    options=[*options, "--container-mounts=/usr:/usr:ro,/run/enclos:/enclos"])  # fmt: skip
        assert done.stdout.split() == ["2", "13"]


def test_junk_on_the_users_socket_harms_nobody(cluster: Cluster, image: str) -> None:
    before = cluster.agent_pid("n1"), cluster.agent_log("n1").count("\n")
    for row in attack(cluster, "junk"):
        assert "status=ok" not in row["answer"], row
    assert cluster.agent_pid("n1") == before[0]
    log = cluster.agent_log("n1")
    assert "Traceback" not in log
    assert log.count("\n") - before[1] < 5, "a user fills the agent's log"
    assert cluster.run(["enclos", "ps"], "usera", "n1").returncode == 0


def assert_served(cluster: Cluster, image: str) -> None:
    """Steps are made at their usual speed, and the command line answers another user and root."""
    begin = time.monotonic()
    assert step(cluster, image, "hostname").stdout == "n1\n"
    for user in ("usera", "root"):
        done = cluster.run(["enclos", "ps"], user, "n1")
        assert done.returncode == 0, (user, done.stderr)
    assert time.monotonic() - begin < 5 * PATIENCE


def test_a_flood_of_idle_connections_stops_nobody(cluster: Cluster, image: str) -> None:
    flood = f"{PYTHON} {ATTACKER} flood 500 {30 * PATIENCE}"
    with going_on(cluster, "sh", "-c", f"{flood} & {flood} & {flood} & {flood}", user="userb"):
        time.sleep(0.5)
        assert_served(cluster, image)
        held = len(os.listdir(f"/proc/{cluster.agent_pid('n1')}/fd"))
        assert held < 200
        cluster.run(["pkill", "-u", "userb", "-f", "attacker.py"], node="n1")


def test_a_user_who_asks_without_pause_stops_nobody(cluster: Cluster, image: str) -> None:
    with going_on(cluster, PYTHON, ATTACKER, "pester", str(15 * PATIENCE), user="userb"):
        assert_served(cluster, image)


def test_a_descriptor_that_takes_ages_to_close_stops_nobody(cluster: Cluster, image: str) -> None:
    with going_on(cluster, PYTHON, ATTACKER, "linger", str(20 * PATIENCE), user="userb"):
        begin = time.monotonic()
        assert step(cluster, image, "hostname").stdout == "n1\n"
        assert cluster.run(["enclos", "ps"], node="n1").returncode == 0
        assert time.monotonic() - begin < 5 * PATIENCE


def test_killing_the_process_that_serves_users_is_mended(cluster: Cluster) -> None:
    def desk() -> list[str]:
        return cluster.run("pgrep -x enclos-visitors", node="n1").stdout.split()

    (old,) = desk()
    cluster.run(["kill", "-KILL", old], node="n1")
    assert_eventually(lambda: desk() not in ([], [old]))
    assert cluster.run(["enclos", "ps"], "usera", "n1").returncode == 0


def assert_eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- the plugin -------------------------------------------------------------------------------------------


def test_an_optional_plugin_line_lets_nothing_run_outside(idle: Cluster, image: str) -> None:
    plugstack = idle.layout.slurm / "plugstack.conf"
    before = plugstack.read_text()
    plugstack.write_text(before.replace("required", "optional"))
    idle.stop_agent("n1")
    try:
        done = step(idle, image, "sh", "-c", "echo outside; touch /shared/outside")
        assert done.returncode != 0 and done.stdout == "", done.stderr
        assert not (idle.layout.shared / "outside").exists()
        assert "enclos: agent is not running" in done.stderr
    finally:
        plugstack.write_text(before)
        idle.start_agent("n1")
    assert step(idle, image, "hostname").stdout == "n1\n"


def test_options_smuggled_past_srun_are_checked_on_the_node(idle: Cluster, image: str) -> None:
    """srun hands options on in the job's environment, where a user can write what he likes."""
    for name, value in (("network", "blue"), ("mounts", "/proc/1/root:/stolen"), ("workdir", "../..")):
        smuggled = f"_SLURM_SPANK_OPTION_enclos_container_{name}"
        done = idle.run(["srun", "-w", "n1", f"--container-image={image}", "sh", "-c", "ls /stolen; pwd"], "usera",
                        env={smuggled: value})  # fmt: skip
        assert "secret" not in done.stdout
        assert done.returncode != 0 or done.stdout == "/\n", (name, done.stdout, done.stderr)
