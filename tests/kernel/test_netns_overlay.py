"""A job's network between real namespaces: what is there, who reaches whom, and that it goes at once."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from enclos.netns import namespace, overlay, underlay
from enclos.netns.facts import BlockTooSmall, KernelRefused, PortTaken, UnderlayMissing, VniInUse
from enclos.netns.link import get_link
from enclos.netns.netlink import Netlink
from netns_nodes import (
    IFNAME,
    PORT,
    USER,
    Node,
    join,
    leave,
    overlay_address,
    ping,
    run,
    site,
    socket_in,
    socket_in_as,
    spec,
    tcp_works,
)

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

VNI = 0x1234


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with site(3) as made:
        yield made


def own_namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def links(fd: int) -> dict[str, dict[str, object]]:
    return {link["ifname"]: link for link in json.loads(run(fd, "ip -j -d link"))}


def udp_sockets(fd: int) -> str:
    return run(fd, f"ss -Hlun 'sport = :{PORT}'")


def test_device_is_inside_and_its_socket_outside(nodes: list[Node]) -> None:
    before = own_namespace()
    join(VNI, nodes[:2])
    assert own_namespace() == before
    inside = links(nodes[0].networks[VNI])
    assert set(inside) == {"lo", IFNAME}
    device = inside[IFNAME]
    assert set(device["flags"]) >= {"UP", "LOWER_UP", "NOARP"} and "UP" in inside["lo"]["flags"]  # type: ignore[call-overload,operator]
    assert device["mtu"] == 1450 and device["address"] == "02:00:12:34:00:00"
    data = device["linkinfo"]["info_data"]  # type: ignore[index]
    assert (data["id"], data["port"], data["local"], data["learning"]) == (VNI, PORT, "192.0.2.1", False)
    assert set(links(nodes[0].fd)) == {"lo", "eth0"}
    assert udp_sockets(nodes[0].fd) and not udp_sockets(nodes[0].networks[VNI])


def test_entries_are_exactly_the_peers(nodes: list[Node]) -> None:
    join(VNI, nodes)
    fd = nodes[1].networks[VNI]
    entries = json.loads(run(fd, "bridge -j fdb"))
    assert {(entry["mac"], entry["dst"], entry["state"]) for entry in entries} == {
        ("02:00:12:34:00:00", "192.0.2.1", "permanent"),
        ("02:00:12:34:00:02", "192.0.2.3", "permanent"),
    }
    neighbours = json.loads(run(fd, "ip -j neigh"))
    assert {(entry["dst"], entry["lladdr"], *entry["state"]) for entry in neighbours} == {
        (address, f"02:00:12:34:00:0{place}", "PERMANENT")
        for place in (0, 2)
        for address in (
            overlay_address(VNI, place, 4),
            overlay_address(VNI, place, 6),
            nodes[place].ipv4,
        )
    }
    addresses = {
        (entry["local"], entry["prefixlen"])
        for link in json.loads(run(fd, f"ip -j addr show {IFNAME}"))
        for entry in link["addr_info"]
    }
    assert addresses == {("10.77.0.2", 16), ("fd65:6e63:6c6f::1234:0:2", 96), ("192.0.2.2", 32)}


@pytest.mark.parametrize("ipv6", [False, True], ids=["underlay4", "underlay6"])
def test_nodes_reach_each_other_and_nobody_else_does(nodes: list[Node], ipv6: bool) -> None:
    join(VNI, nodes[:2], ipv6)
    join(VNI + 1, [nodes[1], nodes[0]], ipv6)
    first, second = (node.networks[VNI] for node in nodes[:2])
    for version in (4, 6):
        address, mine = overlay_address(VNI, 1, version), overlay_address(VNI, 0, version)
        assert ping(first, address) and ping(second, mine)
        assert tcp_works(first, second, address) == mine
        assert tcp_works(second, first, mine) == address
    host = nodes[1].ipv6 if ipv6 else nodes[1].ipv4
    # What a script calls `hostname -i` works, and comes from the same kind of address.
    assert tcp_works(first, second, host) == (nodes[0].ipv6 if ipv6 else nodes[0].ipv4)
    assert tcp_works(first, first, mine) == mine
    stranger = nodes[0].networks[VNI + 1]
    with socket_in(second, "10.77.0.2", socket.SOCK_STREAM) as listener:
        listener.bind(("10.77.0.2", 0))
        listener.listen()
        with socket_in(stranger, "10.77.0.2", socket.SOCK_STREAM) as client:
            client.settimeout(1)
            # In that network n1 is node 0 and has another address: 10.77.0.2 is the client's own namespace.
            with pytest.raises(ConnectionRefusedError):
                client.connect(("10.77.0.2", listener.getsockname()[1]))
    assert links(first)[IFNAME]["mtu"] == (1430 if ipv6 else 1450)


def test_full_packets_cross_without_fragments(nodes: list[Node]) -> None:
    join(VNI, nodes[:2])
    target = overlay_address(VNI, 1, 4)
    with (
        socket_in(nodes[1].networks[VNI], target, socket.SOCK_DGRAM) as server,
        socket_in(nodes[0].networks[VNI], target, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(1)
        server.bind((target, 5000))
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        client.sendto(bytes(1450 - 28), (target, 5000))
        assert len(server.recv(2000)) == 1422
        with pytest.raises(OSError, match="too long"):
            client.sendto(bytes(1450 - 27), (target, 5000))


def test_addresses_of_nobody_are_unreachable_at_once(nodes: list[Node]) -> None:
    join(VNI, nodes)
    for address in ("10.77.0.4", "10.77.200.1", "192.0.2.77", "fd65:6e63:6c6f::1234:0:4", "198.51.100.1"):
        with (
            socket_in(nodes[0].networks[VNI], address, socket.SOCK_DGRAM) as sock,
            pytest.raises(OSError, match="unreachable"),
        ):
            sock.connect((address, 9))


def test_services_below_1024_and_ping_need_no_privilege(nodes: list[Node]) -> None:
    join(VNI, nodes)
    private = overlay.create_private()
    for fd in (private, nodes[0].networks[VNI]):
        assert run(fd, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").strip() == "0"
        assert run(fd, "cat /proc/sys/net/ipv4/ping_group_range").split() == ["0", "2147483647"]
        for device in ("all", "default", "lo"):
            assert run(fd, f"cat /proc/sys/net/ipv6/conf/{device}/disable_ipv6").strip() == "0"
        assert ping(fd, "127.0.0.1") and ping(fd, "::1")
    os.close(private)


def test_private_namespace_has_only_a_loopback() -> None:
    fd = overlay.create_private()
    try:
        assert set(links(fd)) == {"lo"}
        assert tcp_works(fd, fd, "127.0.0.1") == "127.0.0.1"
    finally:
        os.close(fd)


def test_a_taken_vni_is_a_fact_of_its_own(nodes: list[Node]) -> None:
    join(VNI, nodes[:2])
    with namespace.inside(nodes[0].fd):
        with pytest.raises(VniInUse) as caught:
            overlay.create(spec(nodes[0], VNI, nodes[:2]))
        assert caught.value.vni == VNI
    assert ping(nodes[0].networks[VNI], overlay_address(VNI, 1, 4))
    leave(nodes[0], VNI)
    with namespace.inside(nodes[0].fd):
        nodes[0].networks[VNI] = overlay.create(spec(nodes[0], VNI, nodes[:2]))
    assert ping(nodes[0].networks[VNI], overlay_address(VNI, 1, 4))


def test_a_name_of_the_node_does_not_matter(nodes: list[Node]) -> None:
    run(nodes[0].fd, f"ip link add {IFNAME} type bridge")
    join(VNI, nodes[:2])
    assert ping(nodes[0].networks[VNI], overlay_address(VNI, 1, 4))


def test_failure_leaves_nothing_and_names_the_object(nodes: list[Node]) -> None:
    good = spec(nodes[0], VNI, nodes)
    before = own_namespace(), set(os.listdir("/proc/self/fd"))
    cases = [
        (dataclasses.replace(good, ifname="lo"), KernelRefused, "lo"),
        (dataclasses.replace(good, mtu=1 << 30), KernelRefused, f"vxlan device of VNI {VNI}"),
        (dataclasses.replace(good, peers=(good.peers[0], good.peers[1], good.peers[1])), KernelRefused, "n1"),
        (dataclasses.replace(good, ipv4="10.77.0.0/30"), BlockTooSmall, ""),
    ]
    for bad, fact, named in cases:
        with namespace.inside(nodes[0].fd), pytest.raises(fact) as caught:
            overlay.create(bad)
        assert named in str(getattr(caught.value, "object", ""))
        assert (own_namespace(), set(os.listdir("/proc/self/fd"))) == before
        # The number is free again at once.
        with namespace.inside(nodes[0].fd):
            fd = overlay.create(good)
            overlay.remove(fd, IFNAME)
            os.close(fd)


def test_port_of_a_user_is_named_with_its_owner(nodes: list[Node]) -> None:
    with socket_in_as(USER, nodes[0].fd, "0.0.0.0", socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", PORT))
        with namespace.inside(nodes[0].fd), pytest.raises(PortTaken) as caught:
            overlay.create(spec(nodes[0], VNI, nodes))
        assert caught.value.uid == USER


def test_removed_at_once_with_foreign_references_and_unsent_data(nodes: list[Node]) -> None:
    join(VNI, nodes[:2])
    target = overlay_address(VNI, 1, 4)
    sender = nodes[0].networks[VNI]
    with ExitStack() as stack:
        listener = stack.enter_context(socket_in(nodes[1].networks[VNI], target, socket.SOCK_STREAM))
        listener.bind((target, 0))
        listener.listen()
        client = socket_in(sender, target, socket.SOCK_STREAM)
        client.connect((target, listener.getsockname()[1]))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                client.send(bytes(1 << 16))
        client.close()
        assert run(sender, "ss -Htn state fin-wait-1"), "no orphan with unsent data to test with"
        foreign = os.open(f"/proc/self/fd/{sender}", os.O_RDONLY)
        stack.callback(os.close, foreign)

        leave(nodes[0], VNI)
        assert set(links(foreign)) == {"lo"}
        with namespace.inside(nodes[0].fd):
            nodes[0].networks[VNI] = overlay.create(spec(nodes[0], VNI, nodes[:2]))
        assert ping(nodes[0].networks[VNI], target)
        with namespace.inside(nodes[0].fd):
            overlay.remove(foreign, IFNAME)  # missing is fine


def test_a_lost_network_is_removed_by_its_number(nodes: list[Node]) -> None:
    """The agent was killed, a user's descriptor keeps the namespace: the next agent can make the network again."""
    with namespace.inside(nodes[0].fd):
        lost = overlay.create(spec(nodes[0], VNI, nodes))
        try:
            with pytest.raises(VniInUse):
                overlay.create(spec(nodes[0], VNI, nodes))
            overlay.remove_lost(VNI + 1, IFNAME)
            assert set(links(lost)) == {"lo", IFNAME}
            overlay.remove_lost(VNI, IFNAME)
            assert set(links(lost)) == {"lo"}
            overlay.remove_lost(VNI, IFNAME)
            # Its number is still taken; the new namespace does without.
            again = overlay.create(spec(nodes[0], VNI, nodes))
            overlay.remove(again, IFNAME)
            os.close(again)
        finally:
            os.close(lost)


