"""A netlink socket: sends a batch, gathers the answers, and turns refusals into KernelRefused.

Privileged: runs in the agent. The kernel answers rtnetlink and nfnetlink requests while they are sent,
so nothing here waits; a receive timeout guards against a kernel that does not.

The socket belongs to the network namespace in which it was made, wherever the process goes afterwards.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from struct import Struct
from typing import NamedTuple, Self

from enclos.netns.batch import (
    HEADER,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSGERR_ATTR_MSG,
    NUMBER,
    Batch,
    attributes,
)
from enclos.netns.facts import KernelRefused

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

BUFFER_BYTES = 8 << 20
"""A packet may not be larger than the send buffer; errors of a whole packet must fit the receive buffer."""
PACKET_BYTES = 128 << 10
RECEIVE_BYTES = 1 << 16
"""The kernel fills at most 32 KB of a dump's packet; a larger buffer would be mapped anew each time."""
ERROR_CODE = Struct("=i")
PATIENCE = Struct("ll").pack(10, 0)
DUMP_ATTEMPTS = 5


class Reply(NamedTuple):
    """One message from the kernel: nlmsghdr fields, and the bytes after the header."""

    type: int
    flags: int
    sequence: int
    port_id: int
    body: bytes


def replies(packet: bytes) -> Iterator[Reply]:
    """The messages of a packet that the kernel sent."""
    offset = 0
    while offset + HEADER.size <= len(packet):
        length, kind, flags, sequence, port_id = HEADER.unpack_from(packet, offset)
        if length < HEADER.size:
            return
        yield Reply(kind, flags, sequence, port_id, packet[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


def error_of(reply: Reply) -> tuple[int, str]:
    """(errno, extended ack) of an NLMSG_ERROR or of a dump's NLMSG_DONE; errno 0 is an acknowledgement."""
    if len(reply.body) < 4:
        return 0, ""
    code: int = -ERROR_CODE.unpack_from(reply.body)[0]
    if not reply.flags & NLM_F_ACK_TLVS:
        return code, ""
    if reply.type == NLMSG_DONE:
        offset = 4
    elif reply.flags & NLM_F_CAPPED:
        offset = 4 + HEADER.size
    else:
        offset = 4 + ((NUMBER.unpack_from(reply.body, 4)[0] + 3) & ~3)
    for kind, payload in attributes(reply.body, offset):
        if kind == NLMSGERR_ATTR_MSG:
            return code, payload.rstrip(b"\0").decode(errors="replace")
    return code, ""


class Netlink:
    """A session in the namespace the process is in when it is made. Owns its descriptor."""

    def __init__(self, protocol: int = NETLINK_ROUTE, group: int = 0, blocking: bool = True) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, flags, protocol)
        try:
            self._set_up(protocol, group, blocking)
        except BaseException:
            self._socket.close()
            raise

    def _set_up(self, protocol: int, group: int, blocking: bool) -> None:
        sock = self._socket
        sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        if protocol == NETLINK_ROUTE:
            sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        if blocking:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PATIENCE)
        else:
            sock.setblocking(False)
        sock.bind((0, 0))
        if group:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self.port_id: int = sock.getsockname()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Twice is harmless."""
        self._socket.close()

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def run(self, batch: Batch) -> None:
        """Send the batch; the kernel goes on after a refused request, and the first refusal is raised.

        Raises:
            KernelRefused: .object is the label of the request.
        """
        refused: KernelRefused | None = None
        for packet, last in batch.chunks(PACKET_BYTES):
            self._socket.send(packet)
            refused = self._acknowledgement(batch, last) or refused
            if refused:
                raise refused

    def transact(self, batch: Batch) -> None:
        """Send an nfnetlink transaction, BATCH_BEGIN first and BATCH_END last: all of it is done, or nothing.

        Raises:
            KernelRefused: .object is the label of the request.
        """
        packet, acknowledged = batch.transaction()
        self._socket.send(packet)
        refused = self._acknowledgement(batch, acknowledged, begin=1)
        if refused:
            # A failed commit is reported for BATCH_BEGIN; the acknowledgements of the parts may follow.
            self._drop_answers()
            raise refused

    def _drop_answers(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)

    def _acknowledgement(self, batch: Batch, last: int, begin: int = 0) -> KernelRefused | None:
        """Read until request `last` (or `begin`) is answered: no old answer may meet the next request."""
        refused: KernelRefused | None = None
        while True:
            for reply in replies(self._socket.recv(RECEIVE_BYTES)):
                if reply.type != NLMSG_ERROR:
                    continue
                code, words = error_of(reply)
                if code and refused is None:
                    refused = KernelRefused(code, batch.label(reply.sequence - 1), words or os.strerror(code))
                if reply.sequence in (last, begin):
                    return refused

    def query(self, request: bytes, what: str) -> list[Reply]:
        """The answers to one get or dump request, without the end mark.

        A dump that changed while it ran is asked for again, a few times.

        Raises:
            KernelRefused: .object is `what`.
        """
        packet = bytearray(request)
        NUMBER.pack_into(packet, 8, 1)
        dump = HEADER.unpack_from(packet)[2] & NLM_F_DUMP == NLM_F_DUMP
        for _ in range(DUMP_ATTEMPTS):
            self._socket.send(packet)
            found = self._answers(dump, what)
            if not any(reply.flags & NLM_F_DUMP_INTR for reply in found):
                break
        return found

    def _answers(self, dump: bool, what: str) -> list[Reply]:
        found: list[Reply] = []
        while True:
            for reply in replies(self._socket.recv(RECEIVE_BYTES)):
                if reply.type in (NLMSG_ERROR, NLMSG_DONE):
                    code, words = error_of(reply)
                    if code:
                        raise KernelRefused(code, what, words or os.strerror(code))
                    return found
                found.append(reply)
            if not dump and found:
                return found

    def events(self) -> list[Reply] | None:
        """What has arrived on a socket made with blocking=False; None if some of it was lost (ENOBUFS)."""
        found: list[Reply] = []
        lost = False
        while True:
            try:
                found.extend(replies(self._socket.recv(RECEIVE_BYTES)))
            except BlockingIOError:
                return None if lost else found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
