"""The site's network below the tunnels: this node's interface and address, and the other nodes' addresses.

Privileged: runs in the agent. Nothing on the launch path may wait for DNS, so /etc/hosts comes first
(`known_addresses`, remembered until the file changes), and only what is not there goes to the resolver
(`resolve`, which may block: the agent calls it in a child process when `known_addresses` left names over).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from enclos.netns.facts import KernelRefused, NameUnknown, UnderlayMissing
from enclos.netns.link import FAMILY, LinkAddress, get_addresses, get_link, ip_version, pack_address
from enclos.netns.netlink import Netlink
from enclos.netns.spec import VXLAN_OVERHEAD

HOSTS_PATH = "/etc/hosts"
NODE = "{node}"


@dataclass(frozen=True, slots=True)
class Underlay:
    """Where this node's tunnels end: interface, address, and the interface's MTU in bytes."""

    ifindex: int
    ifname: str
    address: str
    mtu: int

    @property
    def ipv6(self) -> bool:
        """The family of the underlay."""
        return ":" in self.address

    @property
    def overlay_mtu(self) -> int:
        """What is left for the network inside, in bytes."""
        return self.mtu - VXLAN_OVERHEAD[ip_version(self.address)]


class HostsFile:
    """/etc/hosts, read again when it has changed."""

    def __init__(self, path: str = HOSTS_PATH) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._names: dict[str, list[str]] = {}

    def addresses(self, name: str) -> list[str]:
        """Usable addresses of a name, in the file's order. Call refresh() first."""
        return self._names.get(name.lower(), [])

    def refresh(self) -> None:
        """Read the file if it is another one than last time; a missing file has no names."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._names = None, {}
            return
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            with self._path.open(encoding="utf-8", errors="surrogateescape") as file:
                self._names = parse_hosts(file)
            self._stamp = stamp


def parse_hosts(lines: Iterable[str]) -> dict[str, list[str]]:
    """Name (lower case) to its addresses. Loopback and link-local ones are left out: no tunnel ends there,
    and Debian gives every machine's own name to 127.0.1.1."""
    names: dict[str, list[str]] = {}
    for line in lines:
        fields = line.partition("#")[0].split()
        if len(fields) > 1 and _usable(fields[0]):
            for name in fields[1:]:
                names.setdefault(name.lower(), []).append(fields[0])
    return names


def _usable(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return not (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
        or (address.version == 6 and (address.scope_id is not None or address.ipv4_mapped is not None))
    )


_HOSTS = HostsFile()


def known_addresses(names: Sequence[str], pattern: str, family: int = 0) -> list[str]:
    """The underlay address of each node from /etc/hosts, "" where it has none. Never blocks.

    Args:
        names: node names.
        pattern: the name of a node on the underlay, `{node}` or `{node}-ib`.
        family: AF_INET or AF_INET6 for only these; 0 prefers IPv4.
    """
    _HOSTS.refresh()
    return [_choose(_HOSTS.addresses(underlay_name(name, pattern)), family) for name in names]


def resolve(names: Sequence[str], pattern: str, family: int = 0) -> list[str]:
    """known_addresses, and the resolver for what is missing: may block for as long as DNS takes.

    Raises:
        NameUnknown: .name is the first one that has no usable address; it is the underlay's name.
    """
    found = known_addresses(names, pattern, family)
    for place, address in enumerate(found):
        if not address:
            name = underlay_name(names[place], pattern)
            found[place] = _choose(_asked(name), family)
            if not found[place]:
                raise NameUnknown(name)
    return found


def underlay_name(node: str, pattern: str) -> str:
    """A node's name on the underlay."""
    return pattern.replace(NODE, node)


def _asked(name: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError):
        return []
    addresses = [str(answer[4][0]) for answer in answers]
    return [address for address in addresses if _usable(address)]


def _choose(addresses: Sequence[str], family: int) -> str:
    versions = (4, 6) if not family else (4,) if family == FAMILY[4] else (6,)
    for version in versions:
        for address in addresses:
            if ip_version(address) == version:
                return address
    return ""


def find(node: str, interface: str, name_pattern: str) -> Underlay:
    """This node's underlay, in the namespace that the process is in. May block on DNS: for the agent's start.

    Without `interface` it is the one that has an address of the node's own underlay name. With it, the name
    only chooses among its addresses; if it has none of them, its first one (IPv4 before IPv6) is taken.

    Raises:
        NameUnknown: no interface is set, and the name has no usable address.
        UnderlayMissing: no such interface, or no interface with such an address.
    """
    name = underlay_name(node, name_pattern)
    _HOSTS.refresh()
    wanted = _HOSTS.addresses(name) or _asked(name)
    with Netlink() as nl:
        present = get_addresses(nl)
        if interface:
            return _of_interface(nl, interface, wanted, present)
        if not wanted:
            raise NameUnknown(name)
        for address in sorted(wanted, key=ip_version):
            packed = pack_address(address)
            for link_address in present:
                if link_address.address == packed:
                    return _underlay(nl, link_address.ifindex, address)
    raise UnderlayMissing(name, f"no interface has the address {', '.join(wanted)}")


def _of_interface(nl: Netlink, interface: str, wanted: Sequence[str], present: list[LinkAddress]) -> Underlay:
    try:
        ifindex = get_link(nl, interface).ifindex
    except KernelRefused as refused:
        raise UnderlayMissing(interface, "no such interface") from refused
    texts = [_text(entry.address) for entry in present if entry.ifindex == ifindex]
    own = sorted((address for address in texts if _usable(address)), key=ip_version)
    if not own:
        raise UnderlayMissing(interface, "has no address that a tunnel can end at")
    return _underlay(nl, ifindex, next((address for address in own if address in wanted), own[0]))


def _underlay(nl: Netlink, ifindex: int, address: str) -> Underlay:
    device = get_link(nl, index=ifindex)
    return Underlay(ifindex, device.name, address, device.mtu)


def _text(address: bytes) -> str:
    return socket.inet_ntop(FAMILY[4 if len(address) == 4 else 6], address)
