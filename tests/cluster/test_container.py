"""What a container is, as its programs see it: who they are, which files they find, what they may not do.

What is looked at is what a user could look at: `id`, `ls`, /proc/self, exit codes. Only the images and the files that
are mounted are made from outside. All steps run on n1 unless several nodes matter.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from boxes import BOX, BOX_DIRECTORY, COMMON, PROJECTA, USERA, bare, make_box, shell, srun
from conftest import PATIENCE, said
from enclos.runtime import answer
from enclos.runtime.cluster.cluster import Cluster, Running

CONFIG = """\
rootfs: {writable: false, remap_root: true}
mounts: {home: true, site: ["/shared/site:/site:ro", "tmpfs:/scratch:size=1M"]}
step: {default_network: none, networks: [none, host]}
devices: {nodes: [/dev/fuse]}
"""
DEVICES = {
    "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
    "urandom", "zero",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("box", "shared")

both_forms = pytest.mark.parametrize("form", [BOX, BOX_DIRECTORY], ids=["file", "directory"])


# -- who ---------------------------------------------------------------------------------------------------


@both_forms
def test_identity_is_the_nodes(idle: Cluster, form: str) -> None:
    script = "id -u; id -g; id -G; id -un; id -gn; whoami; cat /proc/self/loginuid"
    assert shell(idle, script, image=form) == bare(idle, script)


def test_groups_count_on_mounted_files(idle: Cluster) -> None:
    script = "for f in for-projecta for-projectb not-for-common for-all; do cat /m/$f 2>/dev/null || echo no; done"
    inside = shell(idle, script, "--container-mounts=/shared:/m")
    assert inside == "for-projecta\nno\nno\nfor-all\n" == bare(idle, script.replace("/m/", "/shared/"))


def test_a_group_cannot_be_dropped(idle: Cluster) -> None:
    """Neither directly nor in a user namespace of one's own: else a file that denies a group could be read."""
    script = """
        setgroups=$(cat /proc/self/setgroups)
        read=$(unshare -Ur cat /m/not-for-common 2>&1) && echo "read $read"
        echo $setgroups"""
    done = srun(idle, "--container-mounts=/shared:/m", "sh", "-c", script)
    assert done.stdout == "deny\n"


def test_files_belong_to_the_user_and_his_group(idle: Cluster, shared: Path) -> None:
    shell(
        idle,
        "touch /m/made; touch /m/given; chgrp common /m/given; mkdir /m/folder",
        "--container-mounts=/shared/data:/m",
    )
    owners = {name: (shared / "data" / name).stat() for name in ("made", "given", "folder")}
    assert {name: (row.st_uid, row.st_gid) for name, row in owners.items()} == {
        "made": (USERA, PROJECTA),
        "given": (USERA, COMMON),
        "folder": (USERA, PROJECTA),
    }


def test_accounts_of_image_and_node_are_merged(idle: Cluster) -> None:
    lines = shell(idle, "cat /etc/passwd; echo; cat /etc/group").split("\n\n")
    assert lines[0] == "usera:x:61001:61001::/home/usera:/bin/sh"
    assert sorted(lines[1].splitlines()) == [
        "common:x:61100:",
        "imagegroup:x:900:",
        "projecta:x:61101:",
        "root:x:0:",
        "usera:x:61001:",
    ]


def test_another_user_is_another(idle: Cluster) -> None:
    done = srun(idle, "-n1", "id", user="userb")
    assert done.stdout == "uid=61002(userb) gid=61002(userb) groups=61002(userb),61100(common),61102(projectb)\n"


