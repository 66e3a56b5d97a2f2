"""An image with everything odd in it, and steps in it: what the tests of containers and of options share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from conftest import Result, said
from enclos.runtime.cluster.cluster import Cluster

USERA, COMMON, PROJECTA, PROJECTB = 61001, 61100, 61101, 61102
BOX, BOX_DIRECTORY = "/images/box.sqsh", "/images/box"
ENVIRONMENT = """\
# as enroot writes it
FROM_IMAGE=image
export QUOTED="two words"
BOTH=image
SLURM_JOB_ID=99999
HOME=/stolen
"""


def make_box(images: Path) -> Path:
    root = images / "box"
    busybox = shutil.which("busybox")
    assert busybox is not None
    for name in ("bin", "etc", "opt/deep", "srv", "usr/etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "suid").mkdir()
    shutil.copy(busybox, root / "suid/id")
    (root / "suid/id").chmod(0o6755)
    texts = {
        "etc/environment": ENVIRONMENT,
        "etc/group": "root:x:0:\nusera:x:5:\nimagegroup:x:900:\n",
        "etc/hostname": "image\n",
        "opt/file": "of the image\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    # As in Debian's and Ubuntu's images: a link to what is made at boot.
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "etc/passwd").symlink_to("/etc/shadow-of-the-host")
    (root / "outside").symlink_to("/../../../../shared")
    (root / "away").symlink_to("/nowhere/at/all")
    (root / "inside").symlink_to("/opt/deep")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    command = ["mksquashfs", str(root), str(images / "box.sqsh"), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return root


def fill_shared(folder: Path) -> Path:
    """Files that are mounted: /shared is everybody's to write."""
    for name, owner, group, mode in (
        ("for-projecta", 0, PROJECTA, 0o640),
        ("for-projectb", 0, PROJECTB, 0o640),
        ("not-for-common", 0, COMMON, 0o604),
        ("for-all", 0, 0, 0o644),
    ):
        (folder / name).write_text(name + "\n")
        os.chown(folder / name, owner, group)
        (folder / name).chmod(mode)
    (folder / "data").mkdir()
    os.chown(folder / "data", USERA, PROJECTA)
    (folder / "data").chmod(0o2775)
    (folder / "site").mkdir()
    (folder / "site/file").write_text("of the site\n")
    return folder


def srun(cluster: Cluster, *words: str, image: str = BOX, user: str = "usera", **env: str) -> Result:
    """A step in a container on n1, all of whose options come before the command."""
    return cluster.run(["srun", "-w", "n1", f"--container-image={image}", *words], user, timeout=30, env=env)


def shell(cluster: Cluster, script: str, *options: str, image: str = BOX, **env: str) -> str:
    """What a script in a container prints; it has to succeed and to say nothing on standard error."""
    done = srun(cluster, *options, "sh", "-ec", script, image=image, **env)
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    return done.stdout


def bare(cluster: Cluster, script: str, *options: str) -> str:
    """What the same script prints without a container."""
    done = cluster.run(["srun", "-w", "n1", *options, "sh", "-ec", script], "usera", timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout
