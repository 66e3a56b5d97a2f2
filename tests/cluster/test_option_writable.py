"""--container-writable and --container-readonly."""

from __future__ import annotations

import pytest
from boxes import BOX, BOX_DIRECTORY, shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


@pytest.mark.parametrize("form", [BOX, BOX_DIRECTORY], ids=["file", "directory"])
def test_readonly(idle: Cluster, form: str) -> None:
    script = "for d in / /tmp /etc ~; do touch $d/x 2>/dev/null && echo wrote $d; done; touch /dev/shm/x /m/x; echo end"
    options = ("--container-readonly", "--container-mounts=/shared/data:/m")
    assert shell(idle, script, *options, image=form) == "end\n"
    assert shell(idle, "touch /tmp/x ~/x; echo wrote", "--container-writable", image=form) == "wrote\n"


def test_readonly_cannot_be_undone(idle: Cluster) -> None:
    script = "mount -o remount,rw /; unshare -Urm mount -o remount,rw /; touch /x || echo ro"
    done = srun(idle, "--container-readonly", "sh", "-c", script)
    assert done.stdout == "ro\n"


def test_readonly_says_so(idle: Cluster) -> None:
    done = srun(idle, "--container-readonly", "touch", "/newfile")
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    assert srun(idle, "--container-writable", "touch", "/newfile").returncode == 0