@both_forms
def test_remapped_root(idle: Cluster, form: str, shared: Path) -> None:
    script = """
        id -u; id -un; id -g; echo ~; pwd
        touch /new; chown 33:33 /new; stat -c %u:%g /new
        chgrp 900 /m/of-root-inside 2>/dev/null || touch /m/of-root-inside
        su -c 'true' nobody 2>/dev/null || true
        mount -t tmpfs none /srv 2>/dev/null || echo cannot mount
        hostname other 2>/dev/null || echo cannot name
        cat /m/for-projecta; cat /m/not-for-common 2>/dev/null || echo still denied"""
    out = shell(idle, script, "--container-remap-root", "--container-mounts=/shared:/m", image=form)
    assert out.splitlines() == [
        "0", "root", "0", "/root", "/", "0:0", "cannot mount", "cannot name", "for-projecta", "still denied",
    ]  # fmt: skip
    status = (shared / "of-root-inside").stat()
    assert (status.st_uid, status.st_gid) == (USERA, USERA)


def test_remapped_root_keeps_the_documented_capabilities(idle: Cluster) -> None:
    mask = f"{answer.ROOT_CAPABILITIES:016x}"
    rows = shell(idle, "grep -E 'Cap|NoNew|Seccomp:' /proc/self/status", "--container-remap-root").splitlines()
    none = "0" * 16
    assert dict(row.split(":\t") for row in rows) == {
        "CapInh": none, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": none, "NoNewPrivs": "1",
        "Seccomp": "2",
    }  # fmt: skip


def test_set_user_id_has_no_effect(idle: Cluster) -> None:
    """Of the image, in both forms, and of a mount."""
    script = "/suid/id -u; /suid/id -g; stat -c %a /suid/id"
    assert shell(idle, script) == "61001\n61001\n6755\n"
    assert shell(idle, script, image=BOX_DIRECTORY) == "61001\n61001\n6755\n"
    mounted = "/m/suid/id -u; grep NoNew /proc/self/status"
    assert shell(idle, mounted, "--container-mounts=/images/box:/m") == "61001\nNoNewPrivs:\t1\n"


# -- namespaces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "shared_kinds"), [("host", {"net", "pid", "time"}), ("none", {"pid", "time"}), ("job", {"pid", "time"})]
)
def test_namespaces(idle: Cluster, network: str, shared_kinds: set[str]) -> None:
    script = "for ns in cgroup ipc mnt net pid time user uts; do readlink /proc/self/ns/$ns; done"
    on_node = set(idle.run(script, node="n1").stdout.split())
    inside = set(shell(idle, script, f"--container-network={network}").split())
    assert {row.partition(":")[0] for row in on_node & inside} == shared_kinds
    assert len(inside) == 8


def test_interfaces(idle: Cluster) -> None:
    for network, wanted in (("none", ["lo"]), ("job", ["enclos0", "lo"])):
        names = shell(idle, "ls /sys/class/net; ip -o link | wc -l", f"--container-network={network}").split()
        assert names == [*wanted, str(len(wanted))]
    assert shell(idle, "ls /sys/class/net") == idle.run("ls /sys/class/net", node="n1").stdout


def test_tasks_of_a_node_share_one_container(idle: Cluster) -> None:
    script = """
        readlink /proc/self/ns/mnt
        cd /dev/shm
        if [ $SLURM_LOCALID = 0 ]; then echo "from $(hostname)" >new; mv new note; fi
        while [ ! -e /dev/shm/note ]; do sleep 0.02; done
        cat /dev/shm/note
        touch /tmp/$SLURM_LOCALID; while [ $(ls /tmp | wc -l) != 3 ]; do sleep 0.02; done"""
    words = ["srun", "-w", "n[1-2]", "-N2", "--ntasks-per-node=3", f"--container-image={BOX}", "sh", "-ec", script]
    rows = idle.run(words, "usera", timeout=30).stdout.splitlines()
    namespaces = [row for row in rows if row.startswith("mnt:")]
    assert (len(namespaces), len(set(namespaces))) == (6, 2)
    assert sorted(set(rows) - set(namespaces)) == ["from n1", "from n2"]
    assert len(rows) == 12


