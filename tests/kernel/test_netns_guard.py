"""The guard against real attacks: a forged VXLAN packet is aimed at a tenant's program from everywhere.

Each attack is first shown to work where the guard is off or lacks the rule in question, so that a forgery
that is simply malformed cannot pass for a defence.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from enclos.netns import guard as guard_module
from enclos.netns import namespace
from enclos.netns.facts import KernelRefused, PortTaken, RulesRefused
from enclos.netns.guard import Guard
from enclos.netns.names import HOLDER_NAMES, HOLDER_VNI
from netns_nodes import (
    PORT,
    USER,
    Forgery,
    Node,
    arrived,
    as_user,
    checksum16,
    join,
    overlay_address,
    ping,
    program,
    send_as,
    site,
    socket_in_as,
    tcp_works,
    udp,
)

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

VNI = 0x2345
OTHER = 0x2346
FORGERY = Forgery(VNI, 1)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """n0 and n1 with a guard and the network VNI between them; n2 is on the wire, without an agent."""
    with site(3) as made:
        for node in made[:2]:
            node.start_guard()
        join(VNI, made[:2])
        yield made


def without_guard(node: Node) -> None:
    with namespace.inside(node.fd):
        guard_module.uninstall()


def counted(node: Node, action: Callable[[], object]) -> dict[str, int]:
    """What the action added to the node's counters."""
    before = node.counters()
    action()
    return {name: count - before[name] for name, count in node.counters().items() if count != before[name]}


def test_tunnel_works_with_both_guards_up(nodes: list[Node]) -> None:
    first, second = (node.networks[VNI] for node in nodes[:2])
    for version in (4, 6):
        assert ping(first, overlay_address(VNI, 1, version)) and ping(second, overlay_address(VNI, 0, version))
        tcp_works(first, second, overlay_address(VNI, 1, version))
    assert not any(nodes[0].counters().values()) and not any(nodes[1].counters().values())


@pytest.mark.parametrize("uid", [USER, 0])
def test_a_user_of_a_peer_cannot_send_into_the_tunnel(nodes: list[Node], uid: int) -> None:
    with program(nodes[1], VNI) as target:
        drops = counted(nodes[0], lambda: send_as(uid, nodes[0].fd, nodes[1].ipv4, FORGERY.payload()) == errno.EPERM)
        assert drops == {"out_user": 1} and not arrived(target)
        without_guard(nodes[0])
        # The source address is a peer's, so only the sender's own node can stop it.
        assert send_as(uid, nodes[0].fd, nodes[1].ipv4, FORGERY.payload()) == 0
        assert arrived(target)


@pytest.mark.parametrize("uid", [USER, 0])
@pytest.mark.parametrize("own", ["127.0.0.1", "127.9.9.9", "192.0.2.2"])
def test_a_user_cannot_send_to_a_tenant_of_the_same_node(nodes: list[Node], uid: int, own: str) -> None:
    with program(nodes[1], VNI) as target:

        def attack() -> int:
            return send_as(uid, nodes[1].fd, own, FORGERY.payload())

        assert counted(nodes[1], attack) == {"out_user": 1} and not arrived(target)
        # And without the rule on the way out, the one on the way in.
        nodes[1].run("nft flush chain inet enclos output")
        assert counted(nodes[1], attack) == {"in_interface": 1} and not arrived(target)
        without_guard(nodes[1])
        assert attack() == 0 and arrived(target)


def test_a_raw_socket_is_a_users_socket(nodes: list[Node]) -> None:
    datagram = udp(50000, PORT, FORGERY.payload())

    def attack() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as sock:
            sock.sendto(datagram, (nodes[1].ipv4, 0))

    with program(nodes[1], VNI) as target:
        assert as_user(0, nodes[0].fd, attack) == errno.EPERM and not arrived(target)
        without_guard(nodes[0])
        assert as_user(0, nodes[0].fd, attack) == 0 and arrived(target)


def test_a_stranger_is_dropped_even_as_root(nodes: list[Node]) -> None:
    with program(nodes[1], VNI) as target:

        def attack() -> int:
            return send_as(0, nodes[2].fd, nodes[1].ipv4, FORGERY.payload())

        assert counted(nodes[1], attack) == {"in_stranger": 1} and not arrived(target)
        without_guard(nodes[1])
        attack()
        assert arrived(target)


