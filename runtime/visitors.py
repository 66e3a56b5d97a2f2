"""The users' socket, served by a process that the agent can do without.

A descriptor that a user sends along is released by whoever receives it, and that can take as long as he likes: closing
a TCP socket waits for SO_LINGER, closing a file waits for its file system. So the agent never touches what users
connect to. This process takes their packets, and passes on who asks and what; it has no rights, and bounds what one
user can hold. Root's commands use the agent's own socket and never depend on it.

Between it and the agent, one packet each way per request:

    visitors -> agent   id, uid, and the user's fields with `request.` before their names; for `run` gid, pid and
                        groups of the user's process as well, as the kernel tells them, and its pidfd
    agent -> visitors   id, and the fields of the reply; perhaps a descriptor, for the user
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence

from enclos.runtime import linux, protocol
from enclos.runtime.protocol import Message
from enclos.runtime.relays import drop_privileges

CONNECTIONS = 256
CONNECTIONS_PER_USER = 16
REQUEST_BYTES = 4096
REQUEST_FIELDS = 16
"""Each gets a prefix: with many short ones a request would grow beyond what OUTSTANDING counts on."""
IDLE_SECONDS = 10.0
OUTSTANDING = 16
"""Requests that the agent has not answered yet; one with many groups counts as several. Few enough to fit into the
channel: sending never blocks."""
PREFIX = "request."
MOST_GROUPS = 1024
"""Of a user who asks for `run`: as many fit into a packet beside the rest."""


def run(channel: socket.socket, request: Message) -> int:
    """The task `visitors`: `uid`, and the listening socket. Serves until the agent closes the channel."""
    (listener_fd,) = request.take_fds()
    with socket.socket(fileno=listener_fd) as listener:
        drop_privileges(request.number("uid"))
        _Desk(channel, listener).run()
    return 0


class _Visitor:
    """One connection: at most one of its requests is on its way."""

    __slots__ = ("connection", "deadline", "uid")

    def __init__(self, connection: socket.socket, uid: int) -> None:
        self.connection = connection
        self.uid = uid
        self.deadline = time.monotonic() + IDLE_SECONDS


class _Desk:
    """The poll loop."""

    def __init__(self, channel: socket.socket, listener: socket.socket) -> None:
        self._channel = channel
        self._listener = listener
        self._poll = select.epoll()
        self._visitors: dict[int, _Visitor] = {}
        self._held: Counter[int] = Counter()
        self._waiting: deque[tuple[_Visitor, Sequence[tuple[str, str]]]] = deque()
        self._asked: dict[int, _Visitor] = {}
        self._places: dict[int, int] = {}
        self._count = 0

    def run(self) -> None:
        """Until the agent is gone."""
        self._listener.setblocking(False)
        self._poll.register(self._channel, select.EPOLLIN)
        self._poll.register(self._listener, select.EPOLLIN)
        while True:
            for fd, _ in self._poll.poll(self._patience()):
                if fd == self._channel.fileno():
                    if not self._answer():
                        return
                elif fd == self._listener.fileno():
                    self._admit()
                elif fd in self._visitors:
                    self._listen_to(fd)
            self._dismiss_idle()
            self._ask()

    def _patience(self) -> float | None:
        """Seconds until the next visitor has been idle for too long; an empty desk does not wake up."""
        if not self._visitors:
            return None
        return max(0.0, min(visitor.deadline for visitor in self._visitors.values()) - time.monotonic())

    def _admit(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = protocol.peer_credentials(connection)
        if len(self._visitors) >= CONNECTIONS or self._held[uid] >= CONNECTIONS_PER_USER:
            connection.close()
            return
        connection.setblocking(False)
        self._visitors[connection.fileno()] = _Visitor(connection, uid)
        self._held[uid] += 1
        self._poll.register(connection, select.EPOLLIN)

    def _listen_to(self, fd: int) -> None:
        """Take one request; whoever sends anything else is shown the door."""
        visitor = self._visitors[fd]
        try:
            packet, _, flags, _ = visitor.connection.recvmsg(REQUEST_BYTES)
            if not packet or flags & socket.MSG_TRUNC:
                raise protocol.ProtocolError("no request")
            fields = [(PREFIX + key, value) for key, values in protocol.decode(packet).items() for value in values]
            if len(fields) > REQUEST_FIELDS:
                raise protocol.ProtocolError("too many fields")
            if (f"{PREFIX}verb", "run") in fields:
                fields = [*_credentials(visitor.connection), *fields]
        except BlockingIOError:
            return
        except (OSError, protocol.ProtocolError):
            self._dismiss(fd)
            return
        self._poll.modify(fd, 0)
        self._waiting.append((visitor, fields))
        visitor.deadline = time.monotonic() + IDLE_SECONDS

    def _ask(self) -> None:
        """Pass on what waits, as far as the agent keeps up."""
        while self._waiting and sum(self._places.values()) < OUTSTANDING:
            visitor, fields = self._waiting.popleft()
            if visitor.connection.fileno() < 0:
                continue  # He has left; another may have his descriptor's number by now.
            pidfds: list[int] = []
            try:
                if fields[0][0] == "pid" and (pidfd := protocol.peer_pidfd(visitor.connection)) >= 0:
                    pidfds.append(pidfd)
            except OSError:
                self._dismiss(visitor.connection.fileno())  # It has ended; whoever has its connection is another.
                continue
            self._count += 1
            self._asked[self._count] = visitor
            self._places[self._count] = 1 + sum(len(value) for _, value in fields) // REQUEST_BYTES
            named = [("id", str(self._count)), ("uid", str(visitor.uid)), *fields]
            protocol.send(self._channel, named, pidfds)
            for pidfd in pidfds:
                os.close(pidfd)

    def _answer(self) -> bool:
        """Hand the agent's reply to its visitor, if he is still there; False when the agent is gone."""
        message = protocol.receive(self._channel)
        if message is None:
            return False
        with message:
            ident = message.number("id")
            visitor = self._asked.pop(ident)
            del self._places[ident]
            fields = [(key, value) for key, values in message.values.items() if key != "id" for value in values]
            fd = visitor.connection.fileno()
            if fd < 0:
                return True
            try:
                protocol.send(visitor.connection, fields, message.fds)
                self._poll.modify(fd, select.EPOLLIN)
            except OSError:
                self._dismiss(fd)
        return True

    def _dismiss_idle(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, visitor in self._visitors.items() if visitor.deadline <= now]:
            self._dismiss(fd)

    def _dismiss(self, fd: int) -> None:
        visitor = self._visitors.pop(fd)
        self._held[visitor.uid] -= 1
        if not self._held[visitor.uid]:
            del self._held[visitor.uid]
        self._poll.unregister(fd)
        visitor.connection.close()


def _credentials(connection: socket.socket) -> protocol.Fields:
    """Who connected, beside the uid. Raises OSError: he has more than MOST_GROUPS groups."""
    pid, _, gid = protocol.peer_credentials(connection)
    groups = linux.peer_groups(connection.fileno(), MOST_GROUPS)
    return [("pid", str(pid)), ("gid", str(gid)), ("groups", ",".join(str(group) for group in groups))]
