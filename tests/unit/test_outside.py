"""Which steps have to be built again once it is known that Slurm gave the job mounts of its own."""

from __future__ import annotations

import os

import pytest
from enclos.runtime import outside, request

FACTS = {
    **{name: ["1001"] for name in ("uid", "gid", "groups")},
    **{name: ["7"] for name in ("job", "step", "stepd", "tasks")},
    "spool": ["/spool"],
    "tmpfs": ["/tmp"],
    "cwd": ["/tmp/here"],
    "conf": ["/etc/slurm/slurm.conf"],
}
PLACES = ("/tmp", "/dev/shm")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"image": "/images/a.sqsh"}, False),
        ({"image": "docker://a"}, False),
        ({"image": "/tmp/a.sqsh"}, True),
        ({"image": "./a.sqsh"}, True),
        ({"image": "/images/../tmp/a.sqsh"}, True),
        ({"image": "/tmpfs/a.sqsh"}, False),
        ({"image": "/"}, True),
        ({"image": "docker://a", "mounts": "/home:/home"}, True),
        ({"image": "docker://a", "mounts": "tmpfs:/x"}, False),
    ],
)
def test_what_may_lie_in_a_private_place(options: dict[str, str], wanted: bool) -> None:
    asked = request.parse({**FACTS, **{f"option.{name}": [value] for name, value in options.items()}})
    assert outside._names_private(asked, (), PLACES) is wanted
    assert outside._names_private(asked, (), ()) is False


def test_a_process_beside_this_one_has_no_private_place() -> None:
    assert list(outside.private_places(os.getppid())) == []


def test_the_mount_on_top_counts() -> None:
    rows = (
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:9 / /tmp rw - tmpfs none rw\n"
        "3 2 8:1 /jobs/7 /tmp rw - ext4 /dev/sda rw\n"
        "4 1 0:5 / /a\\040b rw shared:1 - tmpfs none rw\n"
    )
    assert outside.mounted(rows) == {"/": ("8:1", "/"), "/tmp": ("8:1", "/jobs/7"), "/a b": ("0:5", "/")}
