"""Images as other tools make them: Singularity's files, enroot's three files in /etc, Charliecloud's directories."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import Leftovers, said
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.sif import Part, make_sif
from enclos.runtime.cluster.users import user
from enclos.runtime.images.facts import STANDARD_PATH
from faults import processes

APPLETS = ("sh", "cat", "echo", "env", "grep", "id", "ls", "pwd", "rm", "sleep", "touch", "true")
RC = """\
mkdir -p "/workspace" 2> /dev/null
cd "/workspace" && unset OLDPWD || exit 1

if [ $# -gt 0 ]; then
    exec "/opt/entry" "$@"
else
    exec "/opt/entry" "sh"
fi
"""
ENTRY = """\
#!/bin/sh
export FROM_ENTRYPOINT="$FROM_IMAGE and more"
exec "$@"
"""
ENVIRONMENT = """\
#!/bin/sh
export FROM_IMAGE="of the image"
export PATH=/opt/bin:$PATH
"""
BASE = """\
#!/bin/sh
if [ -n "$PATH" ]; then PATH="/bin"; fi
export PATH
"""
RUNSCRIPT = """\
#!/bin/sh
export FROM_RUNSCRIPT="$FROM_IMAGE, run"
exec "$@"
"""


def make_tree(path: Path, files: Mapping[str, str]) -> Path:
    for name in ("bin", "etc", "tmp"):
        (path / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, path / "bin/busybox")
    for applet in APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
        (path / name).chmod(0o755 if text.startswith("#!") else 0o644)
    return path


def pack(tree: Path) -> Path:
    path = tree.with_suffix(".squashfs")
    command = ["mksquashfs", str(tree), str(path), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def give(path: Path, owner: str = "usera") -> Path:
    os.chown(path, user(owner).uid, user(owner).uid)
    return path


def run(cluster: Cluster, image: str, script: str, *options: str, cwd: str | None = None) -> str:
    words = ["srun", "-w", "n1", f"--container-image={image}", *options, "sh", "-ec", script]
    done = cluster.run(words, "usera", timeout=30, cwd=cwd)
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    return done.stdout


def errors_of(cluster: Cluster, image: str, *options: str) -> list[str]:
    done = cluster.run(["srun", "-w", "n1", f"--container-image={image}", *options, "true"], "usera", timeout=30)
    assert done.returncode != 0
    return [row[row.index(word) :] for row in said(done.stderr) for word in ("enclos: ", "hint: ") if word in row]


# -- Singularity ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sif(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same file twice: root's and a user's. Its squashfs is not where the file begins, nor where it ends."""
    files = {
        ".singularity.d/env/01-base.sh": BASE,
        ".singularity.d/env/90-environment.sh": ENVIRONMENT,
        ".singularity.d/runscript": RUNSCRIPT,
        "etc/environment": "NOT_READ=yes\n",
    }
    squashfs = pack(make_tree(tmp_path_factory.mktemp("sif") / "tree", files)).read_bytes()
    content = make_sif([Part(b"Bootstrap: docker", 0x4001), Part(squashfs), Part(b"signature", 0x4005)])
    (cluster.layout.images / "box.sif").write_bytes(content)
    (cluster.layout.shared / "own.sif").write_bytes(content)
    give(cluster.layout.shared / "own.sif").chmod(0o600)
    return content


sif_of_both = pytest.mark.parametrize("image", ["/images/box.sif", "/shared/own.sif"], ids=["of the site", "own"])


@sif_of_both
def test_a_sif_file_runs(idle: Cluster, sif: bytes, image: str) -> None:
    script = 'echo "$FROM_IMAGE; $NOT_READ; $PATH"; id -u; touch /new; ls -l /new /bin/busybox | grep -c usera'
    uid = user("usera").uid
    path = f"/opt/bin:{STANDARD_PATH}"
    assert run(idle, image, script) == f"of the image; ; {path}\n{uid}\n2\n"


@sif_of_both
def test_its_runscript_is_the_entrypoint(idle: Cluster, sif: bytes, image: str) -> None:
    script = 'echo "$FROM_RUNSCRIPT; $PATH"'
    assert run(idle, image, script, "--container-entrypoint") == "of the image, run; /opt/bin:/bin\n"


def test_the_kernel_reads_only_the_sites(idle: Cluster, sif: bytes) -> None:
    """The site's through a loop device over the partition, the user's by squashfuse."""
    def loops() -> dict[int, tuple[str, str]]:
        command = ["losetup", "--list", "--noheadings", "--output", "BACK-INO,OFFSET,SIZELIMIT"]
        rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {int(row.split()[0]): (row.split()[1], row.split()[2]) for row in rows}

    run(idle, "/images/box.sif", "true")
    found = loops()[(idle.layout.images / "box.sif").stat().st_ino]
    assert found[0] == str(32768 + 4096) and 0 < int(found[1]) < len(sif)
    words = ["srun", "-w", "n1", "--container-image=/shared/own.sif", "sh", "-c", "echo up; sleep 60"]
    running = idle.popen(words, "usera")
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    served = processes(idle, "n1", "squashfuse_ll")
    idle.run("scancel --user=usera")
    running.communicate(timeout=30)
    assert len(served) == 1
    assert (idle.layout.shared / "own.sif").stat().st_ino not in loops()


UNUSABLE = {
    "its root file system is ext3": [Part(filesystem=2)],
    "its root file system is an encrypted squashfs": [Part(filesystem=5)],
    "it has no root file system": [Part(b"text", 0x4001)],
    "it is for aarch64, this node is x86_64": [Part(architecture=b"04\0")],
}


@pytest.mark.parametrize("reason", UNUSABLE)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the texts name another architecture")
def test_a_sif_file_that_cannot_be_used(idle: Cluster, reason: str) -> None:
    (idle.layout.shared / "bad.sif").write_bytes(make_sif(UNUSABLE[reason]))
    assert errors_of(idle, "/shared/bad.sif") == [
        f"enclos: --container-image=/shared/bad.sif: this SIF file cannot be used ({reason}) on n1",
        "hint: it needs a squashfs root file system that is not encrypted, of the node's architecture",
    ]


def test_a_sif_file_without_a_squashfs_in_it(idle: Cluster) -> None:
    (idle.layout.shared / "bad.sif").write_bytes(make_sif([Part(b"no squashfs")]))
    assert "image is not a squashfs file" in errors_of(idle, "/shared/bad.sif")[0]


# -- enroot --------------------------------------------------------------------------------------------------


FSTAB = """\
# of the image
/shared/of-host /in none x-create=dir,bind,ro
${HOME} /from-home none bind,x-create=auto
tmpfs /scratch tmpfs size=64K
LABEL=cloudimg-rootfs / ext4 defaults 0 1
/nowhere /gone none bind,nofail
"""


@pytest.fixture(scope="module")
def enroot(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    files = {
        "etc/rc": RC,
        "etc/environment": "FROM_IMAGE=yes\nKEPT=${KEPT}\nWHERE=${HOME}/x\n",
        "etc/fstab": FSTAB,
        "opt/entry": ENTRY,
    }
    tree = make_tree(tmp_path_factory.mktemp("enroot") / "tree", files)
    give(Path(shutil.copy(pack(tree), cluster.layout.shared / "enroot.sqsh")))
    (cluster.layout.shared / "of-host").mkdir(exist_ok=True)
    (cluster.layout.shared / "of-host/file").write_text("of the host\n")
    cluster.run("echo mine > ~/mine", "usera")
    return "/shared/enroot.sqsh"


def test_enroots_environment(idle: Cluster, enroot: str) -> None:
    words = ["srun", "-w", "n1", f"--container-image={enroot}", "sh", "-c", 'echo "$FROM_IMAGE $KEPT $WHERE"']
    done = idle.run(words, "usera", env={"KEPT": "of the job", "WHERE": "of the job"})
    assert (done.returncode, done.stdout) == (0, "yes of the job /home/usera/x\n"), done.stderr


def test_the_images_directory_is_where_a_step_starts(idle: Cluster, enroot: str) -> None:
    """Made where it is missing; an option goes before it."""
    assert run(idle, enroot, "pwd") == "/workspace\n"
    assert run(idle, enroot, "pwd", "--container-workdir=/tmp") == "/tmp\n"


def test_enroots_script_is_the_entrypoint(idle: Cluster, enroot: str) -> None:
    assert run(idle, enroot, 'echo "$FROM_ENTRYPOINT"', "--container-entrypoint") == "yes and more\n"
    assert run(idle, enroot, 'echo "$FROM_ENTRYPOINT"') == "\n"


def test_the_images_fstab(idle: Cluster, enroot: str) -> None:
    script = """
    cat /in/file /from-home/mine; ls -d /gone 2>/dev/null || echo none
    touch /in/new 2>&1 || true
    grep " /scratch " /proc/self/mountinfo | grep -o "size=[0-9]*k"
    """
    read_only = "touch: /in/new: Read-only file system\n"
    assert run(idle, enroot, script) == f"of the host\nmine\nnone\n{read_only}size=64k\n"


def test_a_container_beside_a_running_one_has_all_of_the_image(idle: Cluster, enroot: str) -> None:
    """NAME:no_exec: the image's mounts, variables, working directory and entrypoint, as enroot's start gives them."""
    look = 'cat /in/file; echo "$FROM_IMAGE $FROM_ENTRYPOINT $(pwd)"; touch /opt/end'
    script = f"""
        w="srun --overlap -n1 --container-name=w"
        $w --container-image={enroot} sh -c 'touch /opt/on; until [ -e /opt/end ]; do sleep 0.05; done' &
        until $w:exec true 2>/dev/null; do sleep 0.05; done
        $w:no_exec --container-entrypoint sh -c '{look}'
        wait"""
    done = idle.run(["salloc", "-Q", "-w", "n1", "bash", "-c", script], "usera", timeout=60)
    assert (done.returncode, done.stdout) == (0, "of the host\nyes yes and more /workspace\n"), done.stderr


def test_the_images_fstab_gives_no_more_than_its_user_has(idle: Cluster, tmp_path: Path) -> None:
    """Sources are opened as the user, on the node."""
    idle.run("mkdir -p ~/private; echo secret > ~/private/file; chmod 700 ~/private", "userb")
    tree = make_tree(tmp_path / "tree", {"etc/fstab": "/home/userb/private /in none bind\n"})
    give(Path(shutil.copy(pack(tree), idle.layout.shared / "nosy.sqsh")))
    assert errors_of(idle, "/shared/nosy.sqsh") == [
        "enclos: /etc/fstab=/home/userb/private:/in: source path is not accessible (permission denied) on n1",
        "hint: sources are opened with your rights on the compute node",
    ]


def test_users_mounts_go_over_those_of_the_image(idle: Cluster, enroot: str) -> None:
    assert run(idle, enroot, "ls /in", "--container-mounts=tmpfs:/in") == ""


# -- Charliecloud --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def charliecloud(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory as ch-convert leaves it: the user's, with directories that he may not write to."""
    files = {"ch/environment": "FROM_IMAGE=yes\nPATH=/opt/bin:$PATH\n", "ch/metadata.json": '{"cwd": "/srv/work"}'}
    tree = make_tree(cluster.layout.shared / "charlie", files)
    for parent, _, _ in os.walk(tree, topdown=False):
        give(Path(parent)).chmod(0o555)
    subprocess.run(["chown", "-R", f"{user('usera').uid}:{user('usera').uid}", str(tree)], check=True)
    return "/shared/charlie"


@pytest.mark.parametrize("options", [(), ("--container-remap-root",)], ids=["as himself", "as root"])
def test_a_charliecloud_directory(idle: Cluster, charliecloud: str, options: tuple[str, ...]) -> None:
    """Mount points, files in /etc and the working directory are made in spite of its bits."""
    script = "echo $FROM_IMAGE; pwd; grep -c usera /etc/passwd || true; ls -d /proc/self /dev/null"
    names = "0" if options else "1"
    options = (*options, "--container-mounts=/shared/of-host:/deep/er")
    (idle.layout.shared / "of-host").mkdir(exist_ok=True)
    assert run(idle, charliecloud, script, *options) == f"yes\n/srv/work\n{names}\n/dev/null\n/proc/self\n"


def test_nothing_is_left_of_them(idle: Cluster, sif: bytes, enroot: str, leftovers: Leftovers) -> None:
    run(idle, "/images/box.sif", "true")
    idle.await_idle()
    before = Leftovers(idle)  # The site's file stays mounted for a while.
    for image in ("/images/box.sif", "/shared/own.sif", enroot):
        run(idle, image, "true")
    assert before.rows() == []


@pytest.fixture
def without_mounts(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(1, config="mounts: {user: false}\n")


def test_where_users_may_not_mount_images_may_not(without_mounts: Cluster, enroot: str, cluster: Cluster) -> None:
    name = "enroot.sqsh"
    give(Path(shutil.copy(cluster.layout.shared / name, without_mounts.layout.shared / name)))
    assert run(without_mounts, enroot, "ls -d /in 2>/dev/null || echo none") == "none\n"
