"""--container-mount-home and its no- form; with root inside see test_option_remap_root.py."""

from __future__ import annotations

import pytest
from boxes import shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


def test_mount_home(idle: Cluster) -> None:
    home = idle.layout.homes / "usera"
    out = shell(idle, "echo ~; echo from inside >~/note; stat -c %u ~", "--container-mount-home")
    assert out == "/home/usera\n61001\n"
    assert (home / "note").read_text() == "from inside\n"
    out = shell(idle, "echo ~; cat ~/note; stat -c %u ~", "--container-mount-home", "--container-remap-root")
    assert out == "/root\nfrom inside\n0\n"
    assert shell(idle, "ls ~; stat -c %a ~", "--no-container-mount-home") == "700\n"


def test_home_that_is_not_there(idle: Cluster) -> None:
    done = srun(idle, "--container-mount-home", "true", HOME="/home/nobody-here")
    assert done.returncode == 1
    assert "--container-mount-home: home directory /home/nobody-here cannot be opened on n1" in done.stderr