def test_a_peer_of_one_network_cannot_speak_into_another(nodes: list[Node]) -> None:
    join(OTHER, [nodes[1], nodes[2]])
    without_guard(nodes[0])  # the rogue: a peer of VNI, not of OTHER
    forgery = Forgery(OTHER, 0)
    with program(nodes[1], OTHER) as target:
        assert counted(nodes[1], lambda: send_as(0, nodes[0].fd, nodes[1].ipv4, forgery.payload())) == {
            "in_stranger": 1
        }
        assert not arrived(target)
        assert send_as(0, nodes[2].fd, nodes[1].ipv4, forgery.payload()) == 0
        assert arrived(target)


@pytest.mark.parametrize("reserved", [1, 0x80, 0xFF])
def test_the_reserved_byte_must_be_zero(nodes: list[Node], reserved: int) -> None:
    without_guard(nodes[0])
    payload = Forgery(VNI, 1, reserved=reserved).payload()
    assert counted(nodes[1], lambda: send_as(0, nodes[0].fd, nodes[1].ipv4, payload)) == {"in_stranger": 1}


def test_evicted_means_out(nodes: list[Node]) -> None:
    guard = nodes[1].guard
    assert guard
    peer = overlay_address(VNI, 0, 4)
    with namespace.inside(nodes[1].fd):
        assert guard.elements() == {(VNI, socket.inet_aton(nodes[0].ipv4))}, "own address, or none at all"
        guard.evict(VNI, [nodes[0].ipv4, nodes[1].ipv4])
        assert guard.elements() == set()
        assert not ping(nodes[1].networks[VNI], peer)
        guard.admit(VNI, [nodes[0].ipv4, nodes[1].ipv4])
        guard.admit(VNI, [nodes[0].ipv4])
        assert guard.elements() == {(VNI, socket.inet_aton(nodes[0].ipv4))}
    assert ping(nodes[1].networks[VNI], peer)


def test_own_address_as_source_is_dropped_although_it_is_in_the_set(nodes: list[Node]) -> None:
    nodes[1].run(f"nft add element inet enclos peers6 {{ {VNI << 8:#x} . {nodes[1].ipv6} }}")
    packet = ipv6(nodes[1].ipv6, nodes[1].ipv6, 17, udp6(nodes[1].ipv6, nodes[1].ipv6, FORGERY.payload()))
    assert counted(nodes[1], lambda: transmit(nodes[2], nodes[1], packet)) == {"in_own": 1}


def test_packets_that_are_only_passing_are_dropped(nodes: list[Node]) -> None:
    nodes[1].run("sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'")
    nodes[2].run("ip route add 198.51.100.0/24 via 192.0.2.2")
    nodes[1].run("ip route add 198.51.100.0/24 via 192.0.2.1")

    def attack() -> int:
        return send_as(0, nodes[2].fd, "198.51.100.9", FORGERY.payload())

    assert counted(nodes[1], attack) == {"forward": 1}


def udp6(source: str, target: str, data: bytes) -> bytes:
    """UDP with the checksum that IPv6 wants."""
    length = 8 + len(data)
    pseudo = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    pseudo += struct.pack(">II", length, 17)
    plain = pseudo + udp(50000, PORT, data)
    return udp(50000, PORT, data, checksum16(plain + b"\0" * (len(plain) % 2)))


def ipv6(source: str, target: str, following: int, data: bytes) -> bytes:
    """An IPv6 packet."""
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack(">IHBB", 6 << 28, len(data), following, 64) + addresses + data


def fragments(source: str, target: str, datagram: bytes, cut: int) -> list[bytes]:
    """The datagram behind an empty options header, in two parts; the first has `cut` bytes."""
    whole = struct.pack(">BB", 17, 0) + b"\x01\x04\0\0\0\0" + datagram

    def head(offset: int, more: int) -> bytes:
        return struct.pack(">BBHI", 60, 0, offset | more, 0xE0C105 + cut)

    return [
        ipv6(source, target, 44, head(0, 1) + whole[:cut]),
        ipv6(source, target, 44, head(cut, 0) + whole[cut:]),
    ]


def transmit(sender: Node, receiver: Node, *packets: bytes) -> None:
    """Packets with any source address, as a machine that nobody guards can send them."""
    mac = _mac(receiver)
    with namespace.inside(sender.fd), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
        for packet in packets:
            sock.sendto(packet, ("eth0", 0x86DD if packet[0] >> 4 == 6 else 0x0800, 0, 0, mac))
    # A TCP exchange on the same wire comes after it: when that is through, the packets have been handled.
    tcp_works(sender.fd, receiver.fd, receiver.ipv4)


def _mac(node: Node) -> bytes:
    fields = node.run("ip -o link show eth0").split()
    return bytes.fromhex(fields[fields.index("link/ether") + 1].replace(":", ""))


