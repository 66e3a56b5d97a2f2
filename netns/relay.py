"""The relay: TCP listeners in a job's namespace, carried to the same address and port outside.

The PMIx server of a step is in slurmstepd and listens in the node's namespace, where no task of the step
can reach it. Which listeners those are is asked of the kernel, never of the job's environment: else a user
could aim this relay at any service of the node that trusts 127.0.0.1.

`step_listeners` and `listen` run in the agent. `serve` runs in a process of its own, one per node-step, as
an ordinary user, in the node's network namespace; it ends when slurmstepd does. It understands nothing of
what it carries.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

from enclos.netns import link
from enclos.netns.batch import Batch
from enclos.netns.diag import tcp_listeners
from enclos.netns.facts import KernelRefused, RelayPortTaken
from enclos.netns.namespace import LOOPBACK_INDEX, inside
from enclos.netns.netlink import Netlink

Target = tuple[str, int]

BACKLOG = 512
CONNECTIONS = 4096
"""At once; more wait in the listener's backlog. A descriptor limit lowers it."""
SPARE_DESCRIPTORS = 32
CHUNK_BYTES = 16 << 10
"""Read at once, and kept at most per direction: with all connections stuck 128 MB, which no job is charged for."""
EXHAUSTED_SECONDS = 1.0
IDLE = 0
UNWATCHED = -1
RESET = struct.pack("ii", 1, 0)


def step_listeners(pid: int) -> list[Target]:
    """The TCP listeners of one process that are bound to a specific address, in our namespace.

    Wildcard ones (slurmstepd's for srun's stdio) stay what they are: reachable from outside only.

    Raises:
        FileNotFoundError: there is no such process any more.
    """
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = str(entry.readlink())
            if name.startswith("socket:["):
                inodes.add(int(name[8:-1]))
    return sorted(
        (fact.address, fact.port)
        for fact in tcp_listeners()
        if fact.inode in inodes and not ip_address(fact.address).is_unspecified
    )