def test_other_processes_are_invisible(idle: Cluster) -> None:
    """Those of the node and of another user; the step's own are there."""
    with idle.popen(["srun", "-w", "n1", "sleep", "30"], "userb") as other:
        await_process(idle, "n1", "sleep")
        rows = shell(idle, "sleep 1 & ps -o user,args; ls -d /proc/[0-9]* | wc -l; [ ! -e /proc/1 ] && echo no init")
        other.terminate()
    lines = rows.splitlines()
    assert lines[-1] == "no init"
    assert {line.split()[0] for line in lines[:-2]} == {"USER", "usera"}
    assert "30" not in rows.split()


def test_nested_containers_are_possible(idle: Cluster) -> None:
    script = """
        unshare -Urm sh -ec 'id -u; mount -t tmpfs none /srv; touch /srv/x; ls /srv'
        unshare -Urmpf sh -ec 'mount -t proc proc /proc; echo /proc/[0-9]*'
        unshare -Urn ls /sys/class/net | wc -l >/dev/null; ls /srv"""
    assert shell(idle, script) == "0\nx\n/proc/1\n"


# -- the root file system ----------------------------------------------------------------------------------


def test_files_of_a_squashfs_are_the_users(idle: Cluster) -> None:
    script = "stat -c %u:%g / /bin/busybox /opt/file; echo mine >>/opt/file; cat /opt/file; rm -r /opt/deep; ls /opt"
    assert shell(idle, script) == "61001:61001\n" * 3 + "of the image\nmine\nfile\n"


def test_files_of_a_directory_stay_roots(idle: Cluster, box: Path) -> None:
    """The image is not the user's, and nothing is written into it."""
    before = sorted(path.name for path in box.rglob("*"))
    script = "stat -c %u /bin/busybox; (echo x >/opt/file) 2>/dev/null || echo denied; echo x >/tmp/f; cat /tmp/f"
    assert shell(idle, script, image=BOX_DIRECTORY) == "65534\ndenied\nx\n"
    assert sorted(path.name for path in box.rglob("*")) == before