def test_create_is_quick(nodes: list[Node]) -> None:
    """Not a benchmark: a bound that only a blocking or per-entry design would miss."""
    wanted = spec(nodes[0], VNI, nodes)
    times = []
    for _ in range(5):
        with namespace.inside(nodes[0].fd):
            start = time.perf_counter()
            fd = overlay.create(wanted)
            times.append(time.perf_counter() - start)
            overlay.remove(fd, IFNAME)
        os.close(fd)
    assert min(times) < 0.05


def test_underlay_is_found_by_address_and_by_interface(nodes: list[Node]) -> None:
    run(nodes[0].fd, "ip link set eth0 mtu 9000")
    with namespace.inside(nodes[0].fd):
        with Netlink() as nl:
            ifindex = get_link(nl, "eth0").ifindex
        found = underlay.Underlay(ifindex, "eth0", "192.0.2.1", 9000)
        assert underlay.find("192.0.2.1", "", "{node}") == found
        assert underlay.find("no-such-name.invalid", "eth0", "{node}") == found
        ipv6 = underlay.find("2001:db8::1", "eth0", "{node}")
        assert (ipv6.address, ipv6.overlay_mtu, found.overlay_mtu) == ("2001:db8::1", 8930, 8950)
        for node, interface in (("n0", "eth7"), ("n0", "lo"), ("192.0.2.2", "")):
            with pytest.raises(UnderlayMissing):
                underlay.find(node, interface, "{node}")
