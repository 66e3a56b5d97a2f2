"""Requests for devices, addresses, neighbours, forwarding entries and routes (rtnetlink), and reading them.

The packing is pure; what takes a Netlink asks the kernel. Says nothing about which of them make a network:
that is `peers.py` and `overlay.py`. Constants have the names of linux/if_link.h, rtnetlink.h, neighbour.h.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import NamedTuple

from enclos.netns.batch import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NUMBER,
    attribute,
    attributes,
    message,
    nested,
    number,
    text,
)
from enclos.netns.netlink import Netlink, Reply

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28
RTM_NEWNSID = 88
NETNSA_NSID = 1
NETNSA_FD = 3
IFF_UP = 0x1
IFF_NOARP = 0x80
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINK = 5
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
IFLA_AF_SPEC = 26
IFLA_NET_NS_FD = 28
IFLA_LINK_NETNSID = 37
IFLA_EXT_MASK = 29
IFLA_TARGET_NETNSID = 46
RTEXT_FILTER_SKIP_STATS = 8
IFLA_INET6_ADDR_GEN_MODE = 8
IN6_ADDR_GEN_MODE_NONE = 1
IFLA_VXLAN_ID = 1
IFLA_VXLAN_LINK = 3
IFLA_VXLAN_LOCAL = 4
IFLA_VXLAN_LEARNING = 7
IFLA_VXLAN_PORT = 15
IFLA_VXLAN_LOCAL6 = 17
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x2
IFA_F_NOPREFIXROUTE = 0x200
NDA_DST = 1
NDA_LLADDR = 2
NUD_NOARP = 0x40
NUD_PERMANENT = 0x80
NTF_SELF = 0x2
RTA_DST = 1
RTA_OIF = 4
RTA_PREFSRC = 7
RT_TABLE_MAIN = 254
RTPROT_KERNEL = 2
RTPROT_STATIC = 4
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RTN_UNICAST = 1
AF_BRIDGE = 7

IFINFOMSG = Struct("=BxHiII")
"""struct ifinfomsg: family, device type, index, flags, mask of the flags to change."""
IFADDRMSG = Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""
RTMSG = Struct("=BBBBBBBBI")
"""struct rtmsg: family, dst length, src length, tos, table, protocol, scope, type, flags."""
ENTRY = {
    4: Struct("=IHHII BxxxiHBB HH4s HH6sxx"),
    6: Struct("=IHHII BxxxiHBB HH16s HH6sxx"),
}
"""nlmsghdr, struct ndmsg, NDA_DST, NDA_LLADDR: a neighbour or a forwarding entry, ready to send."""
CREATE = NLM_F_CREATE | NLM_F_EXCL
FAMILY = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
ADDRESS_BYTES = {4: 4, 6: 16}


class Link(NamedTuple):
    """A device as the kernel describes it. `vni` and `port` are -1 where it is not a vxlan device."""

    ifindex: int
    name: str
    flags: int
    mtu: int
    kind: str
    vni: int
    port: int


class Card(NamedTuple):
    """An interface as a piece of hardware: what it is, and whether something is built on it.

    `master` is the ifindex of the bridge or bond it is in, `lower` that of the interface it stands on; 0 for none.
    """

    ifindex: int
    name: str
    flags: int
    type: int
    mac: bytes
    master: int
    lower: int


class LinkAddress(NamedTuple):
    """An address of a device, packed."""

    ifindex: int
    address: bytes
    scope: int


def ip_version(address: str) -> int:
    """4 or 6, from how the address is written."""
    return 6 if ":" in address else 4


def pack_address(address: str) -> bytes:
    """Four or sixteen bytes; OSError if it is no address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def create_vxlan(
    name: str,
    vni: int,
    port: int,
    local: bytes,
    underlay_ifindex: int = 0,
    netns_fd: int = -1,
    mac: bytes = b"",
    mtu: int = 0,
) -> bytes:
    """A vxlan device that learns nothing, floods nothing and answers no ARP; down.

    Its socket is opened in the namespace that the request is sent from, also when the device itself comes
    to life in the one of `netns_fd`: the kernel passes the sender's namespace on as the link's.
    """
    data = [number(IFLA_VXLAN_ID, vni), attribute(IFLA_VXLAN_PORT, port.to_bytes(2, "big"))]
    data.append(attribute(IFLA_VXLAN_LOCAL if len(local) == 4 else IFLA_VXLAN_LOCAL6, local))
    data.append(attribute(IFLA_VXLAN_LEARNING, b"\0"))
    if underlay_ifindex:
        data.append(number(IFLA_VXLAN_LINK, underlay_ifindex))
    parts = [text(IFLA_IFNAME, name)]
    if mtu:
        parts.append(number(IFLA_MTU, mtu))
    if mac:
        parts.append(attribute(IFLA_ADDRESS, mac))
    if netns_fd >= 0:
        parts.append(number(IFLA_NET_NS_FD, netns_fd))
    parts.append(nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "vxlan"), nested(IFLA_INFO_DATA, *data)))
    return message(RTM_NEWLINK, CREATE, IFINFOMSG.pack(0, 0, 0, IFF_NOARP, IFF_NOARP), *parts)


