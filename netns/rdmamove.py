"""Moving an RDMA device with its network interfaces to another namespace and back, and whether the node can spare it.

A device is known by its GUID: the kernel takes one back from a namespace that has died, to the initial namespace and
perhaps with its interfaces under other names. Knows neither jobs nor records (runtime/devices/holdings.py). Privileged;
moves wait for the kernel, so the agent calls them in threads, which have a namespace of their own to be in.
Source: drivers/infiniband/core/device.c (rdma_dev_change_netns, rdma_dev_exit_net).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from enclos.netns import link, nldev
from enclos.netns.batch import Batch
from enclos.netns.facts import DeviceInUse, DeviceMissing, KernelRefused
from enclos.netns.link import Card
from enclos.netns.namespace import OWN, inside
from enclos.netns.netlink import Netlink

ARPHRD_INFINIBAND = 32
RT_SCOPE_LINK = link.RT_SCOPE_LINK
OWN_MODULES = frozenset({"ib_core", "ib_mad", "ib_ipoib", "ib_cm", "rdma_cm"})
"""Have queue pairs on every device, used or not: the core, its management, and IPoIB, whose interface tells its use."""
SYSFS = "/sys/class/infiniband"
LINK_LOCAL = bytes.fromhex("fe80000000000000")
MAPPED = bytes(10) + b"\xff\xff"
"""An IPv4 address is written so in a table of addresses."""
# The table follows the interfaces' addresses by a work queue, and nothing says when it has: what a device that has just
# come back had in its namespace may still be there.
STALE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of a device: how it is called, known by, and whether it was up."""

    name: str
    mac: str
    up: bool


@dataclass(frozen=True, slots=True)
class Movable:
    """A device with what has to be known to bring it back, and for the site. Goes into a record.

    `ports` are the GUIDs of its InfiniBand ports.
    """

    guid: int
    name: str
    interfaces: tuple[Interface, ...]
    ports: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def of_record(found: dict[str, Any]) -> Movable:
        """What `record` made; raises KeyError, TypeError or ValueError for anything else."""
        rows = tuple(Interface(str(row["name"]), str(row["mac"]), bool(row["up"])) for row in found["interfaces"])
        ports = tuple(int(port) for port in found.get("ports", ()))
        return Movable(int(found["guid"]), str(found["name"]), rows, ports)


class Address(NamedTuple):
    """An address for an interface inside, packed, with its prefix length."""

    address: bytes
    prefix: int


def inspect(name: str, underlay_ifindex: int = 0) -> Movable:
    """A device of this namespace that the node can spare.

    Raises:
        DeviceMissing: it is not here.
        DeviceInUse: `.reason` says by whom: the kernel's own users, programs, or an interface that the node uses.
    """
    with Netlink(nldev.NETLINK_RDMA) as nl, Netlink() as route:
        device = next((found for found in nldev.devices(nl) if found.name == name), None)
        if device is None:
            raise DeviceMissing(name)
        cards = _cards(nl, route, device)
        reason = _user(nl, device) or _carries(route, cards, underlay_ifindex) or _foreign(route, cards, device)
    if reason:
        raise DeviceInUse(name, reason)
    rows = tuple(Interface(card.name, card.mac.hex(":"), bool(card.flags & link.IFF_UP)) for card in cards)
    return Movable(device.node_guid, name, rows, port_guids(name))


def port_guids(name: str, sysfs: str = SYSFS) -> tuple[int, ...]:
    """The GUIDs by which a subnet manager knows a device's ports; none where they are not InfiniBand's.

    A port's first address ends in its GUID (IBTA vol. 1, 4.1.1). netlink does not tell it.
    """
    folder = Path(sysfs, name, "ports")
    found: list[int] = []
    with suppress(OSError):
        for port in sorted(folder.iterdir(), key=lambda path: int(path.name)):
            if (port / "link_layer").read_text().strip() == "InfiniBand":
                found.append(int((port / "gids/0").read_text().strip().replace(":", "")[-16:], 16))
    return tuple(found)


def _cards(nl: Netlink, route: Netlink, device: nldev.RdmaDevice) -> list[Card]:
    """The interfaces of the device's ports (RoCE), and those of the same function (IPoIB)."""
    indexes = {port.ifindex for port in nldev.ports(nl, device)}
    names: set[str] = set()
    with suppress(OSError):
        names = set(os.listdir(f"{SYSFS}/{device.name}/device/net"))
    return [card for card in link.list_cards(route) if card.ifindex in indexes or card.name in names]


