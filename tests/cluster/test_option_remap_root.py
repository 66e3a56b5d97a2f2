"""--container-remap-root: root inside, and package managers that believe in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from boxes import BOX, BOX_DIRECTORY, shell, srun
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.image import libraries

pytestmark = pytest.mark.usefixtures("box", "shared")

PROGRAMS = (
    *("/usr/bin/dpkg", "/usr/bin/dpkg-deb", "/usr/bin/dpkg-query", "/usr/bin/dpkg-split", "/usr/bin/apt-get"),
    *("/usr/bin/apt-config", "/usr/bin/chown", "/usr/bin/chgrp", "/usr/bin/install", "/usr/bin/tar"),
    *("/usr/sbin/useradd", "/usr/sbin/groupadd", "/sbin/ldconfig", "/sbin/start-stop-daemon", "/usr/bin/setpriv"),
    *("/usr/lib/apt/methods/file", "/usr/lib/apt/methods/copy", "/usr/lib/apt/methods/store"),
)
FOLDERS = (
    *("var/lib/dpkg/updates", "var/lib/dpkg/info", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"),
    *("etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/log/apt", "opt/service", "repo"),
)
POSTINST = """\
#!/bin/sh
set -e
groupadd --system service
useradd --system --gid service --home-dir /var/lib/service --shell /bin/false service
install -d -o service -g service -m 750 /var/lib/service
chown -R service:service /opt/service
chgrp 7 /opt/service/bin
mknod /opt/service/device c 1 3
"""


@pytest.fixture(scope="module", autouse=True)
def packages(cluster: Cluster, box: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with dpkg and apt of this machine, and a repository with one package of ours."""
    root = cluster.layout.images / "packages"
    shutil.copytree(box, root, symlinks=True)
    for program in (Path(name) for name in PROGRAMS):
        for file in (program, *libraries(program)) if program.name != "ldconfig" else (program,):
            place = root / file.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            shutil.copy(file, place)
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copytree("/usr/share/dpkg", root / "usr/share/dpkg")
    (root / "var/lib/dpkg/status").touch()
    (root / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/repo ./\n")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n_apt:x:42:65534::/nonexistent:/bin/false\n")
    (root / "etc/shadow").write_text("root:*:1::::::\n")
    repository(root / "repo", tmp_path_factory.mktemp("package"))
    command = ["mksquashfs", str(root), f"{root}.sqsh", "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return root


def repository(folder: Path, work: Path) -> None:
    """A package whose files have owners that the container does not have, and whose script makes another."""
    tree = work / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "opt/service/bin").mkdir(parents=True)
    (tree / "opt/service/bin/run").write_text("#!/bin/sh\necho served\n")
    (tree / "opt/service/bin/run").chmod(0o4755)
    os.chown(tree / "opt/service/bin/run", 33, 33)
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()
    control = (
        f"Package: service\nVersion: 1\nArchitecture: {arch}\nMaintainer: nobody <n@example.org>\nDescription: test\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    (tree / "DEBIAN/postinst").write_text(POSTINST)
    (tree / "DEBIAN/postinst").chmod(0o755)
    package = folder / "service.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(package)], check=True, stdout=subprocess.DEVNULL)
    data = package.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "Packages").write_text(f"{control}Filename: ./service.deb\nSize: {len(data)}\nSHA256: {digest}\n")


def test_apt_installs_a_package(idle: Cluster) -> None:
    """With files and accounts of others, a device node, and apt's own change of its identity."""
    script = """
        export PATH=/usr/sbin:/sbin:/usr/bin:/bin DEBIAN_FRONTEND=noninteractive
        (apt-get -q update && apt-get -qy install service) >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
        dpkg-query -W -f '${Status}\\n' service
        /opt/service/bin/run; grep -c ^service: /etc/passwd; stat -c '%u:%g' /var/lib/service /opt/service/bin/run"""
    done = srun(idle, "--container-remap-root", "sh", "-ec", script, image="/images/packages.sqsh")
    owner = "0:0\n0:0\n"
    assert done.stdout == f"install ok installed\nserved\n1\n{owner}", done.stdout + done.stderr


def test_dpkg_installs_a_package(idle: Cluster) -> None:
    script = "export PATH=/usr/sbin:/sbin:/usr/bin:/bin; dpkg -i /repo/service.deb >/tmp/log 2>&1 || cat /tmp/log"
    out = shell(idle, f"{script}; /opt/service/bin/run", "--container-remap-root", image="/images/packages.sqsh")
    assert out == "served\n"


def test_without_root_nothing_is_faked(idle: Cluster) -> None:
    script = "chown 33:33 /opt 2>/dev/null || echo refused; grep Seccomp: /proc/self/status; ls /etc/apt/apt.conf.d"
    assert shell(idle, script, image="/images/packages.sqsh") == "refused\nSeccomp:\t0\n"


def test_identities_are_taken_in_words_only(idle: Cluster) -> None:
    """setuid and setgroups succeed; nothing changes."""
    script = "/usr/bin/setpriv --reuid=33 --regid=33 --clear-groups id; chown 33:33 /opt/file; stat -c %u:%g /opt/file"
    who = shell(idle, "id", "--container-remap-root", image="/images/packages.sqsh")
    assert who.startswith("uid=0(root) gid=0(root) groups=")
    assert shell(idle, script, "--container-remap-root", image="/images/packages.sqsh") == f"{who}0:0\n"


def test_uid_map(idle: Cluster) -> None:
    assert shell(idle, "cat /proc/self/uid_map", "--container-remap-root").split() == ["0", "61001", "1"]
    assert shell(idle, "cat /proc/self/uid_map", "--no-container-remap-root").split() == ["61001", "61001", "1"]


@pytest.mark.parametrize("form", [BOX, BOX_DIRECTORY], ids=["file", "directory"])
def test_home_of_root(idle: Cluster, form: str) -> None:
    """The mounted home is root's, and at its own path as well; without it /root is empty."""
    script = "echo ~; echo note >~/note; cat $OUTSIDE/note; stat -c %u ~"
    options = ("--container-remap-root", "--container-mount-home")
    assert shell(idle, script, *options, image=form, OUTSIDE="/home/usera") == "/root\nnote\n0\n"
    assert (idle.layout.homes / "usera/note").read_text() == "note\n"
    script = "echo ~; ls -A ~; [ -e /home/usera/note ] || echo none"
    assert shell(idle, script, "--container-remap-root", "--no-container-mount-home", image=form) == "/root\nnone\n"