def test_squashfs_with_files_of_others(idle: Cluster, tmp_path: Path) -> None:
    """Made without -all-root: they can't be shown as the user's, but what a container needs is made all the same."""
    shutil.copytree(idle.layout.images / "box", tmp_path / "others", symlinks=True)
    for path in [tmp_path / "others", *(tmp_path / "others").rglob("*")]:
        os.chown(path, 1000, 1000, follow_symlinks=False)
    target = str(idle.layout.images / "others.sqsh")
    command = ["mksquashfs", str(tmp_path / "others"), target, "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    script = "stat -c %u /bin/busybox; touch ~/x /tmp/x; hostname; cat /opt/file"
    done = srun(idle, "sh", "-ec", script, image="/images/others.sqsh")
    assert done.stdout == "65534\nn1\nof the image\n"
    assert [row for row in said(done.stderr) if not row.endswith("can't be replaced by its user, ignoring")] == []


def test_directory_of_the_user_is_his(idle: Cluster) -> None:
    """One that he unpacked himself may be changed inside, and stays as it was."""
    place = idle.layout.shared / "own-image"
    shutil.copytree(idle.layout.images / "box", place, symlinks=True)
    for path in [place, *place.rglob("*")]:
        os.chown(path, USERA, USERA, follow_symlinks=False)
    script = "stat -c %u /bin/busybox; echo changed >/opt/file; cat /opt/file; rmdir /srv; mkdir /opt/deep/x; id -u"
    assert shell(idle, script, image="/shared/own-image") == "61001\nchanged\n61001\n"
    assert (place / "opt/file").read_text() == "of the image\n"
    assert (place / "srv").is_dir() and not (place / "opt/deep/x").exists()


@both_forms
def test_writes_vanish_with_the_step(idle: Cluster, form: str) -> None:
    script = "[ ! -e /tmp/x ]; [ ! -e ~/x ]; echo x >/tmp/x; echo x >~/x; cat /tmp/x ~/x"
    for _ in range(2):
        assert shell(idle, script, image=form) == "x\nx\n"


def test_steps_at_the_same_time_do_not_share_files(idle: Cluster) -> None:
    script = "touch /tmp/$SLURM_STEP_ID; sleep 0.5; ls /tmp"
    step = f"srun -n1 --overlap --container-image={BOX} sh -c '{script}'"
    done = idle.run(
        f'salloc -Q -w n1 bash -c "{step.replace("$", chr(92) + "$")} & {step.replace("$", chr(92) + "$")}; wait"',
        "usera",
    )
    assert sorted(done.stdout.split()) == ["0", "1"], done.stderr


def test_size_limit_cannot_be_changed(idle: Cluster) -> None:
    script = "for d in /dev/shm /; do unshare -Urm mount -o remount,size=20G $d; done; df -m /dev/shm /"
    done = srun(idle, "sh", "-c", script)
    rows = [row.split() for row in done.stdout.splitlines()[1:]]
    assert rows[1][1] == "2048"
    assert rows[0][1] != "20480"


# -- mounts ------------------------------------------------------------------------------------------------


def test_forms_of_mounts(idle: Cluster, shared: Path) -> None:
    """A folder, a file onto a file and onto nothing, a path below missing folders, the same path, a tmpfs."""
    mounts = ",".join(
        [
            "/shared/data:/m",
            "/shared/for-all:/opt/file",
            "/shared/for-all:/new/deep/er/file",
            "/shared/data:/a/b/c",
            "/shared/site",
            "tmpfs:/fast:size=1M+mode=700",
            "/shared/nothing:/gone:nofail",
            "/shared/data:/x/../y/z",
        ]
    )
    script = """
        echo 1 >/m/one; cat /a/b/c/one /y/z/one; cat /opt/file /new/deep/er/file /shared/site/file
        stat -c '%a %u' /fast; dd if=/dev/zero of=/fast/f bs=64k count=99 2>/dev/null || stat -c %s /fast/f
        [ -e /gone ] || echo gone"""
    assert shell(idle, script, f"--container-mounts={mounts}").splitlines() == [
        "1", "1", "for-all", "for-all", "of the site", "700 61001", "1048576", "gone",
    ]  # fmt: skip


def test_relative_sources(idle: Cluster, shared: Path) -> None:
    """They start at the job's working directory."""
    mounts = "./data:/m,.:/all,../shared/site:/s"
    out = shell(idle, "touch /m/r; ls /all/data/r; ls /s", "--chdir=/shared", f"--container-mounts={mounts}")
    assert out == "/all/data/r\nfile\n"


def test_escaped_names(idle: Cluster, shared: Path) -> None:
    (shared / "a,b:c").mkdir()
    (shared / "a,b:c/f").touch()
    assert shell(idle, "ls '/x,y'", "--container-mounts=/shared/a\\,b\\:c:/x\\,y") == "f\n"


def test_read_only_holds_for_submounts(idle: Cluster) -> None:
    with mounted_on_node(idle, "n1", "/run/tree/sub"):
        idle.run("mkdir -p /run/tree/plain; chmod 777 /run/tree /run/tree/plain", node="n1")
        script = "for d in /m /m/plain /m/sub; do touch $d/x 2>/dev/null && echo wrote $d; done; echo end"
        assert shell(idle, script, "--container-mounts=/run/tree:/m:ro") == "end\n"
        assert shell(idle, script, "--container-mounts=/run/tree:/m") == "wrote /m\nwrote /m/plain\nwrote /m/sub\nend\n"


def test_what_the_node_mounts_later_appears(idle: Cluster) -> None:
    """As automounted homes do; what is mounted inside does not appear on the node."""
    idle.run("mkdir -p /run/later/sub", node="n1")
    script = "echo ready; while [ ! -e /m/sub/there ]; do sleep 0.05; done; echo seen"
    words = ["srun", "-w", "n1", f"--container-image={BOX}", "--container-mounts=/run/later:/m", "sh", "-c", script]
    with idle.popen(words, "usera") as running, ended_in_time(running):
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        with mounted_on_node(idle, "n1", "/run/later/sub"):
            idle.run("touch /run/later/sub/there", node="n1")
            assert running.stdout.readline() == "seen\n"
            running.communicate(timeout=20)


def test_links_of_the_image_stay_inside(idle: Cluster, shared: Path) -> None:
    """`outside` leads to the host's /shared, if it is taken for a path of the host."""
    before = sorted(path.name for path in shared.iterdir())
    mounts = "/shared/data:/outside/target,/shared/data:/inside/target,/shared/for-all:/away"
    script = "ls -d /shared/target /opt/deep/target; cat /nowhere/at/all; touch /outside/target/x; ls /shared"
    out = shell(idle, script, f"--container-mounts={mounts}")
    assert out.split() == ["/opt/deep/target", "/shared/target", "for-all", "target"]
    assert sorted(path.name for path in shared.iterdir()) == before


def test_links_of_accounts_are_replaced(idle: Cluster) -> None:
    """/etc/passwd of the box is a link to a file of the host's, resolv.conf one to nowhere."""
    script = "stat -c %F /etc/passwd /etc/resolv.conf; cat /etc/resolv.conf"
    out = shell(idle, script)
    resolv = idle.run("cat /etc/resolv.conf", node="n1").stdout
    assert out == f"regular file\nregular file\n{resolv}"


def test_mounts_shadow_what_enclos_wrote(idle: Cluster, shared: Path) -> None:
    assert shell(idle, "cat /etc/hosts", "--container-mounts=/shared/for-all:/etc/hosts") == "for-all\n"


def test_noexec_and_no_symlinks(idle: Cluster, shared: Path) -> None:
    place = shared / "data/tool"
    place.write_text("#!/bin/sh\necho ran\n")
    place.chmod(0o755)
    assert shell(idle, "/m/tool", "--container-mounts=/shared/data:/m") == "ran\n"
    done = srun(idle, "--container-mounts=/shared/data:/m:noexec", "sh", "-c", "/m/tool")
    assert (done.returncode, done.stdout) == (126, "")


# -- /dev, /etc, /sys --------------------------------------------------------------------------------------


@both_forms
def test_devices(idle: Cluster, form: str) -> None:
    script = "ls -A /dev; echo x >/dev/null; head -c 3 /dev/zero | wc -c; [ -c /dev/ptmx ]"
    *names, zeros = shell(idle, script, image=form).split()
    assert (set(names), zeros) == (DEVICES, "3")
    denied = srun(idle, "sh", "-c", "mknod /tmp/disk b 7 0; touch /dev/new; rm /dev/null", image=form)
    assert len(said(denied.stderr)) >= 3


def test_terminal(idle: Cluster, shared: Path) -> None:
    """The one of --pty has its name; another user's is closed; programs may make new ones."""
    with idle.popen(["script", "-qc", "srun -w n1 --pty sleep 30", "/dev/null"], "userb") as other:
        await_process(idle, "n1", "sleep")
        theirs = idle.run("stat -c '%U %n' /dev/pts/* | sed -n 's/^userb //p'", node="n1").stdout.split()[0]
        (shared / "terminal").write_text(
            f"""tty; /usr/bin/stty size >/dev/null && echo sized
            /usr/bin/script -q -c 'tty >/dev/shm/inner; test -t 0' /dev/null; cat /dev/shm/inner
            (echo x >{theirs}) 2>/dev/null || echo closed"""
        )
        words = (
            f"srun -w n1 --pty --container-image={BOX} --container-mounts=/shared:/m,/usr,/lib,/lib64 sh /m/terminal"
        )
        done = idle.run(["script", "-qec", words, "/dev/null"], "usera")
        other.terminate()
    own, sized, inner, closed = done.stdout.replace("^@", "").split()  # as the end of script's input is echoed
    assert (sized, closed) == ("sized", "closed")
    assert re.fullmatch(r"/dev/pts/\d+", own)
    assert re.fullmatch(r"/dev/pts/\d+", inner) and inner not in (own, theirs)


def test_device_nodes_of_mounts_are_dead(idle: Cluster, shared: Path) -> None:
    node = shared / "data/null"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    node.chmod(0o666)
    done = srun(idle, "--container-mounts=/shared/data:/m", "sh", "-c", "echo x >/m/null")
    node.unlink()
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


def test_names_of_host(idle: Cluster) -> None:
    assert (
        shell(idle, "hostname; cat /etc/hostname; cat /etc/hosts")
        == idle.run("hostname; hostname; cat /etc/hosts", node="n1").stdout
    )


def test_names_in_a_job_network(idle: Cluster) -> None:
    """The nodes' names lead to the overlay alone, all others stay."""
    words = ["srun", "-w", "n[1-2]", "-N2", f"--container-image={BOX}", "--container-network=job", "-l", "sh", "-c"]
    done = idle.run([*words, "grep -wE 'n1|n2|n3' /etc/hosts | sort"], "usera")
    for task in ("0", "1"):
        rows = [row.split(": ", 1)[1] for row in sorted(done.stdout.splitlines()) if row.startswith(f"{task}:")]
        named = {name: [row.split()[0] for row in rows if name in row.split()[1:]] for name in ("n1", "n2", "n3")}
        assert [address for address in named["n1"] if "." in address] == ["10.77.0.1"]
        assert [address for address in named["n2"] if "." in address] == ["10.77.0.2"]
        assert named["n3"] == ["10.90.0.3"]
        assert all(address.startswith(("10.77.", "fd65:")) for address in named["n1"] + named["n2"])


def test_kernel_file_systems_are_safe(idle: Cluster) -> None:
    script = """
        (echo 1 >/proc/sys/vm/drop_caches) 2>/dev/null && echo wrote
        (echo x >/proc/sys/kernel/hostname) 2>/dev/null && echo wrote
        (echo 1 >/sys/class/net/lo/mtu) 2>/dev/null && echo wrote
        (echo c >/proc/sysrq-trigger) 2>/dev/null && echo wrote
        grep -E ' /(proc|sys|dev) ' /proc/mounts | cut -d' ' -f2-4 | cut -d, -f1-4"""
    done = srun(idle, "--container-remap-root", "sh", "-c", script)
    assert "wrote" not in done.stdout
    rows = dict(row.split(" ", 1) for row in done.stdout.splitlines())
    assert set(rows) == {"/proc", "/sys", "/dev"}
    assert rows["/sys"].startswith("sysfs ro,nosuid,nodev,noexec")


# -- ways to start -----------------------------------------------------------------------------------------


def test_slurms_own_option(idle: Cluster) -> None:
    done = idle.run(["srun", "-w", "n1", f"--container={BOX}", "cat", "/opt/file"], "usera")
    assert (done.stdout, done.returncode) == ("of the image\n", 0)


def test_batch_script_and_its_steps(idle: Cluster, shared: Path) -> None:
    """The options of sbatch hold for the script and, where srun can be reached, for its steps."""
    script = shared / "batch.sh"
    script.write_text("#!/bin/sh\ncat /opt/file\nid -u\necho $0 $*\n")
    script.chmod(0o755)
    words = f"sbatch -W -w n1 -o /shared/batch.out --container-image={BOX} /shared/batch.sh one two"
    done = idle.run(words, "usera")
    lines = (shared / "batch.out").read_text().splitlines()
    assert done.returncode == 0, lines
    assert lines[:2] == ["of the image", "61001"]
    assert lines[2].endswith("/slurm_script one two")


def test_steps_of_a_batch_script_outside(idle: Cluster, shared: Path) -> None:
    """A script on the node starts steps in containers of their own choice."""
    step = f"srun --container-image={BOX} cat /opt/file; srun --container-image={BOX_DIRECTORY} stat -c %u /bin/busybox"
    done = idle.run(["sbatch", "-W", "-w", "n1", "-o", "/shared/steps.out", "--wrap", f"{step}; hostname"], "usera")
    assert done.returncode == 0
    assert (shared / "steps.out").read_text() == "of the image\n65534\nn1\n"


def test_allocation(idle: Cluster) -> None:
    """Options of salloc hold for its steps, which may say otherwise."""
    script = f"srun cat /opt/file; srun --container-image={BOX_DIRECTORY} stat -c %u /bin/busybox; hostname"
    done = idle.run(["salloc", "-Q", "-w", "n1", f"--container-image={BOX}", "bash", "-c", script], "usera")
    assert done.stdout == "of the image\n65534\nsubmit\n", done.stderr


def test_signals_and_the_end(idle: Cluster) -> None:
    script = "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.05; done"
    with (
        idle.popen(["srun", "-w", "n1", f"--container-image={BOX}", "sh", "-c", script], "usera") as running,
        ended_in_time(running),
    ):
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        job = idle.run("squeue -h -u usera -o %A").stdout.split()[0]
        idle.run(f"scancel -s USR1 {job}.0")
        out, _ = running.communicate(timeout=20)
    assert (out, running.returncode) == ("caught\n", 9)


# -- a site that sets things otherwise ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(make_cluster: Callable[..., Cluster]) -> Cluster:
    made = make_cluster(1, config=CONFIG)
    make_box(made.layout.images)
    (made.layout.shared / "site").mkdir()
    (made.layout.shared / "site/file").write_text("of the site\n")
    return made


def test_site_defaults(strict: Cluster) -> None:
    strict.await_idle()
    script = """
        id -u; echo ~; ls /sys/class/net; cat /site/file; [ -c /dev/fuse ] && echo fuse
        touch /x 2>/dev/null || echo ro; touch /site/x 2>/dev/null || echo ro
        touch /scratch/x; dd if=/dev/zero of=/scratch/x bs=64k count=99 2>/dev/null || stat -c %s /scratch/x"""
    out = shell(strict, script).splitlines()
    assert out == ["0", "/root", "lo", "of the site", "fuse", "ro", "ro", "1048576"]


def test_user_overrides_site_defaults(strict: Cluster) -> None:
    strict.await_idle()
    options = ("--no-container-remap-root", "--container-writable", "--no-container-mount-home")
    out = shell(strict, "id -u; touch /x; ls -A ~; ls /sys/class/net | wc -l", *options, "--container-network=host")
    assert out.splitlines()[0] == "61001"
    assert int(out.splitlines()[-1]) > 1


def test_site_forbids_a_network(strict: Cluster) -> None:
    strict.await_idle()
    done = srun(strict, "--container-network=job", "true")
    assert done.returncode == 1
    assert "enclos: --container-network=job: not allowed at this site on n1\nhint: allowed: none, host" in done.stderr


def test_site_mount_that_is_missing(strict: Cluster) -> None:
    strict.await_idle()
    (strict.layout.shared / "site").rename(strict.layout.shared / "moved")
    try:
        done = srun(strict, "true")
    finally:
        (strict.layout.shared / "moved").rename(strict.layout.shared / "site")
    assert done.returncode == 1
    assert "enclos: mounts.site=/shared/site:/site: source path does not exist on n1" in done.stderr


# -- helpers -----------------------------------------------------------------------------------------------


@contextmanager
def mounted_on_node(cluster: Cluster, node: str, path: str) -> Iterator[None]:
    """A tmpfs that everybody may write, mounted on a node."""
    done = cluster.run(f"mkdir -p {path} && mount -t tmpfs -o mode=1777 none {path}", node=node)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        cluster.run(f"umount {path}", node=node)


@contextmanager
def ended_in_time(running: Running, seconds: float = 20) -> Iterator[None]:
    """Kill a command that says nothing, so that a reader of its output gets the end of it."""
    timer = threading.Timer(seconds, running.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def await_process(cluster: Cluster, node: str, name: str) -> None:
    deadline = time.monotonic() + 20 * PATIENCE
    while name not in names_of(cluster.processes(node)):
        assert time.monotonic() < deadline, f"no {name} on {node}"
        time.sleep(0.02)


def names_of(pids: Sequence[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
