"""The wire: what is encoded comes back, what breaks the rules is refused, and no descriptor is lost."""

from __future__ import annotations

import os
import socket

import pytest
from enclos.runtime import protocol
from hypothesis import given
from hypothesis import strategies as st

KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="="), min_size=1, max_size=20)
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=100)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=20))
def test_fields_come_back_in_their_order(fields: list[tuple[str, str]]) -> None:
    values = protocol.decode(protocol.encode(fields))
    for key in {key for key, _ in fields}:
        assert values[key] == [value for name, value in fields if name == key]


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(packet: bytes) -> None:
    try:
        values = protocol.decode(packet)
    except protocol.ProtocolError:
        return
    assert packet.endswith(b"\0")
    assert sum(len(found) for found in values.values()) == packet.count(b"\0")


def test_values_that_are_not_utf8_survive() -> None:
    value = b"/data/\xff\xfe".decode("utf-8", "surrogateescape")
    assert protocol.decode(protocol.encode([("cwd", value)])) == {"cwd": [value]}


@pytest.mark.parametrize("fields", [[("k", "a\0b")], [("k=", "v")], [("k", "x" * protocol.MAX_PACKET_BYTES)]])
def test_what_cannot_be_sent_is_refused(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.encode(fields)


def test_numbers_are_decimal() -> None:
    message = protocol.Message({"job": ["12"], "bad": ["-1"], "arabic": ["\u0663"], "long": ["1" * 5000]})
    assert message.number("job") == 12
    for key in ("bad", "arabic", "long", "absent"):
        with pytest.raises(protocol.ProtocolError):
            message.number(key)


def test_descriptors_travel_and_are_close_on_exec() -> None:
    left, right = pair()
    with left, right, open(os.devnull) as file:
        protocol.send(left, [("status", "ok")], [file.fileno(), file.fileno()])
        message = protocol.receive(right)
        assert message is not None
        with message:
            assert [os.get_inheritable(fd) for fd in message.fds] == [False, False]
            assert all(os.fstat(fd).st_rdev == os.fstat(file.fileno()).st_rdev for fd in message.fds)


def test_descriptors_of_a_bad_packet_are_closed() -> None:
    left, right = pair()
    with left, right, open(os.devnull) as file:
        before = open_descriptors()
        socket.send_fds(left, [b"no field"], [file.fileno()])
        with pytest.raises(protocol.ProtocolError):
            protocol.receive(right)
        assert open_descriptors() == before


def test_a_packet_that_is_too_large_is_refused() -> None:
    left, right = pair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        left.send(b"k=" + b"x" * protocol.MAX_PACKET_BYTES + b"\0")
        with pytest.raises(protocol.ProtocolError, match="too large"):
            protocol.receive(right)


def test_the_end_of_a_connection_is_none() -> None:
    left, right = pair()
    with right:
        left.close()
        assert protocol.receive(right) is None


def test_the_peer_is_known_from_the_kernel() -> None:
    left, right = pair()
    with left, right:
        assert protocol.peer_credentials(right) == (os.getpid(), os.getuid(), os.getgid())
