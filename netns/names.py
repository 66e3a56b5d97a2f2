"""What follows from a network's number and a node's index: VNI, MAC, addresses, device names. Pure.

Every node computes the whole network from these functions, so two nodes of different releases must
get the same answers: a change here is a change of the wire. No system call, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from enclos.netns.facts import BlockTooSmall

VNI_LIMIT = 1 << 24
TENANT_VNIS = 1 << 23
"""Job networks are below, networks of users and accounts from here up to HOLDER_VNI - 1."""
ALONE_VNI = 1
"""Of a network that has no other node, and is in a namespace of its own with its tunnel."""
HOLDER_VNI = VNI_LIMIT - 1
"""The devices that only hold the UDP port have this one."""
INDEX_LIMIT = 1 << 16
"""Nodes in one network: the index has two bytes of the MAC."""

HOLDER_PREFIX = "enclos-hold"
HOLDER_NAMES = {4: f"{HOLDER_PREFIX}4", 6: f"{HOLDER_PREFIX}6"}
IFNAME_BYTES = 15
IPV6_INDEX_BITS = 32


def job_vni(leader_id: int) -> int:
    """VNI of a job's network (1 .. 2**23-1), from the job id of the het leader, or of the job itself."""
    return 1 + leader_id % (TENANT_VNIS - 1)


def birth_name(vni: int) -> str:
    """The name an overlay device has until it is in its namespace and gets the one of the settings.

    Kernels before 6.14 look for a taken name in the namespace of the *request*: with the final name, an
    interface of the node that happens to be called the same would make every network fail with EEXIST.
    """
    return f"enclos{vni:06x}"


def namespace_number(vni: int) -> int:
    """The number (nsid) of a network's namespace in the node's own: above those that the kernel hands out by itself."""
    return VNI_LIMIT + vni


def mac_bytes(vni: int, index: int) -> bytes:
    """Locally administered MAC: 02, three bytes of VNI, two of index."""
    if not 0 <= index < INDEX_LIMIT:
        raise BlockTooSmall("the MAC", index)
    return b"\x02" + vni.to_bytes(3, "big") + index.to_bytes(2, "big")


def mac(vni: int, index: int) -> str:
    """The same as text, `02:00:12:d7:00:01`."""
    return mac_bytes(vni, index).hex(":")


class AddressPlan:
    """The overlay addresses of one network: node `index` has base + 1 + index in both families.

    Every job network uses the same IPv4 block, because they never meet. The IPv6 base has the VNI in
    bits 32 to 55, so IPv6 addresses of two networks differ also in a log file.

    Raises:
        ValueError: a block that is not one, or an IPv6 prefix longer than 72 bits.
    """

    __slots__ = ("base4", "base6", "block4", "prefix4", "prefix6")

    def __init__(self, ipv4_block: str, ipv6_block: str, vni: int) -> None:
        block4, block6 = IPv4Network(ipv4_block), IPv6Network(ipv6_block)
        if block6.prefixlen > 128 - 24 - IPV6_INDEX_BITS:
            raise ValueError(f"{ipv6_block}: at most 72 bits of prefix leave room for the VNI and the index")
        self.block4 = ipv4_block
        self.base4 = int(block4.network_address)
        self.prefix4 = block4.prefixlen
        self.base6 = int(block6.network_address) | vni << IPV6_INDEX_BITS
        self.prefix6 = 128 - IPV6_INDEX_BITS

    def ipv4_int(self, index: int) -> int:
        """Address as a number; BlockTooSmall where it would be the block's broadcast address or beyond."""
        if not 0 <= index < (1 << (32 - self.prefix4)) - 2:
            raise BlockTooSmall(self.block4, index)
        return self.base4 + 1 + index

    def ipv6_int(self, index: int) -> int:
        """Address as a number."""
        return self.base6 + 1 + index

    def ipv4(self, index: int) -> str:
        """Overlay IPv4 address of node `index`."""
        return str(IPv4Address(self.ipv4_int(index)))

    def ipv6(self, index: int) -> str:
        """Overlay IPv6 address of node `index`."""
        return str(IPv6Address(self.ipv6_int(index)))


@lru_cache(maxsize=32)
def address_plan(ipv4_block: str, ipv6_block: str, vni: int) -> AddressPlan:
    """AddressPlan, remembered: parsing the blocks costs more than everything else about it."""
    return AddressPlan(ipv4_block, ipv6_block, vni)


def cover_range(first: int, last: int, bits: int) -> list[tuple[int, int]]:
    """The fewest (network, prefix length) that hold first..last and nothing else. `bits` is 32 or 128."""
    blocks = []
    while first <= last:
        aligned = (first & -first).bit_length() - 1 if first else bits
        size = min(aligned, (last - first + 1).bit_length() - 1)
        blocks.append((first, bits - size))
        first += 1 << size
    return blocks


def cover_addresses(addresses: Iterable[int], bits: int) -> list[tuple[int, int]]:
    """cover_range for any set of addresses: neighbouring ones share a block, and no stranger is in one."""
    blocks: list[tuple[int, int]] = []
    first = last = -1
    for address in sorted(addresses):
        if address == last + 1 and first >= 0:
            last = address
        elif address != last:
            if first >= 0:
                blocks += cover_range(first, last, bits)
            first = last = address
    if first >= 0:
        blocks += cover_range(first, last, bits)
    return blocks
