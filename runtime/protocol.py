"""The wire: packets of NUL-separated `KEY=VALUE` fields on SOCK_SEQPACKET unix sockets (docs/protocol.md).

Holds encoding, decoding, and the sending of packets with descriptors. Must not know what any key means.
The same encoding serves the shim, the users' socket, and the channel between agent and builders.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

VERSION = 1
OLDEST_VERSION = 1
MAX_PACKET_BYTES = 131072
MAX_DESCRIPTORS = 64
# Of 64 bits.
LONGEST_NUMBER = 20
SO_PEERPIDFD = 77

Fields = Iterable[tuple[str, str]]


class ProtocolError(Exception):
    """A packet that breaks the rules of docs/protocol.md; the connection is of no further use."""


class Message:
    """One decoded packet: its fields in order, and the descriptors that came with it.

    The message owns its descriptors until `take_fds` hands them over; `close` (or `with`) closes the rest.
    """

    __slots__ = ("_values", "fds")

    def __init__(self, values: Mapping[str, list[str]], fds: Sequence[int] = ()) -> None:
        self._values = values
        self.fds = list(fds)

    def get(self, key: str, default: str = "") -> str:
        """The last value of `key`, or `default`."""
        values = self._values.get(key)
        return values[-1] if values else default

    def all(self, key: str) -> list[str]:
        """Every value of `key`, in the order of the packet."""
        return list(self._values.get(key, ()))

    def number(self, key: str) -> int:
        """`key` as a decimal number; raises ProtocolError when it is absent, not one, or longer than any here."""
        text = self.get(key)
        if not (text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER):
            raise ProtocolError(f"{key}={text[:40]!r} is not a number")
        return int(text)

    @property
    def values(self) -> Mapping[str, list[str]]:
        return self._values

    def take_fds(self) -> list[int]:
        """Hand the descriptors over to the caller, who closes them."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode(fields: Fields) -> bytes:
    """Pack fields into one packet; raises ProtocolError for a NUL in a value or a packet that is too large."""
    parts = []
    for key, value in fields:
        if "\0" in value or "=" in key:
            raise ProtocolError(f"field {key} cannot be sent")
        parts.append(f"{key}={value}\0")
    packet = "".join(parts).encode("utf-8", "surrogateescape")
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolError(f"message of {len(packet)} bytes is larger than {MAX_PACKET_BYTES}")
    return packet


def decode(packet: bytes) -> dict[str, list[str]]:
    """The fields of a packet by key; raises ProtocolError when it does not end in NUL or lacks a '='."""
    if not packet.endswith(b"\0"):
        raise ProtocolError("packet does not end with a NUL")
    values: dict[str, list[str]] = {}
    for field in packet[:-1].decode("utf-8", "surrogateescape").split("\0"):
        key, separator, value = field.partition("=")
        if not separator:
            raise ProtocolError(f"field {key[:40]!r} has no value")
        values.setdefault(key, []).append(value)
    return values


def send(connection: socket.socket, fields: Fields, fds: Sequence[int] = ()) -> None:
    """Send one packet with descriptors; the caller keeps its own copies.

    Raises:
        ProtocolError: the fields make no packet.
        OSError: the peer is gone (EPIPE), or its queue is full on a non-blocking socket (EAGAIN).
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([encode(fields)], ancillary, socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> Message | None:
    """Receive one packet; None when the peer has closed.

    Descriptors arrive close-on-exec. A packet or a list of descriptors that was cut short is a
    ProtocolError, and what did arrive is closed.
    """
    ancillary_space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    packet, ancillary, flags, _ = connection.recvmsg(
        MAX_PACKET_BYTES + 1, ancillary_space, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    message = Message({}, fds)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(packet) > MAX_PACKET_BYTES:
        message.close()
        raise ProtocolError("message is too large")
    if not packet:
        message.close()
        return None
    try:
        return Message(decode(packet), message.take_fds())
    except ProtocolError:
        message.close()
        raise


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected, as the kernel recorded them (unix(7), SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = array.array("i", raw)
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def peer_pidfd(connection: socket.socket) -> int:
    """A pidfd of the process that connected, the caller's; -1 before Linux 6.5, which has no SO_PEERPIDFD.

    Its pid may be another process' by now: this is the one that the credentials belong to. OSError when it is gone.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return -1
        raise
