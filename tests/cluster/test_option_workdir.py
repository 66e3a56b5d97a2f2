"""--container-workdir."""

from __future__ import annotations

import pytest
from boxes import shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


def test_workdir(idle: Cluster) -> None:
    assert shell(idle, "pwd", "--container-workdir=/opt/deep") == "/opt/deep\n"
    assert shell(idle, "pwd -P", "--container-workdir=/inside") == "/opt/deep\n"
    options = ("--container-mounts=/shared/data:/m", "--container-workdir=/m")
    assert shell(idle, "pwd", *options) == "/m\n"
    assert shell(idle, "pwd", "--chdir=/shared") == "/\n"


def test_relative_workdir(idle: Cluster) -> None:
    assert shell(idle, "pwd", "--container-workdir=opt/deep") == "/opt/deep\n"
    assert shell(idle, "pwd -P", "--container-workdir=../") == "/\n"


def test_missing_workdir(idle: Cluster) -> None:
    done = srun(idle, "--container-workdir=/nowhere", "true")
    assert done.returncode == 1
    assert "--container-workdir=/nowhere: couldn't chdir: no such directory in the container on n1" in done.stderr
