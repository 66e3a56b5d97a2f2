"""--container-mounts: every form of a mount, and every flag. One test per behaviour of docs/pyxis.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from boxes import bare, shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


def mounted(cluster: Cluster, mounts: str, script: str, *options: str) -> str:
    """What a script prints in a container with these mounts."""
    return shell(cluster, script, *options, f"--container-mounts={mounts}")


def propagation(cluster: Cluster, flag: str) -> str:
    """The optional fields of the mount at /m (proc_pid_mountinfo(5)), without numbers."""
    line = mounted(cluster, f"/shared/site:/m:{flag}", "grep ' /m ' /proc/self/mountinfo")
    return re.sub(r"\d+", "N", " ".join(line.split(" - ")[0].split()[6:]))


def test_absolute_directory(idle: Cluster) -> None:
    script = "cat /test-mnt/file; grep -c ' /test-mnt ' /proc/mounts"
    assert mounted(idle, "/shared/site:/test-mnt", script) == "of the site\n1\n"


def test_regular_file(idle: Cluster) -> None:
    assert mounted(idle, "/shared/for-all:/not/there/yet", "cat /not/there/yet") == "for-all\n"


def test_character_device(idle: Cluster) -> None:
    assert mounted(idle, "/dev/null:/null", "[ -c /null ]; (: >/null) 2>/dev/null || echo closed") == "closed\n"


def test_short_form(idle: Cluster) -> None:
    assert mounted(idle, "/shared/site", "cat /shared/site/file") == "of the site\n"


def test_current_working_directory(idle: Cluster) -> None:
    assert mounted(idle, "./:/test-mnt,.:/other", "cat /test-mnt/file /other/file", "--chdir=/shared/site") == (
        "of the site\nof the site\n"
    )


def test_multiple_entries(idle: Cluster) -> None:
    mounts = "/shared/site:/one,/dev/null:/two,/shared/for-all:/host/three"
    script = "for m in /one /two /host/three; do grep -c \" $m \" /proc/mounts; done"
    assert mounted(idle, mounts, script) == "1\n1\n1\n"


def test_spaces(idle: Cluster, shared: Path) -> None:
    (shared / "two words").mkdir(exist_ok=True)
    (shared / "two words/f").touch()
    assert mounted(idle, "/shared/two words:/with  space", "ls '/with  space'") == "f\n"


def test_relative_target(idle: Cluster) -> None:
    assert mounted(idle, "/shared/site:./here", "cat /here/file") == "of the site\n"


def test_target_that_leads_out(idle: Cluster) -> None:
    done = srun(idle, "--container-mounts=/home:../home", "true")
    assert done.returncode != 0
    assert "Cross-device link" in done.stderr


def test_missing_source(idle: Cluster) -> None:
    done = srun(idle, "--container-mounts=/shared/nothing:/x", "true")
    assert done.returncode == 1
    assert "enclos: --container-mounts=/shared/nothing:/x: source path does not exist on n1\n" in done.stderr


def test_unreadable_source(idle: Cluster) -> None:
    done = srun(idle, "--container-mounts=/etc/shadow:/shadow", "true")
    assert done.returncode == 1
    assert "source path is not accessible (permission denied)" in done.stderr


def test_read_only(idle: Cluster) -> None:
    done = srun(idle, "--container-mounts=/shared/data:/m:ro", "touch", "/m/foo")
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    assert mounted(idle, "/shared/data:/m:rw", "touch /m/foo && rm /m/foo && echo wrote") == "wrote\n"


@pytest.mark.parametrize("flag", ["bind", "rbind", "bind+ro"])
def test_bind_and_rbind_are_the_same(idle: Cluster, flag: str) -> None:
    """What is mounted below comes along: without, the files under it would appear."""
    on_node = bare(idle, "stat -fc %T /dev/pts; stat -c %t:%T /dev/pts/ptmx")
    assert mounted(idle, f"/dev:/m:{flag}", "stat -fc %T /m/pts; stat -c %t:%T /m/pts/ptmx") == on_node


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("private", ""), ("rprivate", ""), ("slave", "master:N"), ("rslave", "master:N"), ("rw", "master:N"),
        ("shared", "shared:N master:N"), ("rshared", "shared:N master:N"), ("unbindable", "unbindable"),
        ("runbindable+ro", "unbindable"),
    ],
)  # fmt: skip
def test_propagation(idle: Cluster, flag: str, fields: str) -> None:
    assert propagation(idle, flag) == fields


def test_flags_without_effect(idle: Cluster) -> None:
    flags = "suid+dev+atime+diratime+defaults+async+silent+relatime+norelatime"
    assert mounted(idle, f"/images/box:/m:{flags}", "/m/suid/id -u; cat /m/opt/file") == "61001\nof the image\n"


def test_nofail(idle: Cluster) -> None:
    assert mounted(idle, "/shared/nothing:/m:nofail,umount:/none:nofail", "[ -e /m ] || echo left out") == "left out\n"


@pytest.mark.parametrize("flag", ["x-create=auto", "x-create=dir", "x-create=file"])
def test_x_create(idle: Cluster, flag: str) -> None:
    mounts = f"/shared/site:/new/folder:{flag},/shared/for-all:/new/file:{flag}"
    assert mounted(idle, mounts, "cat /new/folder/file /new/file") == "of the site\nfor-all\n"


def test_tmpfs(idle: Cluster) -> None:
    script = "stat -fc %T /t; stat -c %a /t /u; df -k /t | tail -1 | awk '{print $2}'; touch /t/x /u/x"
    assert mounted(idle, "tmpfs:/t:size=1M,tmpfs:/u:mode=700+ro", f"{script} 2>/dev/null || echo ro") == (
        "tmpfs\n1777\n700\n1024\nro\n"
    )


def test_umount(idle: Cluster) -> None:
    """In order: what came before can be taken away, and what was under it appears."""
    mounts = "/shared/site:/opt,umount:/opt:x-detach,umount:/dev/mqueue"
    assert mounted(idle, mounts, "cat /opt/file; grep -c mqueue /proc/mounts || true") == "of the image\n0\n"
    done = srun(idle, "--container-mounts=umount:/opt", "true")
    assert done.returncode == 1
    failed = "--container-mounts=umount:/opt: couldn't unmount in the container"
    assert f"{failed} (nothing is mounted there that could be taken away)" in done.stderr


def test_umount_uncovers_nothing_of_the_node(idle: Cluster) -> None:
    """A mount below a source is locked: the files under it stay hidden."""
    done = srun(idle, "--container-mounts=/dev:/m,umount:/m/pts", "true")
    assert done.returncode == 1
    assert "couldn't unmount" in done.stderr


def test_devpts(idle: Cluster) -> None:
    """Terminals of the container's own: the node's are not among them, and new ones can be made."""
    script = """ls /dev/pts; ls -l /dev/pts/ptmx | cut -c1; script -qc tty /dev/null </dev/null || true"""
    out = mounted(idle, "devpts:/dev/pts,/usr,/lib,/lib64", script.replace("script -qc", "/usr/bin/script -qc"))
    assert out.split() == ["ptmx", "c", "/dev/pts/0"]