def listen(netns_fd: int, targets: Sequence[Target]) -> list[socket.socket]:
    """Listeners inside the namespace, one per target, on the same address and port. The caller closes them.

    An address that the namespace does not have is given to its loopback.

    Raises:
        RelayPortTaken: a process in the namespace has the port.
    """
    listeners: list[socket.socket] = []
    try:
        with inside(netns_fd):
            for address, port in targets:
                listeners.append(_listener(address, port))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listener(address: str, port: int) -> socket.socket:
    listener = socket.socket(link.FAMILY[link.ip_version(address)], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of an earlier step in TIME_WAIT may not be in the way; listeners still are.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            _give_to_loopback(address)
            listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RelayPortTaken(address, port) from error
        raise
    return listener


def _give_to_loopback(address: str) -> None:
    packed = link.pack_address(address)
    batch = Batch()
    batch.add(link.add_address(LOOPBACK_INDEX, packed, len(packed) * 8), address)
    with Netlink() as nl:
        try:
            nl.run(batch)
        except KernelRefused as refused:
            if refused.errno != errno.EEXIST:
                raise


class _End:
    """One socket of a connection: what has been read from it and not yet been written to the other."""

    __slots__ = ("closing", "connection", "done", "hung_up", "interest", "other", "pending", "socket")

    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        self.socket = sock
        self.connection = connection
        self.other: _End = self
        self.pending = memoryview(b"")
        self.closing = False
        """It has sent its end: nothing more to read."""
        self.done = False
        """And the other side has been told."""
        self.hung_up = False
        """Both directions of this socket are shut: the poll would report that for ever."""
        self.interest = UNWATCHED

    def wanted(self) -> int:
        """What to wait for. Nothing is fine: a reset is reported all the same."""
        if not self.connection.connected:
            return select.EPOLLOUT if self is self.connection.target else IDLE
        wanted = select.EPOLLOUT if self.other.pending else IDLE
        if not self.closing and not self.pending:
            wanted |= select.EPOLLIN
        return UNWATCHED if self.hung_up and wanted == IDLE else wanted


class _Connection:
    """A client inside and its target outside."""

    __slots__ = ("client", "connected", "target")

    def __init__(self, client: socket.socket, target: socket.socket) -> None:
        self.client = _End(client, self)
        self.target = _End(target, self)
        self.client.other, self.target.other = self.target, self.client
        self.connected = False

    @property
    def ends(self) -> tuple[_End, _End]:
        """Both sockets."""
        return self.client, self.target


class _Relay:
    """The poll loop. One buffer serves all reads; only what a slow reader leaves over is kept, and until it
    is gone nothing more is read for that reader: memory is bounded by one chunk per direction."""

    def __init__(self, listeners: Sequence[socket.socket], targets: Sequence[Target], limit: int) -> None:
        self._poll = select.epoll()
        self._listeners = {
            listener.fileno(): (listener, target) for listener, target in zip(listeners, targets, strict=True)
        }
        self._ends: dict[int, _End] = {}
        self._limit = limit
        self._accepting = False
        self._exhausted = False
        self._buffer = bytearray(CHUNK_BYTES)
        self._view = memoryview(self._buffer)
        for listener in listeners:
            listener.setblocking(False)

    def run(self, life_line: int) -> None:
        """Until the descriptor `life_line` is readable."""
        self._poll.register(life_line, select.EPOLLIN)
        while True:
            self._admit()
            events = self._poll.poll(EXHAUSTED_SECONDS if self._exhausted else None)
            self._exhausted = False
            for fd, mask in events:
                if fd == life_line:
                    return
                if fd in self._ends:
                    self._serve(self._ends[fd], mask)
            # Last, because a new connection may get the number of a descriptor that this round has closed.
            for fd, _ in events:
                if fd in self._listeners and self._has_room():
                    self._accept(*self._listeners[fd])

    def _has_room(self) -> bool:
        return len(self._ends) < 2 * self._limit and not self._exhausted

    def _admit(self) -> None:
        """Watch the listeners only while there is room; meanwhile clients wait in the backlog."""
        room = self._has_room()
        if room != self._accepting:
            self._accepting = room
            for fd in self._listeners:
                if room:
                    self._poll.register(fd, select.EPOLLIN)
                else:
                    self._poll.unregister(fd)

    def _accept(self, listener: socket.socket, address: Target) -> None:
        # The way out comes first: a client that is taken can be served.
        try:
            target = socket.socket(listener.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            self._exhausted = True
            return
        try:
            client, _ = listener.accept()
        except OSError as error:
            # Out of files or memory: asking again at once would spin. Otherwise the client has gone away.
            self._exhausted = error.errno not in (errno.EAGAIN, errno.ECONNABORTED)
            target.close()
            return
        client.setblocking(False)
        for sock in (client, target):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, target)
        for end in connection.ends:
            self._ends[end.socket.fileno()] = end
        if target.connect_ex(address) in (0, errno.EINPROGRESS):
            self._watch(connection)
        else:
            self._close(connection, reset=True)

    def _watch(self, connection: _Connection) -> None:
        """Tell the poll what each end waits for now."""
        for end in connection.ends:
            wanted = end.wanted()
            if wanted == end.interest:
                continue
            if wanted == UNWATCHED:
                self._poll.unregister(end.socket.fileno())
            elif end.interest == UNWATCHED:
                self._poll.register(end.socket.fileno(), wanted)
            else:
                self._poll.modify(end.socket.fileno(), wanted)
            end.interest = wanted

    def _serve(self, end: _End, events: int) -> None:
        connection = end.connection
        try:
            if not connection.connected:
                self._connected(end)
            elif events & select.EPOLLERR:
                raise ConnectionResetError(end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            else:
                end.hung_up = end.hung_up or bool(events & select.EPOLLHUP)
                if events & select.EPOLLOUT:
                    self._flush(end.other)
                if events & select.EPOLLIN:
                    self._read(end)
        except OSError:
            self._close(connection, reset=True)
            return
        if connection.client.done and connection.target.done:
            self._close(connection)
        else:
            self._watch(connection)

    def _connected(self, end: _End) -> None:
        """The target has answered, or the client has hung up meanwhile."""
        code = end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code or end is not end.connection.target:
            raise ConnectionResetError(code)
        end.connection.connected = True

    def _read(self, end: _End) -> None:
        try:
            size = end.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        if size == 0:
            end.closing = True
            self._finish(end)
            return
        sent = _send(end.other.socket, self._view[:size])
        if sent < size:
            end.pending = memoryview(bytes(self._view[sent:size]))

    def _flush(self, end: _End) -> None:
        """Write what was left over."""
        end.pending = end.pending[_send(end.other.socket, end.pending) :]
        self._finish(end)

    def _finish(self, end: _End) -> None:
        """Pass on the end of the stream, behind its last byte."""
        if end.closing and not end.pending and not end.done:
            end.other.socket.shutdown(socket.SHUT_WR)
            end.done = True

    def _close(self, connection: _Connection, reset: bool = False) -> None:
        """Give both sockets back; with `reset` neither side takes it for an ordinary end."""
        for end in connection.ends:
            del self._ends[end.socket.fileno()]
            if reset:
                with contextlib.suppress(OSError):
                    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.socket.close()


def _send(sock: socket.socket, data: memoryview) -> int:
    try:
        return sock.send(data) if data else 0
    except BlockingIOError:
        return 0


def serve(listeners: Sequence[socket.socket], targets: Sequence[Target], stepd_pidfd: int) -> NoReturn:
    """Carry connections until `stepd_pidfd` is readable, then end the process.

    Args:
        listeners: as listen() returned them; accepted from here on.
        targets: in the same order; connected to in the namespace that this process is in.
        stepd_pidfd: a pidfd, or anything that becomes readable when it is over.
    """
    try:
        soft = _raise_descriptor_limit()
        limit = max(1, min(CONNECTIONS, (soft - SPARE_DESCRIPTORS - len(listeners)) // 2))
        _Relay(listeners, targets, limit).run(stepd_pidfd)
    except BaseException:
        # A fork of the zygote must never run on into its parent's code.
        os._exit(1)
    os._exit(0)


def _raise_descriptor_limit() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 2 * SPARE_DESCRIPTORS
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
