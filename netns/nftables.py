"""The guard's table as text for nft, and its set elements as nfnetlink requests. Pure.

The table is loaded by nft once, as text that an administrator can read and `nft list ruleset` prints again;
elements change with every job, so they go over netlink, without a process. nft 1.0.6 (Debian 12) loads
all of it. Constants have the names of linux/netfilter/nf_tables.h.

An element is the second word of the VXLAN header (the VNI and its reserved byte, which is 0) followed by
the underlay source address. The VXLAN header starts 8 bytes behind that of UDP, so that is `@th,96,32`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from struct import Struct

from enclos.netns.batch import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    Batch,
    attribute,
    attributes,
    message,
    nested,
    text,
)
from enclos.netns.names import HOLDER_PREFIX
from enclos.netns.netlink import Reply

NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN = 16
NFNL_MSG_BATCH_END = 17
NFNLGRP_NFTABLES = 7
NFT_MSG_GETTABLE = 1
NFT_MSG_DELTABLE = 2
NFT_MSG_GETCHAIN = 4
NFT_MSG_GETRULE = 7
NFT_MSG_NEWSETELEM = 12
NFT_MSG_GETSETELEM = 13
NFT_MSG_DELSETELEM = 14
NFT_MSG_NEWGEN = 15
NFT_MSG_GETOBJ = 19
NFPROTO_INET = 1
NFTA_TABLE_NAME = 1
"""Also the table's name in chains, rules, sets, element lists and objects."""
NFTA_TABLE_FLAGS = 2
NFTA_CHAIN_NAME = 3
NFTA_CHAIN_HOOK = 4
NFTA_CHAIN_POLICY = 5
NFTA_RULE_CHAIN = 2
NFTA_RULE_HANDLE = 3
NFTA_RULE_EXPRESSIONS = 4
NFTA_SET_ELEM_LIST_SET = 2
NFTA_SET_ELEM_LIST_ELEMENTS = 3
NFTA_LIST_ELEM = 1
NFTA_SET_ELEM_KEY = 1
NFTA_DATA_VALUE = 1
NFTA_OBJ_NAME = 2
NFTA_OBJ_TYPE = 3
NFTA_OBJ_DATA = 4
NFTA_COUNTER_PACKETS = 2
NFT_OBJECT_COUNTER = 1

TABLE = "enclos"
SETS = {4: "peers4", 6: "peers6"}
NFGENMSG = Struct("=BBH")
NUMBER_BE = Struct(">I")
ELEMENTS_PER_MESSAGE = 1000
"""An attribute holds at most 65,535 bytes; an IPv6 element takes 32."""
ELEMENTS = 1 << 17
"""Per set; more is ENFILE. With a size the kernel takes a hash table that never grows (2 MB each): a dump of
one that is just growing leaves elements out, without a word, and we compare dumps with what we know."""
# Names must be no words of nft's language, which grows: nft 1.1.7 has `tunnel`.
COUNTERS = ("out_user", "in_holder", "in_fragment", "in_interface", "in_own", "in_stranger", "forward")

RULESET = """\
table inet {table} {{
}}
delete table inet {table}
table inet {table} {{
{counters}
\tset peers4 {{
\t\ttypeof @th,96,32 . ip saddr
\t\tsize {size}
{elements4}\t}}
\tset peers6 {{
\t\ttypeof @th,96,32 . ip6 saddr
\t\tsize {size}
{elements6}\t}}
\tchain output {{
\t\ttype filter hook output priority filter; policy accept;
\t\tudp dport {port} meta skuid >= 0 counter name "out_user" drop
\t}}
\tchain input {{
\t\ttype filter hook input priority filter; policy accept;
\t\tiifname "{holder}*" counter name "in_holder" drop
{fragments}\t\tudp dport {port} goto from_underlay
\t}}
\tchain from_underlay {{
\t\tiifname != "{underlay}" counter name "in_interface" drop
\t\tfib saddr type local counter name "in_own" drop
\t\t@th,96,32 . ip saddr @peers4 accept
\t\t@th,96,32 . ip6 saddr @peers6 accept
\t\tcounter name "in_stranger" drop
\t}}
\tchain forward {{
\t\ttype filter hook forward priority filter; policy accept;
\t\tudp dport {port} counter name "forward" drop
\t}}
}}
"""
# A fragmented IPv6 packet is put together only behind the input hook, so its ports cannot be seen there. TCP
# (6) and ICMP (58) can never become UDP; everything else, extension headers too, could. By number: nft looks names up
# in /etc/protocols, which a small installation lacks.
FRAGMENTS = '\t\texthdr frag exists frag nexthdr != { 6, 58 } counter name "in_fragment" drop\n'


def element(vni: int, address: bytes) -> bytes:
    """The key of a set element: 8 bytes for IPv4, 20 for IPv6."""
    return (vni << 8).to_bytes(4, "big") + address


