"""Nodes for the network tests: network namespaces on one bridge, and what users and attackers do in them.

Everything is made of real kernel objects; nothing of a node is left when its descriptors are closed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from enclos.netns import namespace, overlay, underlay
from enclos.netns.guard import Guard
from enclos.netns.names import address_plan, mac_bytes
from enclos.netns.overlay import OverlaySpec, Peer

PORT = 4789
IFNAME = "enclos0"
IPV4 = "10.77.0.0/16"
IPV6 = "fd65:6e63:6c6f::/48"
USER = 1234
QUIET_SECONDS = 0.3
"""How long nothing may arrive. What is let through arrives in well under a millisecond."""


@dataclass
class Node:
    """A node of the site: a namespace with eth0 on the site's network, and the networks it has joined."""

    name: str
    index: int
    fd: int
    guard: Guard | None = None
    networks: dict[int, int] = field(default_factory=dict)
    """VNI to the descriptor of the job's namespace."""

    @property
    def ipv4(self) -> str:
        return f"192.0.2.{self.index + 1}"

    @property
    def ipv6(self) -> str:
        return f"2001:db8::{self.index + 1:x}"

    def run(self, command: str, text: str = "") -> str:
        return run(self.fd, command, text)

    def start_guard(self, ipv6: bool = False) -> Guard:
        with namespace.inside(self.fd):
            self.guard = Guard(PORT, "eth0", ipv6)
            self.guard.ensure()
        return self.guard

    def counters(self) -> dict[str, int]:
        assert self.guard
        return self.guard.counters()


def run(fd: int, command: str, text: str = "") -> str:
    """A command in that namespace; its standard output."""
    with namespace.inside(fd):
        done = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@contextlib.contextmanager
def site(count: int) -> Iterator[list[Node]]:
    """`count` nodes n0, n1 … on one bridge, each with an IPv4 and an IPv6 address."""
    with contextlib.ExitStack() as stack:
        switch = overlay.create_private()
        stack.callback(os.close, switch)
        run(switch, "ip -batch -", "link add br0 type bridge\nlink set br0 up\n")
        nodes = []
        for index in range(count):
            node = Node(f"n{index}", index, overlay.create_private())
            stack.callback(os.close, node.fd)
            stack.callback(_leave_all, node)
            _wire(switch, node)
            nodes.append(node)
        yield nodes


def _wire(switch: int, node: Node) -> None:
    path = f"/proc/{os.getpid()}/fd"
    peer = f"type veth peer name p{node.index} netns {path}/{switch}"
    run(node.fd, f"ip link add eth0 netns {path}/{node.fd} {peer}")
    run(switch, f"ip link set p{node.index} master br0 up")
    lines = (
        f"addr add {node.ipv4}/24 dev eth0",
        f"addr add {node.ipv6}/64 dev eth0 nodad",
        "link set eth0 up",
    )
    run(node.fd, "ip -batch -", "\n".join(lines) + "\n")


def _leave_all(node: Node) -> None:
    for fd in node.networks.values():
        overlay.remove(fd, IFNAME)
        os.close(fd)
    if node.guard:
        node.guard.close()


def spec(node: Node, vni: int, members: Sequence[Node], ipv6: bool = False) -> OverlaySpec:
    """What the agent on `node` would make of this list of nodes."""
    with namespace.inside(node.fd):
        below = underlay.find(node.ipv6 if ipv6 else node.ipv4, "", "{node}")
    peers = tuple(
        Peer(place, member.name, member.ipv6 if ipv6 else member.ipv4) for place, member in enumerate(members)
    )
    place = members.index(node)
    mtu = below.overlay_mtu
    return OverlaySpec(vni, PORT, IFNAME, mtu, below.ifindex, below.address, place, peers, IPV4, IPV6)


def join(vni: int, members: Sequence[Node], ipv6: bool = False) -> None:
    """Make the network `vni` on all its nodes; those with a guard admit their peers."""
    for node in members:
        wanted = spec(node, vni, members, ipv6)
        with namespace.inside(node.fd):
            if node.guard:
                node.guard.admit(vni, [peer.underlay for peer in wanted.peers])
            node.networks[vni] = overlay.create(wanted)


def leave(node: Node, vni: int) -> None:
    """Take the network away from one node."""
    fd = node.networks.pop(vni)
    overlay.remove(fd, IFNAME)
    os.close(fd)


def overlay_address(vni: int, place: int, version: int) -> str:
    """The address of the network's node number `place`."""
    plan = address_plan(IPV4, IPV6, vni)
    return plan.ipv4(place) if version == 4 else plan.ipv6(place)


