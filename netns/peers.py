"""The requests that turn a bare device into a node's part of a network. Pure: it packs, it sends nothing.

Everything is known in advance, so nothing is learned: each peer has a permanent neighbour for its overlay
IPv4, its overlay IPv6 and its underlay address, and one forwarding entry from its MAC to its underlay
address. There is no flooding entry, so broadcasts and frames for strangers end at this device.

Routes cover exactly the addresses of the network's nodes, as few blocks as that takes, instead of the whole
address block: a program that walks through the block gets "network unreachable" at once. With a route for
the whole block each address it tried would leave a neighbour entry, and those count against one limit
(gc_thresh3) for all namespaces of the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from enclos.netns import link
from enclos.netns.batch import Batch
from enclos.netns.link import ADDRESS_BYTES, ip_version, pack_address
from enclos.netns.names import cover_addresses, cover_range, mac_bytes
from enclos.netns.spec import OverlaySpec, Peer

LOOPBACK_INDEX = 1


def network_batch(spec: OverlaySpec, index: int, with_ipv6: bool = True) -> Batch:
    """Everything for the device `index`, which is down and has its birth name, in the order it is done."""
    batch = Batch()
    batch.add(link.set_up(LOOPBACK_INDEX), "loopback")
    if with_ipv6:
        batch.add(link.without_link_local(index), spec.ifname)
    batch.add(link.set_up(index, spec.ifname), spec.ifname)
    own_addresses(batch, spec, index, with_ipv6)
    peers = [peer for peer in spec.peers if peer.index != spec.index]
    macs = [mac_bytes(spec.vni, peer.index) for peer in peers]
    underlay = [pack_address(peer.underlay) for peer in peers]
    forwarding(batch, spec, index, peers, list(zip(underlay, macs, strict=True)))
    neighbours(batch, spec, index, peers, macs, with_ipv6)
    overlay_routes(batch, spec, index, with_ipv6)
    underlay_routes(batch, spec, index, underlay)
    return batch


def alone_batch(spec: OverlaySpec, index: int, with_ipv6: bool = True) -> Batch:
    """The same where there is no other node, and no underlay."""
    batch = Batch()
    batch.add(link.set_up(LOOPBACK_INDEX), "loopback")
    if with_ipv6:
        batch.add(link.without_link_local(index), spec.ifname)
    batch.add(link.set_up(index, spec.ifname), spec.ifname)
    overlay_addresses(batch, spec, index, with_ipv6)
    return batch


def own_addresses(batch: Batch, spec: OverlaySpec, index: int, with_ipv6: bool) -> None:
    """This node's overlay addresses, and its underlay one: scripts carry `hostname -i` of the host."""
    overlay_addresses(batch, spec, index, with_ipv6)
    local = pack_address(spec.local)
    batch.add(link.add_address(index, local, len(local) * 8), spec.local)


def overlay_addresses(batch: Batch, spec: OverlaySpec, index: int, with_ipv6: bool) -> None:
    """In both families."""
    plan = spec.plan
    ipv4 = plan.ipv4_int(spec.index).to_bytes(4, "big")
    batch.add(link.add_address(index, ipv4, plan.prefix4), plan.ipv4(spec.index))
    if with_ipv6:
        ipv6 = plan.ipv6_int(spec.index).to_bytes(16, "big")
        batch.add(link.add_address(index, ipv6, plan.prefix6), plan.ipv6(spec.index))


def forwarding(
    batch: Batch, spec: OverlaySpec, index: int, peers: Sequence[Peer], pairs: list[tuple[bytes, bytes]]
) -> None:
    """(underlay address, MAC) of each peer, also as neighbours: the host's addresses work inside."""
    version = ip_version(spec.local)
    names = [peer.name for peer in peers]
    batch.extend(link.add_forwarding(index, pairs, version), "forwarding entry of", names)
    batch.extend(link.add_neighbours(index, pairs, version), "underlay neighbour", names)


def neighbours(
    batch: Batch, spec: OverlaySpec, index: int, peers: Sequence[Peer], macs: list[bytes], with_ipv6: bool
) -> None:
    """The peers' overlay addresses."""
    plan = spec.plan
    names = [peer.name for peer in peers]
    ipv4 = [plan.ipv4_int(peer.index).to_bytes(4, "big") for peer in peers]
    batch.extend(link.add_neighbours(index, list(zip(ipv4, macs, strict=True)), 4), "IPv4 neighbour", names)
    if with_ipv6:
        ipv6 = [plan.ipv6_int(peer.index).to_bytes(16, "big") for peer in peers]
        pairs = list(zip(ipv6, macs, strict=True))
        batch.extend(link.add_neighbours(index, pairs, 6), "IPv6 neighbour", names)


def overlay_routes(batch: Batch, spec: OverlaySpec, index: int, with_ipv6: bool) -> None:
    """Blocks that hold the nodes of the network and nobody else. Our own address is in one too: the local
    table comes first, and without the hole there are fewer blocks."""
    if len(spec.peers) < 2:
        return
    plan = spec.plan
    last = spec.peers[-1].index
    source = plan.ipv4_int(spec.index).to_bytes(4, "big")
    routes(batch, index, cover_range(plan.ipv4_int(0), plan.ipv4_int(last), 32), source)
    if with_ipv6:
        source = plan.ipv6_int(spec.index).to_bytes(16, "big")
        routes(batch, index, cover_range(plan.ipv6_int(0), plan.ipv6_int(last), 128), source)


def underlay_routes(batch: Batch, spec: OverlaySpec, index: int, underlay: list[bytes]) -> None:
    """The peers' underlay addresses, wherever they are: at worst a route each."""
    local = pack_address(spec.local)
    addresses = [int.from_bytes(address, "big") for address in (*underlay, local)]
    if underlay:
        routes(batch, index, cover_addresses(addresses, len(local) * 8), local)


def routes(batch: Batch, index: int, blocks: Iterable[tuple[int, int]], source: bytes) -> None:
    """One route per block, from `source`."""
    size = ADDRESS_BYTES[4 if len(source) == 4 else 6]
    for network, prefix in blocks:
        request = link.add_route(index, network.to_bytes(size, "big"), prefix, source)
        batch.add(request, f"route to {network:#x}/{prefix}")