def test_ipv6_fragments_are_dropped_where_the_underlay_is_ipv6(nodes: list[Node]) -> None:
    """They are put together behind the input hook: the rules see no ports in the second, and where the
    sender wants it, no VNI in the first."""
    vni = 0x777
    nodes[1].start_guard(ipv6=True)
    join(vni, nodes[:2], ipv6=True)
    assert ping(nodes[0].networks[vni], overlay_address(vni, 1, 6))
    datagram = udp6(nodes[2].ipv6, nodes[1].ipv6, Forgery(vni, 1).payload())
    attacks = [fragments(nodes[2].ipv6, nodes[1].ipv6, datagram, cut) for cut in (8, 16, 24)]
    with program(nodes[1], vni) as target:
        for attack in attacks:
            dropped = counted(nodes[1], lambda packets=attack: transmit(nodes[2], nodes[1], *packets))  # type: ignore[misc]
            assert dropped == {"in_fragment": 2} and not arrived(target)
        without_guard(nodes[1])
        # With the first cut, which ends before the ports, Linux itself drops it (RFC 8200, from 5.11).
        transmit(nodes[2], nodes[1], *attacks[1])
        assert arrived(target)


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_port_of_a_user_is_a_clear_fact(address: str) -> None:
    with site(1) as (node,), socket_in_as(USER, node.fd, address, socket.SOCK_DGRAM) as sock:
        if address == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, PORT))
        with namespace.inside(node.fd):
            with pytest.raises(PortTaken) as caught:
                guard_module.hold_port(PORT)
            assert (caught.value.uid, caught.value.port) == (USER, PORT)
            assert f"{HOLDER_NAMES[6 if address == '::' else 4]}" not in node.run("ip -br link")
            sock.close()
            guard_module.hold_port(PORT)


