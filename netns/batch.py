"""Netlink messages as bytes: headers, attributes, and many messages as one batch. Pure.

Packed with `struct`, because the agent has to stay small: pyroute2 costs 14 MB and 330 us per entry.
Tests decode what is packed here with pyroute2. Constants have the names of linux/netlink.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE = 0x100
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

HEADER = Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id."""
ATTRIBUTE = Struct("=HH")
NUMBER = Struct("=I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


def attribute(kind: int, payload: bytes) -> bytes:
    """struct nlattr with its payload, padded to four bytes."""
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + _PADDING[len(payload) & 3]


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute made of attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """A u32 attribute in host order."""
    return attribute(kind, NUMBER.pack(value))


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, *parts: bytes) -> bytes:
    """A request. Its sequence number stays 0: Batch and Netlink number what they send."""
    body = b"".join(parts)
    return HEADER.pack(HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body


def attributes(data: bytes | memoryview, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(type without flags, payload) of each attribute from `offset` on; stops at a malformed one."""
    end = len(data)
    while offset + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & NLA_TYPE_MASK, bytes(data[offset + 4 : offset + length])
        offset += (length + 3) & ~3


class Batch:
    """Requests in the order in which the kernel shall take them, each with the name of its object.

    Names of many are made only when one is needed, for an error.
    """

    __slots__ = ("_labels", "_messages")

    def __init__(self) -> None:
        self._messages: list[bytes] = []
        self._labels: list[tuple[int, str, Sequence[str]]] = []

    def __len__(self) -> int:
        return len(self._messages)

    def requests(self) -> Sequence[bytes]:
        """Every request as it was added, not numbered."""
        return tuple(self._messages)

    def add(self, request: bytes, what: str) -> None:
        """One more request, about `what`."""
        self._labels.append((len(self._messages), what, ()))
        self._messages.append(request)

    def extend(self, requests: Sequence[bytes], what: str, names: Sequence[str]) -> None:
        """Requests about `what` of each of `names`, in the same order."""
        self._labels.append((len(self._messages), what, names))
        self._messages.extend(requests)

    def label(self, index: int) -> str:
        """The object of request number `index`, from 0."""
        found = ""
        for start, what, names in self._labels:
            if start > index:
                break
            found = f"{what} {names[index - start]}" if index - start < len(names) else what
        return found

    def chunks(self, limit_bytes: int) -> Iterator[tuple[bytearray, int]]:
        """Packets of at most about `limit_bytes`, and the sequence number of the last request in each.

        Requests are numbered from 1. Only the last of a packet asks for an acknowledgement: the kernel
        reports errors in any case, and one answer per entry would cost as much as the entry.
        """
        packet = bytearray()
        last = 0
        pack_number = NUMBER.pack_into
        for sequence, request in enumerate(self._messages, 1):
            if packet and len(packet) + len(request) > limit_bytes:
                yield _acknowledged(packet, last), sequence - 1
                packet = bytearray()
            last = len(packet)
            packet += request
            pack_number(packet, last + 8, sequence)
        if packet:
            yield _acknowledged(packet, last), len(self._messages)

    def transaction(self) -> tuple[bytearray, int]:
        """One packet of all requests, for nfnetlink, and the number of the one that is acknowledged: the last
        before NFNL_MSG_BATCH_END, because kernels before 6.10 never acknowledge the end itself.
        """
        packet = bytearray()
        offset = 0
        for sequence, request in enumerate(self._messages, 1):
            if sequence == len(self._messages) - 1:
                offset = len(packet)
            packet += request
            NUMBER.pack_into(packet, len(packet) - len(request) + 8, sequence)
        return _acknowledged(packet, offset), len(self._messages) - 1


def _acknowledged(packet: bytearray, offset: int) -> bytearray:
    packet[offset + 6] |= NLM_F_ACK
    return packet
