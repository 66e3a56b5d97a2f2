"""The texts of uid_map and gid_map. Pure: plan.py uses it, the agent (root) writes what it returns.

Written by root, the maps may name all of a user's groups, and `setgroups` has to be denied before, or
the user could drop a group that denies him files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The kernel takes a map in one write, shorter than a page.
MAP_BYTES = 4095
# UID_GID_MAP_MAX_EXTENTS, include/linux/user_namespace.h
MAP_LINES = 340


@dataclass(frozen=True, slots=True)
class IdMaps:
    """The maps of a container, and the groups that found no place in them (for a warning)."""

    uid_map: str
    gid_map: str
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Extent:
    """One line of a map: `count` ids from `inside` are those from `outside`."""

    inside: int
    outside: int
    count: int

    def line(self) -> str:
        return f"{self.inside} {self.outside} {self.count}\n"


def container_maps(uid: int, gid: int, groups: Sequence[int], remap_root: bool = False) -> IdMaps:
    """The maps of a step's user namespace.

    Every id is itself inside; with `remap_root` the user and his primary group are 0 there, and a
    supplementary group 0 is dropped, as that number is taken. The primary group is always mapped.
    """
    others = set(groups) - {gid}
    dropped: list[int] = []
    if remap_root and gid != 0 and 0 in others:
        others.remove(0)
        dropped.append(0)
    primary = Extent(0 if remap_root else gid, gid, 1)
    # Apart from the primary group each is itself, so it can share a line only where that is true of both.
    mergeable = others if primary.inside != gid else others | {gid}
    extents = list(_consecutive(mergeable))
    if primary.inside != gid:
        extents.insert(0, primary)
    kept, unmapped = _fitting(extents, gid)
    dropped.extend(unmapped)
    uid_map = Extent(0 if remap_root else uid, uid, 1).line()
    return IdMaps(uid_map, "".join(extent.line() for extent in kept), tuple(sorted(dropped)))


def image_map(own_id: int) -> str:
    """For an idmapped mount: what is stored as 0 appears as this id; other ids appear as nobody's."""
    return Extent(0, own_id, 1).line()


def _consecutive(ids: set[int]) -> Iterator[Extent]:
    first = count = 0
    for number in sorted(ids):
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield Extent(first, first, count)
        first, count = number, 1
    if count:
        yield Extent(first, first, count)


def _fitting(extents: list[Extent], gid: int) -> tuple[list[Extent], list[int]]:
    """Keep the line of `gid` and then those with most groups per byte; the rest is returned as groups."""

    def worth(extent: Extent) -> tuple[bool, float, int]:
        holds_primary = extent.outside <= gid < extent.outside + extent.count
        return not holds_primary, len(extent.line()) / extent.count, extent.outside

    kept: list[Extent] = []
    dropped: list[int] = []
    room = MAP_BYTES
    for extent in sorted(extents, key=worth):
        length = len(extent.line())
        if length <= room and len(kept) < MAP_LINES:
            kept.append(extent)
            room -= length
        else:
            dropped.extend(range(extent.outside, extent.outside + extent.count))
    return sorted(kept, key=lambda extent: extent.inside), dropped
