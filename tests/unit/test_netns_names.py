"""Numbers, addresses, names: what every node computes alike."""

from __future__ import annotations

from ipaddress import IPv4Network, collapse_addresses, ip_address, ip_network

import pytest
from enclos.netns import names
from enclos.netns.facts import BlockTooSmall
from enclos.netns.hosts import hosts_lines
from enclos.netns.spec import OverlaySpec, Peer
from hypothesis import given
from hypothesis import strategies as st


def test_job_vni_stays_below_the_tenants() -> None:
    assert (names.job_vni(0), names.job_vni(1), names.job_vni(2**23 - 2)) == (1, 2, 2**23 - 1)
    assert names.job_vni(2**23 - 1) == 1


@given(st.integers(0, 2**32 - 1))
def test_job_vni_is_in_its_half(job: int) -> None:
    assert 1 <= names.job_vni(job) < names.TENANT_VNIS < names.HOLDER_VNI < names.VNI_LIMIT


def test_mac_is_local_unicast_and_has_vni_and_index() -> None:
    assert names.mac(0x123456, 0x789A) == "02:12:34:56:78:9a"
    with pytest.raises(BlockTooSmall):
        names.mac(1, 65536)


def test_addresses_count_from_base_plus_one() -> None:
    plan = names.AddressPlan("10.77.0.0/16", "fd65:6e63:6c6f::/48", 0x123456)
    assert (plan.ipv4(0), plan.ipv4(255)) == ("10.77.0.1", "10.77.1.0")
    assert (plan.ipv6(0), plan.ipv6(0xFFFF)) == ("fd65:6e63:6c6f:0:12:3456:0:1", "fd65:6e63:6c6f:0:12:3456:1:0")
    assert plan.ipv4(65533) == "10.77.255.254"
    for index in (-1, 65534):
        with pytest.raises(BlockTooSmall):
            plan.ipv4(index)


@pytest.mark.parametrize(
    ("ipv4", "ipv6"), [("10.77.0.1/16", "fd00::/48"), ("10.77.0.0/16", "fd00::/80"), ("fd00::/48", "fd00::/48")]
)
def test_bad_blocks_are_refused(ipv4: str, ipv6: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        names.AddressPlan(ipv4, ipv6, 1)


def test_device_names_fit() -> None:
    for name in (*names.HOLDER_NAMES.values(), names.birth_name(names.VNI_LIMIT - 1)):
        assert len(name) <= names.IFNAME_BYTES
    assert not names.birth_name(names.VNI_LIMIT - 1).startswith(names.HOLDER_PREFIX)


@given(st.sets(st.integers(0, 300) | st.integers(2**32 - 300, 2**32 - 1), max_size=120))
def test_cover_holds_the_addresses_and_no_other_in_the_fewest_blocks(addresses: set[int]) -> None:
    blocks = [ip_network(block) for block in names.cover_addresses(addresses, 32)]
    wanted = collapse_addresses(IPv4Network(address) for address in addresses)
    assert blocks == list(wanted)


def test_cover_of_a_whole_range_and_of_ipv6() -> None:
    assert names.cover_range(0, 2**32 - 1, 32) == [(0, 0)]
    first = int(ip_address("fd00::1"))
    assert names.cover_range(first, first + 3, 128) == [(first, 128), (first + 1, 127), (first + 3, 128)]
    assert names.cover_addresses([7, 7, 5], 32) == [(5, 32), (7, 32)]
    assert names.cover_addresses([], 32) == []


def test_hosts_lines() -> None:
    peers = (Peer(0, "n1", "192.0.2.1"), Peer(1, "n2", "192.0.2.2"))
    spec = OverlaySpec(5, 4789, "e", 1450, 2, "192.0.2.1", 0, peers, "10.0.0.0/24", "fd00::/48")
    assert hosts_lines(spec) == ("10.0.0.1 n1\n10.0.0.2 n2\nfd00::5:0:1 n1\nfd00::5:0:2 n2\n")