def socket_in(fd: int, address: str, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of the address's family in that namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.inside(fd):
        return socket.socket(family, kind, protocol)


def tcp_works(client_fd: int, server_fd: int, address: str, size: int = 100_000) -> str:
    """Connect from one namespace to `address` in another and exchange data; returns the client's address."""
    payload = os.urandom(size)
    with (
        socket_in(server_fd, address, socket.SOCK_STREAM) as listener,
        socket_in(client_fd, address, socket.SOCK_STREAM) as client,
    ):
        listener.settimeout(3)
        listener.bind((address, 0))
        listener.listen()
        client.settimeout(3)
        client.connect((address, listener.getsockname()[1]))
        server, peer = listener.accept()
        with server:
            server.settimeout(3)
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: server.recv(65536), b""))
            server.sendall(received[::-1])
            server.close()
            assert b"".join(iter(lambda: client.recv(65536), b""))[::-1] == payload
    return str(peer[0])


def ping(fd: int, address: str) -> bool:
    """An ICMP echo as an ordinary user would send one, with a datagram socket; True if it is answered."""
    version6 = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if version6 else socket.IPPROTO_ICMP
    with socket_in_as(USER, fd, address, socket.SOCK_DGRAM, protocol) as sock:
        sock.settimeout(1)
        try:
            sock.sendto(struct.pack(">BBHHH", 128 if version6 else 8, 0, 0, 0, 1) + b"enclos", (address, 0))
            return sock.recv(100)[:1] == (b"\x81" if version6 else b"\0")
        except TimeoutError:
            return False


def socket_in_as(uid: int, fd: int, address: str, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that a user has made: its checks, and its owner, are that user's."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with mine, theirs:

        def make() -> None:
            with socket_in_user(address, kind, protocol) as sock:
                socket.send_fds(theirs, [b"."], [sock.fileno()])

        assert as_user(uid, fd, make) == 0
        _, fds, _, _ = socket.recv_fds(mine, 1, 1)
    return socket.socket(fileno=fds[0])


def socket_in_user(address: str, kind: int, protocol: int = 0) -> socket.socket:
    """A socket of the address's family, where we are."""
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind, protocol)


def as_user(uid: int, fd: int, action: Callable[[], None]) -> int:
    """Run the action in a child that is in this namespace and is this user; the errno it ended with, or 0."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            with namespace.inside(fd):
                if uid:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                try:
                    action()
                    code = 0
                except OSError as error:
                    code = error.errno or 255
                os._exit(code)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True)
class Forgery:
    """A frame as an attacker makes it: UDP to a program on node `place` of network `vni`, in a VXLAN header."""

    vni: int
    place: int
    reserved: int = 0
    mark: bytes = b"forged"
    program_port: int = 9999

    def inner(self) -> bytes:
        """The Ethernet frame."""
        plan = address_plan(IPV4, IPV6, self.vni)
        source = plan.ipv4_int(self.place + 1).to_bytes(4, "big")
        target = plan.ipv4_int(self.place).to_bytes(4, "big")
        macs = mac_bytes(self.vni, self.place) + mac_bytes(self.vni, self.place + 1)
        datagram = udp(7777, self.program_port, self.mark)
        return macs + b"\x08\x00" + ipv4(source, target, datagram)

    def payload(self) -> bytes:
        """What follows the UDP header to the tunnel's port."""
        return struct.pack(">II", 0x08000000, self.vni << 8 | self.reserved) + self.inner()


def udp(source: int, target: int, data: bytes, checksum: int = 0) -> bytes:
    """A UDP datagram."""
    return struct.pack(">HHHH", source, target, 8 + len(data), checksum) + data


def ipv4(source: bytes, target: bytes, data: bytes) -> bytes:
    """An IPv4 packet with UDP in it."""
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 0, 0, 64, 17, 0, source, target)
    return head[:10] + struct.pack(">H", checksum16(head)) + head[12:] + data


def checksum16(data: bytes) -> int:
    """The Internet checksum of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


@contextlib.contextmanager
def program(node: Node, vni: int) -> Iterator[socket.socket]:
    """The tenant's program that a forgery is aimed at: a UDP socket in the job's namespace."""
    with socket_in(node.networks[vni], "0.0.0.0", socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 9999))
        sock.settimeout(QUIET_SECONDS)
        yield sock


def arrived(sock: socket.socket) -> bool:
    """Whether the program got anything."""
    try:
        sock.recv(2048)
    except TimeoutError:
        return False
    return True


def send_as(uid: int, fd: int, target: str, payload: bytes) -> int:
    """A UDP packet to the tunnels' port from a user's socket; the errno, or 0."""

    def attack() -> None:
        with socket_in_user(target, socket.SOCK_DGRAM) as sock:
            sock.sendto(payload, (target, PORT))

    return as_user(uid, fd, attack)
