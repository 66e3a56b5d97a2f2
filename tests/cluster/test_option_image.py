"""--container-image: paths and their forms. Kinds of images: test_image_kinds.py; registries: the tests of imports."""

from __future__ import annotations

import pytest
from boxes import BOX, BOX_DIRECTORY, shell, srun
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


@pytest.mark.parametrize("path", [BOX, BOX_DIRECTORY, f"{BOX_DIRECTORY}/", "/images/../images/box.sqsh"])
def test_absolute_image(idle: Cluster, path: str) -> None:
    assert shell(idle, "cat /opt/file", image=path) == "of the image\n"


@pytest.mark.parametrize("path", ["./box.sqsh", "./box", "../images/box.sqsh"])
def test_relative_image(idle: Cluster, path: str) -> None:
    """It starts at the step's working directory."""
    assert shell(idle, "cat /opt/file", "--chdir=/images", image=path) == "of the image\n"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "--container-image=: argument required"),
        ("/images/nothing.sqsh", "image not found"),
        ("/dev/urandom", "image is neither a regular file nor a directory"),
        ("/etc/passwd", "not a squashfs"),
    ],
)
def test_image_that_can_not_be_used(idle: Cluster, path: str, words: str) -> None:
    done = srun(idle, "true", image=path)
    assert done.returncode != 0
    assert words in done.stderr


def test_image_is_opened_with_the_users_rights(idle: Cluster) -> None:
    secret = idle.layout.images / "secret"
    secret.mkdir(mode=0o700)
    (secret / "box.sqsh").symlink_to(BOX)
    done = srun(idle, "true", image="/images/secret/box.sqsh")
    assert done.returncode == 1
    assert "image is not readable (permission denied)" in done.stderr