def without_link_local(index: int) -> bytes:
    """No automatic IPv6 address: what the device has is what we gave it. Before it comes up."""
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
    spec = nested(IFLA_AF_SPEC, nested(FAMILY[6], mode))
    return message(RTM_NEWLINK, 0, IFINFOMSG.pack(0, 0, index, 0, 0), spec)


def set_up(index: int, name: str = "") -> bytes:
    """Give it its name (while it is down) and bring it up."""
    rename = text(IFLA_IFNAME, name) if name else b""
    return message(RTM_NEWLINK, 0, IFINFOMSG.pack(0, 0, index, IFF_UP, IFF_UP), rename)


def delete_link(name: str) -> bytes:
    """ENODEV if there is none."""
    return message(RTM_DELLINK, 0, IFINFOMSG.pack(0, 0, 0, 0, 0), text(IFLA_IFNAME, name))


def name_namespace(netns_fd: int, nsid: int) -> bytes:
    """Give a network namespace a number in the namespace of the request; EEXIST if it or the number has one.

    The number lasts as long as the namespace, and needs no descriptor of it (rtnetlink, net/core/net_namespace.c).
    """
    return message(RTM_NEWNSID, 0, bytes(4), number(NETNSA_NSID, nsid), number(NETNSA_FD, netns_fd))


def delete_link_in(nsid: int, name: str) -> bytes:
    """delete_link in a numbered namespace: EINVAL if there is none of that number."""
    return message(
        RTM_DELLINK, 0, IFINFOMSG.pack(0, 0, 0, 0, 0), number(IFLA_TARGET_NETNSID, nsid), text(IFLA_IFNAME, name)
    )


def add_address(index: int, address: bytes, prefix: int) -> bytes:
    """An address without the route that the kernel would make from its prefix; at once usable in IPv6."""
    version = 4 if len(address) == 4 else 6
    flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if version == 6 else 0)
    parts = attribute(IFA_LOCAL, address), attribute(IFA_ADDRESS, address), number(IFA_FLAGS, flags)
    header = IFADDRMSG.pack(FAMILY[version], prefix, 0, RT_SCOPE_UNIVERSE, index)
    return message(RTM_NEWADDR, CREATE, header, *parts)


def add_route(index: int, network: bytes, prefix: int, source: bytes) -> bytes:
    """What is in this network is on the device's link; connections to it come from `source`."""
    version = 4 if len(network) == 4 else 6
    scope = RT_SCOPE_LINK if version == 4 else RT_SCOPE_UNIVERSE
    header = RTMSG.pack(FAMILY[version], prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0)
    parts = attribute(RTA_DST, network), number(RTA_OIF, index), attribute(RTA_PREFSRC, source)
    return message(RTM_NEWROUTE, CREATE, header, *parts)


def add_entries(
    family: int, state: int, flags: int, index: int, pairs: list[tuple[bytes, bytes]], version: int
) -> list[bytes]:
    """Many neighbours or forwarding entries; `pairs` are (address, MAC), addresses of IP `version`."""
    pack = ENTRY[version].pack
    # All but address and MAC are the same in each: nlmsghdr, ndmsg, and the header of the first attribute.
    header = (ENTRY[version].size, RTM_NEWNEIGH, CREATE | NLM_F_REQUEST, 0, 0)
    entry = (family, index, state, flags, 0, 4 + ADDRESS_BYTES[version], NDA_DST)
    return [pack(*header, *entry, address, 10, NDA_LLADDR, mac) for address, mac in pairs]


def add_neighbours(index: int, pairs: list[tuple[bytes, bytes]], version: int) -> list[bytes]:
    """Permanent neighbours: the kernel never asks for them and never counts them against gc_thresh3."""
    return add_entries(FAMILY[version], NUD_PERMANENT, 0, index, pairs, version)


def add_forwarding(index: int, pairs: list[tuple[bytes, bytes]], version: int) -> list[bytes]:
    """Which underlay address the frames for a MAC go to."""
    return add_entries(AF_BRIDGE, NUD_PERMANENT | NUD_NOARP, NTF_SELF, index, pairs, version)


def get_link(nl: Netlink, name: str = "", index: int = 0) -> Link:
    """The device of this name or index in nl's namespace; KernelRefused ENODEV if there is none."""
    parts = [text(IFLA_IFNAME, name)] if name else []
    parts.append(number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS))
    request = message(RTM_GETLINK, 0, IFINFOMSG.pack(0, 0, index, 0, 0), *parts)
    return parse_link(nl.query(request, f"interface {name or index}")[0])