def test_held_port_is_closed_to_users_and_open_to_networks() -> None:
    with site(2) as nodes:
        for node in nodes:
            with namespace.inside(node.fd):
                guard_module.hold_port(PORT)
                before = node.run("ip -o link")
                guard_module.hold_port(PORT)
                assert node.run("ip -o link") == before
        for address in ("0.0.0.0", "::", "127.0.0.1", "::1", nodes[0].ipv4, nodes[0].ipv6):
            for options in ([], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
                with socket_in_as(USER, nodes[0].fd, address, socket.SOCK_DGRAM) as sock:
                    for option in options:
                        sock.setsockopt(socket.SOL_SOCKET, option, 1)
                    with pytest.raises(OSError) as caught:
                        sock.bind((address, PORT))
                    assert caught.value.errno == errno.EADDRINUSE
        for vni, ipv6_underlay in ((1, False), (2, True)):
            join(vni, nodes, ipv6_underlay)
            assert ping(nodes[0].networks[vni], overlay_address(vni, 1, 4))


def test_holder_follows_the_port_and_respects_foreign_devices() -> None:
    with site(1) as (node,), namespace.inside(node.fd):
        guard_module.hold_port(PORT)
        guard_module.hold_port(4790)
        assert "4790" in node.run("ip -d link show enclos-hold4") and "4790" in node.run("ss -lun")
        assert str(PORT) not in node.run("ss -lun")
        guard_module.uninstall()
        guard_module.uninstall()
        assert "enclos" not in node.run("ip link") and not node.run("nft list ruleset")
        node.run(f"ip link add {HOLDER_NAMES[4]} type bridge")
        with pytest.raises(KernelRefused) as caught:
            guard_module.hold_port(PORT)
        assert (caught.value.errno, caught.value.object) == (errno.EEXIST, HOLDER_NAMES[4])


def test_nothing_comes_in_through_a_holder() -> None:
    with site(2) as (attacker, node):
        with namespace.inside(node.fd):
            guard_module.hold_port(PORT)
        node.start_guard()
        payload = Forgery(HOLDER_VNI, 1).payload()
        for target in (node.ipv4, node.ipv6):
            dropped = counted(node, lambda to=target: send_as(0, attacker.fd, to, payload))  # type: ignore[misc]
            assert dropped == {"in_stranger": 1}


def readable(guard: Guard) -> bool:
    poll = select.poll()
    poll.register(guard.fileno(), select.POLLIN)
    return bool(poll.poll(2000))


@pytest.mark.parametrize(
    "damage",
    [
        "flush ruleset",
        "delete table inet enclos",
        "flush chain inet enclos from_underlay",
        "insert rule inet enclos input accept",
        f"delete element inet enclos peers4 {{ {VNI << 8:#x} . 192.0.2.1 }}",
        f"add element inet enclos peers4 {{ {VNI << 8:#x} . 192.0.2.3 }}",
        "add table inet enclos { flags dormant; }",
    ],
)
def test_damage_is_noticed_and_mended(nodes: list[Node], damage: str) -> None:
    guard = nodes[1].guard
    assert guard
    with namespace.inside(nodes[1].fd):
        guard.handle_event()  # the table's own beginnings
        assert guard.intact()
        nodes[1].run(f"nft '{damage}'")
        assert readable(guard) and not guard.intact()
        assert guard.handle_event() is True
        assert guard.intact() and guard.elements() == {(VNI, socket.inet_aton(nodes[0].ipv4))}
        assert guard.handle_event() is False
    assert ping(nodes[1].networks[VNI], overlay_address(VNI, 0, 4))
    with program(nodes[1], VNI) as target:
        send_as(0, nodes[2].fd, nodes[1].ipv4, FORGERY.payload())
        assert not arrived(target)


def test_changes_of_others_and_of_ourselves_are_none_of_its_business(nodes: list[Node]) -> None:
    guard = nodes[1].guard
    assert guard
    with namespace.inside(nodes[1].fd):
        guard.handle_event()
        nodes[1].run("nft add table inet sites")
        assert readable(guard) and guard.handle_event() is False
        guard.admit(9, ["192.0.2.3"])
        assert guard.handle_event() is False
        assert guard.elements() == {(VNI, socket.inet_aton("192.0.2.1")), (9, socket.inet_aton("192.0.2.3"))}


def test_admit_brings_back_a_table_that_is_gone(nodes: list[Node]) -> None:
    guard = nodes[1].guard
    assert guard
    with namespace.inside(nodes[1].fd):
        nodes[1].run("nft flush ruleset")
        guard.evict(VNI + 5, ["192.0.2.3"])
        guard.admit(9, ["192.0.2.3"])
        assert guard.intact() and len(guard.elements()) == 2


def test_elements_outlive_the_agent(nodes: list[Node]) -> None:
    first = nodes[1].guard
    assert first
    first.close()
    again = nodes[1].start_guard()
    with namespace.inside(nodes[1].fd):
        assert again.elements() == {(VNI, socket.inet_aton(nodes[0].ipv4))}
        again.evict(VNI, [nodes[0].ipv4])
        assert again.elements() == set() and again.intact()


def test_many_elements_in_one_transaction(nodes: list[Node]) -> None:
    guard = nodes[0].guard
    assert guard
    with namespace.inside(nodes[0].fd):
        many = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(10_000)]
        many += [f"2001:db8:1::{i:x}" for i in range(10_000)]
        guard.admit(7, many)
        assert len(guard.elements()) == 20_001 and guard.intact()
        nodes[0].run("nft flush ruleset")
        assert guard.handle_event() and len(guard.elements()) == 20_001
        nodes[0].run("nft delete element inet enclos peers4 { 0x700 . 10.0.0.7 }")
        guard.evict(7, many)
        assert guard.intact()
        assert guard.elements() == {(VNI, socket.inet_aton(nodes[1].ipv4))}


def test_a_full_set_is_refused_and_forgotten(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    guard = nodes[0].guard
    assert guard
    monkeypatch.setattr("enclos.netns.nftables.ELEMENTS", 20)
    with namespace.inside(nodes[0].fd):
        guard.ensure()
        with pytest.raises(KernelRefused) as caught:
            guard.admit(7, [f"10.0.0.{i}" for i in range(1, 30)])
        assert (caught.value.errno, caught.value.object) == (errno.ENFILE, "guard set peers4")
        assert guard.intact() and guard.elements() == {(VNI, socket.inet_aton(nodes[1].ipv4))}


def test_the_listed_table_can_be_loaded_again(nodes: list[Node]) -> None:
    listing = nodes[0].run("nft list ruleset")
    nodes[0].run("nft -f -", f"flush ruleset\n{listing}")
    assert nodes[0].run("nft list ruleset") == listing


def test_a_table_that_nft_does_not_take_is_said_in_its_words(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = nodes[0].guard
    assert guard
    before = nodes[0].run("nft list ruleset")
    monkeypatch.setattr("enclos.netns.nftables.TABLE", "no-such syntax")
    with namespace.inside(nodes[0].fd), pytest.raises(RulesRefused, match="syntax error"):
        guard.ensure()
    monkeypatch.setattr(guard_module, "NFT", "no-such-nft")
    with namespace.inside(nodes[0].fd), pytest.raises(RulesRefused, match="no-such-nft"):
        guard.ensure()
    assert nodes[0].run("nft list ruleset") == before
