"""Who has which socket: the kernel's sock_diag, for TCP listeners and the owner of a UDP port.

Asks about the namespace that the process is in. Constants have the names of linux/inet_diag.h.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import NamedTuple

from enclos.netns.batch import NLM_F_DUMP, message
from enclos.netns.netlink import NETLINK_SOCK_DIAG, Netlink

SOCK_DIAG_BY_FAMILY = 20
TCP_LISTEN = 10
ALL_STATES = 0xFFFFFFFF

REQUEST = Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states, and an empty inet_diag_sockid."""
ANSWER = Struct("=BBBB2s2s16s16sI8sIIIII")
"""struct inet_diag_msg: family, state, timer, retransmits, sport, dport, src, dst, interface, cookie,
expires, receive queue, send queue, uid, inode."""


class SocketFact(NamedTuple):
    """A socket of this namespace: its family, local address (text), port, owner and inode."""

    family: int
    address: str
    port: int
    uid: int
    inode: int


def sockets(family: int, protocol: int, states: int) -> list[SocketFact]:
    """The sockets of one family (AF_INET*) and protocol (IPPROTO_*) whose state is in the mask."""
    request = message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, REQUEST.pack(family, protocol, 0, states))
    found = []
    with Netlink(NETLINK_SOCK_DIAG) as nl:
        for reply in nl.query(request, "sockets"):
            fields = ANSWER.unpack_from(reply.body)
            size = 4 if fields[0] == socket.AF_INET else 16
            address = socket.inet_ntop(fields[0], fields[6][:size])
            port = int.from_bytes(fields[4], "big")
            found.append(SocketFact(fields[0], address, port, fields[13], fields[14]))
    return found


def tcp_listeners() -> list[SocketFact]:
    """Listening TCP sockets of both families."""
    mask = 1 << TCP_LISTEN
    return [fact for family in (socket.AF_INET, socket.AF_INET6) for fact in sockets(family, socket.IPPROTO_TCP, mask)]


def udp_port_owner(port: int) -> int:
    """Uid of the socket that has this local UDP port: a user's before root's, which may be the kernel's own
    (its tunnels' sockets look like root's); -1 if there is none.
    """
    owners = [
        fact.uid
        for family in (socket.AF_INET, socket.AF_INET6)
        for fact in sockets(family, socket.IPPROTO_UDP, ALL_STATES)
        if fact.port == port
    ]
    return max(owners, default=-1)
