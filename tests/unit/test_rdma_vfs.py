"""Virtual functions of a pool, from a tree as /sys has it (Documentation/ABI/testing/sysfs-bus-pci)."""

from __future__ import annotations

from pathlib import Path

import pytest
from enclos.runtime.devices import vfs
from enclos.runtime.devices.vfs import Function


def device(tree: Path, address: str, name: str) -> Path:
    """A PCI function with an RDMA device, and the latter's entry in the class."""
    folder = tree / "devices/pci0000:00" / address
    (folder / "infiniband" / name).mkdir(parents=True)
    entry = tree / "class/infiniband" / name
    entry.mkdir(parents=True)
    (entry / "device").symlink_to(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two cards with three functions each, the last of which has no driver; and a card without any."""
    number = 2
    for card, address in enumerate(("0000:3b:00.0", "0000:5e:00.0")):
        physical = device(tmp_path, address, f"mlx5_{card}")
        (physical / "sriov_numvfs").write_text("3\n")
        for index in (1, 0):
            virtual = device(tmp_path, f"{address[:-1]}{index + 1}", f"mlx5_{number}")
            (physical / f"virtfn{index}").symlink_to(virtual)
            number += 1
        bare = tmp_path / "devices/pci0000:00" / f"{address[:-1]}3"
        bare.mkdir()
        (physical / "virtfn2").symlink_to(bare)
    device(tmp_path, "0000:86:00.0", "storage0")
    return tmp_path / "class/infiniband"


def test_those_of_the_named_cards(tree: Path) -> None:
    first = [Function("mlx5_3", "mlx5_0", 0), Function("mlx5_2", "mlx5_0", 1)]
    second = [Function("mlx5_5", "mlx5_1", 0), Function("mlx5_4", "mlx5_1", 1)]
    assert vfs.find(["mlx5_0"], str(tree)) == first
    assert vfs.find(["mlx5_[01]", "storage0"], str(tree)) == [*first, *second]
    assert vfs.find(["storage0", "nothing*"], str(tree)) == []
    assert vfs.find(["mlx5_0"], "/nowhere") == []


def test_jobs_are_spread_over_the_cards(tree: Path) -> None:
    pool = vfs.find(["mlx5_*"], str(tree))
    assert [one.name for one in vfs.spread(pool, ())] == ["mlx5_3", "mlx5_5", "mlx5_2", "mlx5_4"]
    given = [Function("mlx5_3", "mlx5_0", 0)]
    assert [one.name for one in vfs.spread(pool, given)] == ["mlx5_5", "mlx5_2", "mlx5_4"]


def test_what_was_moved_away_still_counts(tree: Path) -> None:
    """A namespace's /sys does not show the devices of another one."""
    left = [one for one in vfs.find(["mlx5_*"], str(tree)) if one.physical == "mlx5_1" or one.number]
    given = [Function("mlx5_3", "mlx5_0", 0), Function("mlx5_8", "mlx5_0", 3)]
    assert [one.name for one in vfs.spread(left, given)] == ["mlx5_5", "mlx5_4", "mlx5_2"]


def test_each_is_given_once(tree: Path) -> None:
    pool = vfs.find(["mlx5_*"], str(tree))
    given: list[Function] = []
    while order := vfs.spread(pool, given):
        given.append(order[0])
    assert sorted(given) == sorted(pool)
