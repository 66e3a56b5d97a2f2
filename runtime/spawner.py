"""The agent's side of the zygote: starts it, asks it for children, starts another when it dies.

The agent itself never forks: its memory holds every user's requests, and a fork of a process with an event loop
copies more than it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from enclos.runtime import protocol
from enclos.runtime.connection import Connection

log = logging.getLogger("enclosd")

RESTART_PAUSE_SECONDS = 1.0
STOP_SECONDS = 2.0


def zygote_code() -> str:
    """What the zygote's interpreter runs: it finds modules where this one does, also where `make install` put them.

    Not `-m`, which would look into the working directory first: an administrator may start the agent anywhere.
    """
    return f"import sys; sys.path[:] = {sys.path!r}; from enclos.runtime.zygote import main; main()"


class ChildDied(Exception):
    """The child ended, or could not be started, before it said what was expected of it."""


class Child:
    """One fork of the zygote, as the agent sees it: its channel, pid and pidfd. Closed by `close`."""

    __slots__ = ("channel", "pid", "pidfd")

    def __init__(self, channel: Connection) -> None:
        self.channel = channel
        self.pid = 0
        self.pidfd = -1

    async def receive(self) -> protocol.Message:
        """The child's next message, `started` aside; raises ChildDied when there will be none."""
        while True:
            message = await self.channel.receive()
            if message is None:
                raise ChildDied
            if message.get("state") != "started":
                return message
            self._started(message)

    def _started(self, message: protocol.Message) -> None:
        if message.get("state") == "started":
            self.pid = message.number("pid")
            (self.pidfd,) = message.take_fds()

    def send(self, fields: protocol.Fields, fds: Sequence[int] = ()) -> None:
        """Raises ChildDied when the child is gone."""
        if not self.channel.send(fields, fds):
            raise ChildDied

    def has_ended(self) -> bool:
        """Whether the process has ended, even if its channel has not been read to its end."""
        if self.pidfd < 0:
            return False
        poll = select.poll()  # Not select(2): the agent has more than 1024 descriptors on a busy node.
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """SIGKILL; a user may have stopped the child, and this works on a stopped one too.

        Its pidfd may still lie unread in the channel.
        """
        with contextlib.suppress(protocol.ProtocolError):
            while self.pidfd < 0 and (message := self.channel.receive_now()) is not None:
                with message:
                    self._started(message)
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Spawner:
    """Keeps one zygote running."""

    def __init__(self) -> None:
        self._control: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._available = asyncio.Event()
        self._keeps_spare = False
        self._spare: Child | None = None

    async def start(self) -> None:
        """Start the zygote and wait until it can fork; raises ChildDied when it can't be started."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-c", zygote_code(), str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        control = Connection(mine)
        if await control.receive() is None:
            control.close()
            await asyncio.to_thread(self._process.wait)
            raise ChildDied
        self._control = control
        self._available.set()
        self.order_spare()
        self._watch = asyncio.create_task(self._restart_when_gone(control))

    async def _restart_when_gone(self, control: Connection) -> None:
        """Whoever was being served by the dead zygote's builders retries; see building.py."""
        await control.receive()
        control.close()
        self._control = None
        self._available.clear()
        if self._process is not None:
            self._process.wait()
        self._drop_spare()
        log.warning("zygote ended, starting another")
        while True:
            try:
                await self.start()
                return
            except (ChildDied, OSError) as error:
                log.error("no zygote can be started (%s), trying again", error or "it ended")
            await asyncio.sleep(RESTART_PAUSE_SECONDS)

    async def ready(self) -> None:
        """Wait for a zygote, where the last one has died; its children saw that before this process does."""
        while self._control is None or self._control.hung_up():
            self._available.clear()
            await self._available.wait()

    def spawn(self, task: str, fields: protocol.Fields = (), fds: Sequence[int] = ()) -> Child:
        """Ask for a child; the caller keeps its descriptors and closes the returned child.

        A builder may have been forked ahead (spare.py): then it gets the request, and nobody forks.

        Raises:
            ChildDied: there is no zygote at this moment.
        """
        if self._control is None:
            raise ChildDied
        if task == "build" and (spare := self._take_spare()) is not None:
            if spare.channel.send([("task", task), *fields], fds):
                return spare
            spare.close()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            sent = self._control.send([("task", task), *fields], [theirs.fileno(), *fds])
        if not sent:
            mine.close()
            raise ChildDied
        return Child(Connection(mine))

    def keep_spare(self) -> None:
        """From now on a builder forked ahead is wanted: the first one at once, others as they are ordered."""
        self._keeps_spare = True
        self.order_spare()

    def order_spare(self) -> None:
        """Have a builder forked ahead if one is wanted and there is none; each zygote begins with one."""
        if self._keeps_spare and (self._spare is None or self._spare.channel.hung_up()):
            self._drop_spare()
            with contextlib.suppress(ChildDied):
                self._spare = self.spawn("spare")

    def _take_spare(self) -> Child | None:
        spare, self._spare = self._spare, None
        return spare

    def _drop_spare(self) -> None:
        if (spare := self._take_spare()) is not None:
            spare.close()

    async def stop(self) -> None:
        """Let the zygote end by closing its control socket."""
        self._drop_spare()
        if self._watch is not None:
            self._watch.cancel()
        if self._control is not None:
            self._control.close()
            self._control = None
        if (process := self._process) is not None:
            try:
                await asyncio.to_thread(process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # Stopped by a debugger, or stuck: the agent ends all the same.
                await asyncio.to_thread(process.wait)
