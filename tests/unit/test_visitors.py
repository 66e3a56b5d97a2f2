"""The users' desk: who asked gets the answer, and nobody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from enclos.runtime import protocol, visitors
from enclos.runtime.visitors import OUTSTANDING, REQUEST_FIELDS, _Desk


class Office:
    """A desk that runs, the agent's end of its channel, and a way to visit."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        listener.listen()
        self.agent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.agent.settimeout(5)
        self.desk = _Desk(theirs, listener)
        self._sockets = [listener, theirs, self.agent]
        self._thread = threading.Thread(target=self.desk.run)
        self._thread.start()

    def approach(self) -> socket.socket:
        """A visitor who is not in yet."""
        visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        visitor.settimeout(5)
        self._sockets.append(visitor)
        return visitor

    def visit(self, *requests: str) -> socket.socket:
        visitor = self.approach()
        visitor.connect(self.path)
        for request in requests:
            protocol.send(visitor, [("verb", request)])
        return visitor

    def asked(self) -> protocol.Message:
        message = protocol.receive(self.agent)
        assert message is not None
        return message

    def answer(self, question: protocol.Message, text: str) -> None:
        protocol.send(self.agent, [("id", question.get("id")), ("text", text)])

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.agent.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for one in self._sockets:
            one.close()


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr(visitors, "CONNECTIONS_PER_USER", 100)
    made = Office(tmp_path / "s")
    yield made
    made.close()


def test_an_answer_reaches_who_asked(office: Office) -> None:
    one, two = office.visit("one"), office.visit("two")
    questions = {message.get("request.verb"): message for message in (office.asked(), office.asked())}
    office.answer(questions["two"], "2")
    office.answer(questions["one"], "1")
    for visitor, text in ((one, "1"), (two, "2")):
        reply = protocol.receive(visitor)
        assert reply is not None
        assert reply.get("text") == text


def test_the_request_of_one_who_left_is_not_the_next_ones(office: Office) -> None:
    """The next visitor's connection has the descriptor's number of the one who left."""
    for number in range(OUTSTANDING):
        office.visit(f"first {number}")
    questions = [office.asked() for _ in range(OUTSTANDING)]
    late = office.approach()
    left = office.visit("left")
    left.shutdown(socket.SHUT_RDWR)  # Not close(): his own number would be the next one given.
    office.wait_until(lambda: len(office.desk._visitors) == OUTSTANDING and len(office.desk._waiting) == 1)
    late.connect(office.path)
    office.wait_until(lambda: len(office.desk._visitors) == OUTSTANDING + 1)
    for question in questions:
        office.answer(question, "")
    protocol.send(late, [("verb", "late")])
    assert office.asked().get("request.verb") == "late"


def test_a_descriptor_reaches_who_asked(office: Office) -> None:
    visitor = office.visit("one")
    question = office.asked()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            protocol.send(office.agent, [("id", question.get("id")), ("status", "ok")], [theirs.fileno()])
        reply = protocol.receive(visitor)
        assert reply is not None
        with socket.socket(fileno=reply.take_fds()[0]) as got:
            ours.send(b"x")
            assert got.recv(1) == b"x"
        ours.settimeout(5)
        assert ours.recv(1) == b"", "somebody else holds it too"


def test_a_request_of_many_fields_is_refused(office: Office) -> None:
    visitor = office.visit()
    protocol.send(visitor, [("x", "")] * (REQUEST_FIELDS + 1))
    assert protocol.receive(visitor) is None
