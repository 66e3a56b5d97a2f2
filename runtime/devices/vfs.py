"""Virtual functions of RDMA devices as a pool: which there are, and which is given next. Reads /sys only.

The site makes the functions (sriov_numvfs) and binds their driver; a physical function stays the node's. Each virtual
function goes to one job at a time, and jobs are spread over the physical ones, which share their port's bandwidth.
Source: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci (virtfnN).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

SYSFS = "/sys/class/infiniband"


class Function(NamedTuple):
    """A virtual function's RDMA device, the physical function's, and its number there."""

    name: str
    physical: str
    number: int


def find(pools: Sequence[str], sysfs: str = SYSFS) -> list[Function]:
    """The virtual functions of the devices that these patterns name.

    One whose driver is not bound has no RDMA device and is left out, and so is one that was moved away, because a
    namespace's devices are not shown in another one's /sys.
    """
    found: list[Function] = []
    for physical in _names(sysfs):
        if not any(fnmatchcase(physical, pool) for pool in pools):
            continue
        device = f"{sysfs}/{physical}/device"
        for entry in _names(device):
            number = entry.removeprefix("virtfn")
            if entry.startswith("virtfn") and number.isdigit():
                found += [Function(name, physical, int(number)) for name in _names(f"{device}/{entry}/infiniband")]
    return sorted(found, key=lambda one: (one.physical, one.number))


def spread(functions: Iterable[Function], given: Collection[Function]) -> list[Function]:
    """The free ones in the order in which they are given away: from the physical function with the fewest given.

    Args:
        given: those that jobs have now.
    """
    load = Counter(one.physical for one in given)
    free = [one for one in functions if one not in given]
    order: list[Function] = []
    while free:
        chosen = min(free, key=lambda one: (load[one.physical], one.physical, one.number))
        free.remove(chosen)
        load[chosen.physical] += 1
        order.append(chosen)
    return order


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