def ruleset(port: int, underlay_ifname: str, ipv6: bool, elements: Iterable[bytes] = ()) -> str:
    """The whole table for `nft -f -`: in one transaction the old one goes and the new one comes.

    Args:
        underlay_ifname: tunnels arrive on this interface and on no other. No quote and no star in it.
        ipv6: the underlay is IPv6: its fragments are dropped.
        elements: keys that are in the sets from the start.
    """
    if any(character in underlay_ifname for character in '"*\n\\'):
        raise ValueError(f"{underlay_ifname!r} cannot be an interface in a rule")
    by_length: dict[int, list[bytes]] = {8: [], 20: []}
    for key in elements:
        by_length[len(key)].append(key)
    return RULESET.format(
        table=TABLE,
        counters="\n".join(f"\tcounter {name} {{\n\t}}" for name in COUNTERS),
        elements4=_elements_text(by_length[8]),
        elements6=_elements_text(by_length[20]),
        size=ELEMENTS,
        port=port,
        holder=HOLDER_PREFIX,
        fragments=FRAGMENTS if ipv6 else "",
        underlay=underlay_ifname,
    )


def _elements_text(keys: list[bytes]) -> str:
    if not keys:
        return ""
    return f"\t\telements = {{ {', '.join(_element_text(key) for key in sorted(keys))} }}\n"


def _element_text(key: bytes) -> str:
    address = IPv4Address(key[4:]) if len(key) == 8 else IPv6Address(key[4:])
    return f"0x{key[:4].hex()} . {address}"


def request(kind: int, flags: int, *parts: bytes) -> bytes:
    """A request about the table of the inet family."""
    head = NFGENMSG.pack(NFPROTO_INET, 0, 0), text(NFTA_TABLE_NAME, TABLE)
    return message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, *head, *parts)


def element_batch(kind: int, keys: Iterable[bytes]) -> Batch:
    """A transaction that adds (NFT_MSG_NEWSETELEM, present is fine) or deletes (absent is ENOENT)."""
    parts: list[tuple[bytes, str]] = []
    create = NLM_F_CREATE if kind == NFT_MSG_NEWSETELEM else 0
    chosen = list(keys)
    for version, length in ((4, 8), (6, 20)):
        same = [key for key in chosen if len(key) == length]
        for start in range(0, len(same), ELEMENTS_PER_MESSAGE):
            listed = nested(
                NFTA_SET_ELEM_LIST_ELEMENTS,
                *(_element(key) for key in same[start : start + ELEMENTS_PER_MESSAGE]),
            )
            part = request(kind, create, text(NFTA_SET_ELEM_LIST_SET, SETS[version]), listed)
            parts.append((part, f"guard set {SETS[version]}"))
    return transaction(parts)


def delete_table_batch() -> Batch:
    """A transaction that deletes the table; ENOENT if there is none."""
    return transaction([(request(NFT_MSG_DELTABLE, 0), f"table {TABLE}")])


def transaction(parts: Iterable[tuple[bytes, str]]) -> Batch:
    """The requests with their labels, between the marks that nfnetlink wants."""
    batch = Batch()
    subsystem = NFGENMSG.pack(0, 0, socket.htons(NFNL_SUBSYS_NFTABLES))
    batch.add(message(NFNL_MSG_BATCH_BEGIN, 0, subsystem), f"table {TABLE}")
    for part, what in parts:
        batch.add(part, what)
    batch.add(message(NFNL_MSG_BATCH_END, 0, subsystem), f"table {TABLE}")
    return batch


def _element(key: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key)))


def dump_elements(version: int) -> bytes:
    """Asks for all elements of one set."""
    return request(NFT_MSG_GETSETELEM, NLM_F_DUMP, text(NFTA_SET_ELEM_LIST_SET, SETS[version]))


def parse_elements(reply: Reply) -> Iterator[bytes]:
    """The keys in an NFT_MSG_NEWSETELEM message."""
    for kind, listed in attributes(reply.body, NFGENMSG.size):
        if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
            for _, entry in attributes(listed):
                key = dict(attributes(dict(attributes(entry)).get(NFTA_SET_ELEM_KEY, b"")))
                if NFTA_DATA_VALUE in key:
                    yield key[NFTA_DATA_VALUE]


def parse_counter(reply: Reply) -> tuple[str, int] | None:
    """(name, packets) of a counter object."""
    parts = dict(attributes(reply.body, NFGENMSG.size))
    if NUMBER_BE.unpack(parts.get(NFTA_OBJ_TYPE, b"\0\0\0\0"))[0] != NFT_OBJECT_COUNTER:
        return None
    data = dict(attributes(parts.get(NFTA_OBJ_DATA, b"")))
    packets = int.from_bytes(data.get(NFTA_COUNTER_PACKETS, b""), "big")
    return parts[NFTA_OBJ_NAME].rstrip(b"\0").decode(), packets


def table_of(reply: Reply) -> str:
    """The table that a notification is about; "" for those about no table."""
    for kind, payload in attributes(reply.body, NFGENMSG.size):
        if kind == NFTA_TABLE_NAME and reply.type & 0xFF != NFT_MSG_NEWGEN:
            return payload.rstrip(b"\0").decode(errors="replace")
    return ""


def shape(reply: Reply) -> tuple[bytes, ...]:
    """What of a table, chain or rule must not change; leaves out what counts (uses, handles of objects)."""
    kept = {
        NFT_MSG_GETTABLE - 1: (NFTA_TABLE_NAME, NFTA_TABLE_FLAGS),
        NFT_MSG_GETCHAIN - 1: (NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY),
        NFT_MSG_GETRULE - 1: (NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_EXPRESSIONS),
    }[reply.type & 0xFF]
    parts = dict(attributes(reply.body, NFGENMSG.size))
    return tuple(parts.get(kind, b"") for kind in kept)
