"""Children of a real zygote whose agent is killed: they end, and say nothing, for nothing is wrong with them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from enclos.runtime import protocol
from enclos.runtime.spawner import zygote_code

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


class Zygote:
    """One whose agent this test is; `said` is what it and its children wrote for the agent's log."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-c", zygote_code(), str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        assert self.heard(self.control) == "ready"

    @staticmethod
    def heard(connection: socket.socket) -> str:
        message = protocol.receive(connection)
        assert message is not None
        with message:
            return message.get("state")

    def spawn(self, task: str) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            protocol.send(self.control, [("task", task)], [theirs.fileno()])
        return ours

    def said(self) -> str:
        """When it has ended, and its children with it: they have its standard error, too."""
        self.control.close()
        return self.process.communicate(timeout=20)[1]


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.process.kill()
    made.process.wait()


def test_a_spare_builder_ends_quietly_with_the_agent(zygote: Zygote) -> None:
    """Killed before it has heard of the child, or soon after."""
    for heard in (False, True) * 5:
        with zygote.spawn("spare") as channel:
            if heard:
                assert zygote.heard(channel) == "started"
    assert zygote.said() == ""


def test_an_error_of_a_childs_own_is_told(zygote: Zygote) -> None:
    with zygote.spawn("sweep") as channel:
        assert zygote.heard(channel) == "started"
        assert channel.recv(1) == b""
    assert "enclos-sweep: unexpected ProtocolError" in zygote.said()


def test_the_zygote_ends_quietly_with_an_agent_that_has_not_heard_it() -> None:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-I", "-c", zygote_code(), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    # It has said that it is ready when it waits in a system call with nothing to read.
    assert control.recv(1, socket.MSG_PEEK)
    assert Path(f"/proc/{process.pid}/stat").exists()
    control.close()
    assert process.communicate(timeout=20)[1] == ""