def _user(nl: Netlink, device: nldev.RdmaDevice) -> str:
    """Who has it open; a connection that only waits on all devices is none."""
    found = nldev.resources(nl, device)
    modules = sorted({resource.owner for resource in found} - OWN_MODULES - {""})
    if modules:
        return f"the kernel uses it ({', '.join(modules)})"
    pids = sorted({resource.pid for resource in found if resource.pid})
    if pids:
        return f"process {pids[0]} of the node uses it"
    if nldev.counts(nl).get(device.name, {}).get("ctx", 0):
        return "a program of the node has it open"
    return ""


def _carries(route: Netlink, cards: Sequence[Card], underlay_ifindex: int) -> str:
    """What the node does over the interfaces."""
    addressed = {entry.ifindex for entry in link.get_addresses(route) if entry.scope != RT_SCOPE_LINK}
    routed = link.list_route_links(route) if cards else set()
    above = {card.lower: card.name for card in link.list_cards(route) if card.lower} if cards else {}
    for card in cards:
        if card.ifindex == underlay_ifindex:
            return f"its interface {card.name} is the underlay of the networks"
        if card.ifindex in addressed:
            return f"its interface {card.name} has an address of the node"
        if card.ifindex in routed:
            return f"the node has routes over its interface {card.name}"
        if card.master:
            return f"its interface {card.name} is part of a bridge or bond"
        if card.ifindex in above:
            return f"interface {above[card.ifindex]} stands on its interface {card.name}"
    return ""


def _foreign(route: Netlink, cards: Sequence[Card], device: nldev.RdmaDevice) -> str:
    """An address in the device's table that is not of its interfaces here: a VLAN's or macvlan's of another namespace.

    Nothing else shows such an interface. Whoever has the device may use all of its indexes: the kernel does not look
    where the interface of one is (verbs.c, rdma_fill_sgid_attr; tried on 7.2).
    """
    names = {card.ifindex: card.name for card in cards}
    own = {(entry.address, names[entry.ifindex]) for entry in link.get_addresses(route) if entry.ifindex in names}
    deadline = time.monotonic() + STALE_SECONDS
    while ifname := _stranger(device.name, own, set(names.values())):
        if time.monotonic() > deadline:
            return f"interface {ifname} of another network namespace has an address on it"
        time.sleep(STALE_SECONDS / 10)
    return ""


def _stranger(name: str, own: set[tuple[bytes, str]], ifnames: set[str]) -> str:
    """The first interface in a device's table that has an address there and not here, "" for none.

    A RoCE device has a link-local address that it makes itself, whether or not its interface has one.
    """
    for address, ifname in table(name):
        if (address, ifname) not in own and not (address.startswith(LINK_LOCAL) and ifname in ifnames):
            return ifname
    return ""


def table(name: str, sysfs: str = SYSFS) -> list[tuple[bytes, str]]:
    """The addresses that a device has of network interfaces, wherever those are, packed as an interface has them.

    The kernel has a file for each place in the table, and most are empty: some milliseconds.
    """
    found: list[tuple[bytes, str]] = []
    for port in Path(sysfs, name, "ports").glob("[0-9]*"):
        interfaces = port / "gid_attrs/ndevs"
        for place in os.listdir(interfaces) if interfaces.is_dir() else ():
            with suppress(OSError):  # EINVAL: an empty place.
                ifname = _line(f"{interfaces}/{place}")
                address = bytes.fromhex(_line(f"{port}/gids/{place}").replace(":", ""))
                found.append((address.removeprefix(MAPPED), ifname))
    return found


def _line(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 256).decode().strip()
    finally:
        os.close(fd)


