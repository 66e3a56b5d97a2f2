"""Packets for asyncio: a non-blocking connection whose `receive` can be awaited, and waiting for a descriptor.

Used by the agent for the shim, for users and for its builders. asyncio's own streams know no SOCK_SEQPACKET.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Sequence

from enclos.runtime import linux, protocol

MOST_GROUPS = 1024


class Connection:
    """One peer. `receive` is for one task at a time."""

    __slots__ = ("_socket",)

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    async def receive(self) -> protocol.Message | None:
        """The next packet; None when the peer has closed or reset the connection."""
        while True:
            try:
                return protocol.receive(self._socket)
            except BlockingIOError:
                await wait_readable(self._socket.fileno())
            except ConnectionError:
                return None

    def receive_now(self) -> protocol.Message | None:
        """A packet that has arrived already; None when there is none."""
        try:
            return protocol.receive(self._socket)
        except (BlockingIOError, ConnectionError):
            return None

    def hung_up(self) -> bool:
        """True when the peer has closed, whether `receive` has said so yet or not."""
        poller = select.poll()
        poller.register(self._socket, 0)
        return bool(poller.poll(0))

    def send(self, fields: protocol.Fields, fds: Sequence[int] = ()) -> bool:
        """Send without waiting; False when the peer is gone or does not read what it was sent."""
        try:
            protocol.send(self._socket, fields, fds)
        except (BlockingIOError, BrokenPipeError, ConnectionError):
            return False
        return True

    async def deliver(self, fields: protocol.Fields, fds: Sequence[int] = ()) -> bool:
        """Send, waiting while the peer's queue is full; False when the peer is gone."""
        while True:
            try:
                protocol.send(self._socket, fields, fds)
            except BlockingIOError:
                await _wait_writable(self._socket.fileno())
            except ConnectionError:
                return False
            else:
                return True

    def peer(self) -> tuple[int, int, int]:
        """(pid, uid, gid) of the peer at the time it connected."""
        return protocol.peer_credentials(self._socket)

    def peer_groups(self) -> tuple[int, ...]:
        """The peer's supplementary groups at the time it connected; OSError where they are very many."""
        return tuple(linux.peer_groups(self._socket.fileno(), MOST_GROUPS))

    def peer_pidfd(self) -> int:
        """See protocol.peer_pidfd."""
        return protocol.peer_pidfd(self._socket)

    def close(self) -> None:
        self._socket.close()


async def wait_readable(fd: int) -> None:
    """Wait until `fd` (a socket, a pidfd) is readable; the caller keeps it open meanwhile."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _wait_writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