def parse_link(reply: Reply) -> Link:
    """An RTM_NEWLINK message."""
    _family, _type, index, flags, _change = IFINFOMSG.unpack_from(reply.body)
    name, mtu, kind, vni, port = "", 0, "", -1, -1
    for attr, payload in attributes(reply.body, IFINFOMSG.size):
        if attr == IFLA_IFNAME:
            name = _text(payload)
        elif attr == IFLA_MTU:
            mtu = NUMBER.unpack(payload)[0]
        elif attr == IFLA_LINKINFO:
            info = dict(attributes(payload))
            kind = _text(info.get(IFLA_INFO_KIND, b""))
            if kind == "vxlan":
                data = dict(attributes(info.get(IFLA_INFO_DATA, b"")))
                vni = NUMBER.unpack(data[IFLA_VXLAN_ID])[0]
                port = int.from_bytes(data[IFLA_VXLAN_PORT], "big")
    return Link(index, name, flags, mtu, kind, vni, port)


def list_cards(nl: Netlink) -> list[Card]:
    """Every interface of nl's namespace."""
    quiet = number(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    request = message(RTM_GETLINK, NLM_F_DUMP, IFINFOMSG.pack(0, 0, 0, 0, 0), quiet)
    return [parse_card(reply) for reply in nl.query(request, "interfaces")]


def parse_card(reply: Reply) -> Card:
    """An RTM_NEWLINK message."""
    _family, kind, index, flags, _change = IFINFOMSG.unpack_from(reply.body)
    found = dict(attributes(reply.body, IFINFOMSG.size))
    # An interface on one of another namespace has that namespace's index in IFLA_LINK.
    lower = _index(found, IFLA_LINK) if IFLA_LINK_NETNSID not in found else 0
    mac = found.get(IFLA_ADDRESS, b"")
    return Card(index, _text(found.get(IFLA_IFNAME, b"")), flags, kind, mac, _index(found, IFLA_MASTER), lower)


def _index(found: dict[int, bytes], kind: int) -> int:
    return int(NUMBER.unpack(found[kind])[0]) if kind in found else 0


def list_route_links(nl: Netlink) -> set[int]:
    """The interfaces over which somebody has laid routes: the kernel makes others by itself for each that is up."""
    request = message(RTM_GETROUTE, NLM_F_DUMP, RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0))
    found = set()
    for reply in nl.query(request, "routes"):
        protocol = RTMSG.unpack_from(reply.body)[5]
        parts = dict(attributes(reply.body, RTMSG.size))
        if protocol != RTPROT_KERNEL and RTA_OIF in parts:
            found.add(int(NUMBER.unpack(parts[RTA_OIF])[0]))
    return found


def move_link(index: int, netns_fd: int) -> bytes:
    """Give an interface to another namespace, down and without addresses; EEXIST where its name is taken there."""
    return message(RTM_NEWLINK, 0, IFINFOMSG.pack(0, 0, index, 0, 0), number(IFLA_NET_NS_FD, netns_fd))


def set_down(index: int, name: str = "") -> bytes:
    """Take it down, and give it its name."""
    rename = text(IFLA_IFNAME, name) if name else b""
    return message(RTM_NEWLINK, 0, IFINFOMSG.pack(0, 0, index, 0, IFF_UP), rename)


def add_own_address(index: int, address: bytes, prefix: int) -> bytes:
    """An address with the route to its block, as `ip address add` does."""
    version = 4 if len(address) == 4 else 6
    parts = attribute(IFA_LOCAL, address), attribute(IFA_ADDRESS, address), number(IFA_FLAGS, IFA_F_NODAD)
    header = IFADDRMSG.pack(FAMILY[version], prefix, 0, RT_SCOPE_UNIVERSE, index)
    return message(RTM_NEWADDR, CREATE, header, *parts)


def get_addresses(nl: Netlink) -> list[LinkAddress]:
    """Every address of nl's namespace, both families."""
    request = message(RTM_GETADDR, NLM_F_DUMP, IFADDRMSG.pack(0, 0, 0, 0, 0))
    found = []
    for reply in nl.query(request, "addresses"):
        _family, _prefix, _flags, scope, index = IFADDRMSG.unpack_from(reply.body)
        parts = dict(attributes(reply.body, IFADDRMSG.size))
        address = parts.get(IFA_LOCAL) or parts.get(IFA_ADDRESS)
        if address:
            found.append(LinkAddress(index, address, scope))
    return found


def _text(payload: bytes) -> str:
    return payload.rstrip(b"\0").decode(errors="surrogateescape")
