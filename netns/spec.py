"""What a job network on one node consists of: data, made by the agent from the job's node list. Pure.

It knows neither Slurm nor the kernel; `peers.py` turns it into messages, `overlay.py` sends them.
"""

from __future__ import annotations

from dataclasses import dataclass

from enclos.netns.names import AddressPlan, address_plan

VXLAN_OVERHEAD = {4: 50, 6: 70}
"""Outer IP, UDP, VXLAN and inner Ethernet headers, in bytes."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One node of a network: its place, its name, and the address that the tunnel goes to."""

    index: int
    name: str
    underlay: str


@dataclass(frozen=True, slots=True)
class OverlaySpec:
    """A network as this node sees it.

    Attributes:
        vni: 1..2**24-2.
        port: UDP port, host order.
        ifname: name of the device inside, 1-15 bytes.
        mtu: of the overlay, in bytes (`Underlay.overlay_mtu`).
        underlay_ifindex: in the node's namespace.
        local: underlay address of this node; its family is the underlay's.
        index: this node's place.
        peers: all nodes, this one too, ordered by index; their underlay addresses are of local's family.
        ipv4, ipv6: address blocks, `10.77.0.0/16`, `fd65:6e63:6c6f::/48`.
    """

    vni: int
    port: int
    ifname: str
    mtu: int
    underlay_ifindex: int
    local: str
    index: int
    peers: tuple[Peer, ...]
    ipv4: str
    ipv6: str

    @property
    def plan(self) -> AddressPlan:
        """The overlay addresses."""
        return address_plan(self.ipv4, self.ipv6, self.vni)
