"""What is packed, decoded again by pyroute2; and what the kernel's answers are taken for."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from enclos.netns import batch as b
from enclos.netns import link, nftables
from enclos.netns.batch import Batch
from enclos.netns.netlink import Reply, error_of, replies
from enclos.netns.peers import network_batch
from enclos.netns.spec import OverlaySpec, Peer
from pyroute2.netlink.nfnetlink.nftsocket import nft_set_elem_list_msg  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.marshal import MarshalRtnl  # type: ignore[import-untyped]

GOLDEN = Path(__file__).parent.parent / "golden" / "netns"


def decode(data: bytes) -> list[Any]:
    return list(MarshalRtnl().parse(data))


def attrs(message: Any) -> dict[str, Any]:  # noqa: ANN401
    return dict(message["attrs"])


def spec(count: int = 3, ipv6: bool = False, index: int = 1) -> OverlaySpec:
    under = "2001:db8::{}" if ipv6 else "192.0.2.{}"
    peers = tuple(Peer(i, f"n{i}", under.format(i + 1)) for i in range(count))
    return OverlaySpec(
        0x1234, 4789, "enclos0", 1450, 7, under.format(index + 1), index, peers, "10.77.0.0/16", "fd65:6e63:6c6f::/48"
    )


def packed(batch: Batch) -> bytes:
    return b"".join(bytes(packet) for packet, _ in batch.chunks(1 << 20))


def test_vxlan_device_decodes_to_what_was_asked() -> None:
    request = link.create_vxlan(
        "enclos001234", 0x1234, 4789, bytes([192, 0, 2, 1]), 7, 42, bytes.fromhex("020012340000"), 1450
    )
    (message,) = decode(request)
    parts = attrs(message)
    assert message["header"]["flags"] == b.NLM_F_REQUEST | b.NLM_F_CREATE | b.NLM_F_EXCL
    assert (message["flags"], message["change"]) == (link.IFF_NOARP, link.IFF_NOARP)
    assert (parts["IFLA_IFNAME"], parts["IFLA_MTU"], parts["IFLA_ADDRESS"]) == (
        "enclos001234",
        1450,
        "02:00:12:34:00:00",
    )
    assert parts["IFLA_NET_NS_FD"] == 42
    info = attrs(parts["IFLA_LINKINFO"])
    assert info["IFLA_INFO_KIND"] == "vxlan"
    assert attrs(info["IFLA_INFO_DATA"]) == {
        "IFLA_VXLAN_ID": 0x1234,
        "IFLA_VXLAN_PORT": 4789,
        "IFLA_VXLAN_LOCAL": "192.0.2.1",
        "IFLA_VXLAN_LEARNING": 0,
        "IFLA_VXLAN_LINK": 7,
    }


def entries(messages: Iterable[Any], family: int) -> set[tuple[Any, ...]]:
    return {
        (m["ifindex"], m["state"], m["flags"], attrs(m)["NDA_DST"], attrs(m)["NDA_LLADDR"])
        for m in messages
        if m["event"] == "RTM_NEWNEIGH" and m["family"] == family
    }


@pytest.mark.parametrize("ipv6", [False, True])
def test_network_batch_decodes_to_a_whole_network(ipv6: bool) -> None:
    messages = decode(packed(network_batch(spec(ipv6=ipv6), 9)))
    peers = ((0, "02:00:12:34:00:00"), (2, "02:00:12:34:00:02"))
    under = "2001:db8::{}" if ipv6 else "192.0.2.{}"
    at = {family: {(f"{p}{i + 1}", mac) for i, mac in peers} for family, p in ((2, "10.77.0."), (10, IPV6))}
    at[10 if ipv6 else 2] |= {(under.format(i + 1), mac) for i, mac in peers}
    for family in (2, 10):
        assert entries(messages, family) == {(9, link.NUD_PERMANENT, 0, *pair) for pair in at[family]}
    assert entries(messages, link.AF_BRIDGE) == {
        (9, link.NUD_PERMANENT | link.NUD_NOARP, link.NTF_SELF, under.format(i + 1), mac) for i, mac in peers
    }
    addresses = [m for m in messages if m["event"] == "RTM_NEWADDR"]
    assert [(attrs(m)["IFA_LOCAL"], m["prefixlen"], m["index"]) for m in addresses] == [
        ("10.77.0.2", 16, 9),
        (f"{IPV6}2", 96, 9),
        (under.format(2), 128 if ipv6 else 32, 9),
    ]
    assert all(attrs(m)["IFA_FLAGS"] & link.IFA_F_NOPREFIXROUTE for m in addresses)
    routes = {
        (attrs(m)["RTA_DST"], m["dst_len"], attrs(m)["RTA_PREFSRC"]) for m in messages if m["event"] == "RTM_NEWROUTE"
    }
    assert {("10.77.0.1", 32, "10.77.0.2"), ("10.77.0.2", 31, "10.77.0.2")} < routes
    assert (under.format(2), 127 if ipv6 else 31, under.format(2)) in routes


IPV6 = "fd65:6e63:6c6f::1234:0:"


def test_kernel_without_ipv6_gets_no_ipv6() -> None:
    messages = decode(packed(network_batch(spec(), 9, with_ipv6=False)))
    assert not [m for m in messages if m.get("family") == 10]
    assert len([m for m in messages if m["event"] == "RTM_NEWNEIGH"]) == 6


def test_network_batch_is_what_it_was() -> None:
    """Golden: every byte that is sent for a network of three nodes. `UPDATE_GOLDEN=1` writes it anew."""
    batch = network_batch(spec(), 9)
    lines = [f"{batch.label(i)}: {request.hex()}\n" for i, request in enumerate(batch.requests())]
    golden = GOLDEN / "network.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text("".join(lines))
    assert golden.read_text() == "".join(lines)


def test_batch_numbers_requests_and_asks_for_the_last_of_each_packet() -> None:
    batch = Batch()
    batch.add(b.message(1, 0, b"abcd"), "first")
    batch.extend([b.message(2, 0, b"x" * 40)] * 5, "one of", ["a", "b", "c", "d", "e"])
    packets = list(batch.chunks(130))
    assert [last for _, last in packets] == [2, 4, 6]
    seen = []
    for packet, last in packets:
        for reply in replies(bytes(packet)):
            seen.append(reply.sequence)
            assert bool(reply.flags & b.NLM_F_ACK) == (reply.sequence == last)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [batch.label(index) for index in (0, 1, 5)] == ["first", "one of a", "one of e"]


def test_transaction_asks_for_the_last_but_one() -> None:
    keys = [nftables.element(5, bytes([10, 0, 0, i])) for i in range(3)]
    packet, last = nftables.element_batch(nftables.NFT_MSG_NEWSETELEM, keys).transaction()
    found = list(replies(bytes(packet)))
    assert [reply.sequence for reply in found] == [1, 2, 3] and last == 2
    assert [bool(reply.flags & b.NLM_F_ACK) for reply in found] == [False, True, False]
    assert [reply.type for reply in found] == [16, 10 << 8 | 12, 17]


def test_elements_decode_and_are_split_where_an_attribute_would_overflow() -> None:
    keys = [nftables.element(0x123456, struct.pack(">I", i)) for i in range(2500)]
    keys += [nftables.element(1, bytes(15) + bytes([i])) for i in range(2)]
    packet, _ = nftables.element_batch(nftables.NFT_MSG_NEWSETELEM, keys).transaction()
    found, sets, offset = [], [], 0
    for reply in replies(bytes(packet)):
        if reply.type == 10 << 8 | 12:
            message = nft_set_elem_list_msg(bytes(packet[offset:]))
            message.decode()
            sets.append(attrs(message)["NFTA_SET_ELEM_LIST_SET"])
            assert attrs(message)["NFTA_SET_ELEM_LIST_TABLE"] == "enclos" and message["nfgen_family"] == 1
            found += list(nftables.parse_elements(reply))
        offset += (16 + len(reply.body) + 3) & ~3
    assert sets == ["peers4", "peers4", "peers4", "peers6"]
    assert found == keys and found[1][:4] == b"\x12\x34\x56\0"


def answer(code: int, flags: int, tail: bytes) -> Reply:
    return Reply(b.NLMSG_ERROR, flags, 1, 0, struct.pack("=i", -code) + tail)


def test_errors_bring_the_kernels_words() -> None:
    words = b.text(b.NLMSGERR_ATTR_MSG, "A VXLAN device with the specified VNI already exists")
    original = b.message(16, 0, b"payload!")
    capped = answer(errno.EEXIST, b.NLM_F_CAPPED | b.NLM_F_ACK_TLVS, original[:16] + words)
    whole = answer(errno.EEXIST, b.NLM_F_ACK_TLVS, original + words)
    for reply in (capped, whole):
        assert error_of(reply) == (errno.EEXIST, "A VXLAN device with the specified VNI already exists")
    assert error_of(answer(0, b.NLM_F_CAPPED, original[:16])) == (0, "")
    assert error_of(Reply(b.NLMSG_DONE, b.NLM_F_ACK_TLVS, 1, 0, struct.pack("=i", -errno.EINVAL) + words))[0] == 22


def test_malformed_messages_end_the_reading() -> None:
    assert list(replies(b"\x03\0\0\0" + bytes(12))) == []
    assert list(b.attributes(b"\x02\0\x01\0")) == [] and list(b.attributes(b"\xff\0\x01\0abcd")) == []


def test_the_agents_modules_bring_neither_pyroute2_nor_asyncio() -> None:
    code = (
        "import sys\n"
        "from enclos.netns import guard, names, overlay, relay, underlay\n"
        "bad = {'pyroute2', 'asyncio', 'multiprocessing', 'ctypes'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
