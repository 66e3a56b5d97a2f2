"""The maps' texts against a small reading of what the kernel would make of them."""

from enclos.runtime.idmap import MAP_BYTES, MAP_LINES, container_maps, image_map
from hypothesis import given
from hypothesis import strategies as st


def read_map(text: str) -> dict[int, int]:
    """inside -> outside, as the kernel takes it: refuses overlaps on either side and texts of a page."""
    assert len(text) < 4096
    pairs: dict[int, int] = {}
    for line in text.splitlines():
        inside, outside, count = (int(field) for field in line.split())
        assert count > 0
        for offset in range(count):
            assert inside + offset not in pairs
            assert outside + offset not in pairs.values()
            pairs[inside + offset] = outside + offset
    return pairs


def test_consecutive_groups_share_a_line() -> None:
    maps = container_maps(1000, 1000, [1003, 1001, 1002, 1000, 2000])
    assert maps.uid_map == "1000 1000 1\n"
    assert maps.gid_map == "1000 1000 4\n2000 2000 1\n"
    assert maps.dropped == ()


def test_no_supplementary_groups() -> None:
    assert container_maps(5, 6, []).gid_map == "6 6 1\n"


def test_remap_root_puts_user_and_primary_group_at_zero() -> None:
    maps = container_maps(1000, 1001, [1000, 1001, 1002], remap_root=True)
    assert maps.uid_map == "0 1000 1\n"
    # 1000 and 1002 are not neighbours any more: 1001 is 0 inside.
    assert maps.gid_map == "0 1001 1\n1000 1000 1\n1002 1002 1\n"


def test_remap_root_drops_the_real_group_zero() -> None:
    maps = container_maps(1000, 1000, [0, 1, 2], remap_root=True)
    assert maps.gid_map == "0 1000 1\n1 1 2\n"
    assert maps.dropped == (0,)


def test_remap_root_of_primary_group_zero() -> None:
    maps = container_maps(1000, 0, [0, 1], remap_root=True)
    assert maps.gid_map == "0 0 2\n"
    assert maps.dropped == ()


def test_what_does_not_fit_is_named_and_the_primary_group_is_kept() -> None:
    groups = list(range(4_000_000_000, 4_000_001_000, 2))
    maps = container_maps(1000, groups[-1], groups)
    mapped = read_map(maps.gid_map)
    assert groups[-1] in mapped
    assert len(mapped) >= 170
    assert set(mapped) | set(maps.dropped) == set(groups)


def test_never_more_lines_than_the_kernel_takes() -> None:
    maps = container_maps(1, 1, range(1, 1400, 2))
    assert len(maps.gid_map.splitlines()) <= MAP_LINES


def test_long_ranges_are_kept_before_single_groups() -> None:
    singles = list(range(4_000_000_000, 4_000_001_000, 2))
    maps = container_maps(1, 1, [*singles, *range(4_100_000_000, 4_100_000_050)])
    assert set(range(4_100_000_000, 4_100_000_050)) <= set(read_map(maps.gid_map))


def test_image_map() -> None:
    assert image_map(1234) == "0 1234 1\n"


GROUP_ID = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 2))


@given(uid=GROUP_ID, gid=GROUP_ID, groups=st.lists(GROUP_ID, max_size=60), remap=st.booleans())
def test_maps_are_what_the_kernel_takes(uid: int, gid: int, groups: list[int], remap: bool) -> None:
    maps = container_maps(uid, gid, groups, remap)
    assert len(maps.gid_map) <= MAP_BYTES
    mapped = read_map(maps.gid_map)
    assert mapped[0 if remap else gid] == gid
    for inside, outside in mapped.items():
        assert inside == outside or (remap and inside == 0 and outside == gid)
    assert sorted([*mapped.values(), *maps.dropped]) == sorted({gid, *groups})