def move(movable: Movable, netns_fd: int, addresses: Sequence[Address] = ()) -> None:
    """Give a device and its interfaces to another namespace, and bring the first interface up there.

    The interfaces first: the device finds its addresses in the namespace where they are by then. Does not put back what
    it has moved when it fails; `bring_back` does.

    Args:
        addresses: for the first interface.

    Raises:
        DeviceMissing: it is not in this namespace.
        KernelRefused: EOPNOTSUPP in shared mode, and for a driver that cannot.
    """
    with Netlink() as route:
        batch = Batch()
        for card in _of(movable, link.list_cards(route)):
            if card.type != ARPHRD_INFINIBAND:  # IPoIB's is made anew where the device is.
                batch.add(link.move_link(card.ifindex, netns_fd), card.name)
        route.run(batch)
    _move_device(movable, netns_fd)
    with inside(netns_fd), Netlink() as route:
        batch = Batch()
        for place, card in enumerate(_of(movable, link.list_cards(route))):
            batch.add(link.set_up(card.ifindex), card.name)
            for address in addresses if place == 0 else ():
                batch.add(link.add_own_address(card.ifindex, *address), f"address of {card.name}")
        route.run(batch)


def bring_back(movable: Movable, netns_fd: int) -> bool:
    """Take a device and its interfaces out of a namespace, if they are there: the device first, then interfaces.

    Returns:
        Whether the device is in the present namespace now.
    """
    own_fd = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(netns_fd):
            with suppress(DeviceMissing):
                _move_device(movable, own_fd)
            with Netlink() as route:
                for card in _of(movable, link.list_cards(route)):
                    if card.type != ARPHRD_INFINIBAND:
                        _return_link(route, card, own_fd)
    finally:
        os.close(own_fd)
    return settle(movable)


def _return_link(route: Netlink, card: Card, own_fd: int) -> None:
    """Under another name, if somebody has taken its own meanwhile: then `settle` finds it by its MAC."""
    try:
        _run(route, link.move_link(card.ifindex, own_fd), card.name)
    except KernelRefused as refused:
        if refused.errno != errno.EEXIST:
            raise
        spare = f"rdma{card.mac.hex()[-10:]}"
        _run(route, link.set_down(card.ifindex, spare), card.name)
        _run(route, link.move_link(card.ifindex, own_fd), card.name)


def settle(movable: Movable) -> bool:
    """Give what is in this namespace the names that it had, and its interfaces the state; False if the device is not.

    For a device that came back, by us or by the end of its namespace.
    """
    with Netlink(nldev.NETLINK_RDMA) as nl:
        here = any(device.node_guid == movable.guid for device in nldev.devices(nl))
    with Netlink() as route:
        cards = link.list_cards(route)
        taken = {card.name for card in cards}
        rows = {row.mac: row for row in movable.interfaces}
        for card in _of(movable, cards):
            row = rows[card.mac.hex(":")]
            if card.name != row.name and row.name not in taken:
                _run(route, link.set_down(card.ifindex, row.name), row.name)
            if row.up:
                _run(route, link.set_up(card.ifindex), row.name)
    return here


def is_in(movable: Movable, netns_fd: int) -> bool:
    """Whether the device is in that namespace."""
    with inside(netns_fd), Netlink(nldev.NETLINK_RDMA) as nl:
        return any(device.node_guid == movable.guid for device in nldev.devices(nl))


def make_soft(name: str, ifname: str, netns_fd: int) -> None:
    """A Soft-RoCE device on an interface of that namespace; one that is there already is accepted.

    Raises:
        KernelRefused: EINVAL where there is no rdma_rxe; what the driver says where it knows no namespaces (Linux 6.1).
    """
    with inside(netns_fd), Netlink(nldev.NETLINK_RDMA) as nl:
        # In shared mode all devices are shown, but the interface of its port only where that is.
        present = next((device for device in nldev.devices(nl) if device.name == name), None)
        if present is not None and any(port.ifname == ifname for port in nldev.ports(nl, present)):
            return
        _run(nl, nldev.add_link(name, "rxe", ifname), name)


def _move_device(movable: Movable, netns_fd: int) -> None:
    with Netlink(nldev.NETLINK_RDMA) as nl:
        device = next((found for found in nldev.devices(nl) if found.node_guid == movable.guid), None)
        if device is None:
            raise DeviceMissing(movable.name)
        _run(nl, nldev.move_device(device.dev_index, netns_fd), movable.name)


def _of(movable: Movable, cards: Sequence[Card]) -> list[Card]:
    """The device's interfaces among these, in its order. What stands on one (a VLAN) may have its MAC."""
    found = {card.mac.hex(":"): card for card in sorted(cards, key=lambda card: not card.lower)}
    return [found[row.mac] for row in movable.interfaces if row.mac in found]


def _run(nl: Netlink, request: bytes, what: str) -> None:
    batch = Batch()
    batch.add(request, what)
    nl.run(batch)
