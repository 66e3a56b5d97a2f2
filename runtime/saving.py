"""--container-save on this node: waits until all tasks of the step have ended, has the container saved, tells them.

Each task's first process outlives the user's program (spank/save.c) and reports its end over a socket of its own, so
that what goes wrong reaches the terminal and the exit status. Runs in the agent's event loop; reads no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence

from enclos.runtime import errors, protocol
from enclos.runtime.connection import Connection
from enclos.runtime.container import failure
from enclos.runtime.spawner import ChildDied, Spawner

log = logging.getLogger("enclosd")

# For tasks that ended before they joined: nothing tells of them.
MISSING_SECONDS = 30.0
ATTEMPTS = 2


class Saving:
    """The saving of one node-step's container."""

    def __init__(self, spawner: Spawner, fields: protocol.Fields, path: str, tasks: int, outside_fd: int) -> None:
        """`outside_fd` is the mount namespace in which the path is meant; it is copied."""
        self._spawner = spawner
        self._fields = [*fields, ("path", path)]
        self._path = path
        self._tasks = tasks
        self._outside_fd = os.dup(outside_fd)
        self._namespaces: Mapping[str, int] = {}
        self._waiting: list[Connection] = []
        self._gone = 0
        self._changed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._saver: asyncio.Task[None] | None = None

    def channel(self, namespaces: Mapping[str, int], node: str) -> int:
        """The end of a socket for one task; the caller closes it when it is sent."""
        self._namespaces = namespaces
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = asyncio.create_task(self._listen(Connection(ours)))
        self._serving.add(task)
        if self._saver is None:
            self._saver = asyncio.create_task(self._run(node))
        return theirs.detach()

    async def _listen(self, connection: Connection) -> None:
        """One task: it says that it has ended, or its end is that of its socket."""
        message = None
        with contextlib.suppress(protocol.ProtocolError):
            message = await connection.receive()
        if message is None:
            connection.close()
            self._gone += 1
        else:
            message.close()
            self._waiting.append(connection)
        self._changed.set()

    async def _run(self, node: str) -> None:
        await self._await_tasks()
        if not self._waiting:
            return  # All were killed: nobody is there to be told, and nothing may be written in the name of the step.
        try:
            warnings = await self._save()
            replies = [("status", "ok"), ("text", f"saved the container to {self._path}")]
            replies += [("notice", errors.printable(text)) for text in warnings]
        except errors.EnclosError as error:
            log.warning("not saved: %s", error.line())
            replies = [("status", "error"), ("text", error.line(node)), ("hint", errors.printable(error.hint))]
        for connection in self._waiting:
            connection.send([("version", str(protocol.VERSION)), *replies])
            if replies[0] == ("status", "ok"):
                replies = replies[:1]  # One of them speaks; of errors the tasks show one themselves.

    async def _await_tasks(self) -> None:
        while len(self._waiting) + self._gone < self._tasks:
            self._changed.clear()
            missing = len(self._waiting) + self._gone >= len(self._serving)
            try:
                async with asyncio.timeout(MISSING_SECONDS if missing and self._waiting else None):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _save(self) -> Sequence[str]:
        for _ in range(ATTEMPTS):
            try:
                await self._spawner.ready()
                return await self._save_once()
            except ChildDied:
                continue
        raise errors.save_failed(self._path, "the process that saves it was killed")

    async def _save_once(self) -> Sequence[str]:
        fds = [self._outside_fd, self._namespaces["user"], self._namespaces["mnt"]]
        return await self._ask(self._fields, fds)

    async def check(self) -> None:
        """Before the step begins: is there a place for the file? Raises EnclosError; ChildDied."""
        await self._ask([*self._fields, ("only", "check")], [self._outside_fd])

    async def _ask(self, fields: protocol.Fields, fds: Sequence[int]) -> Sequence[str]:
        child = self._spawner.spawn("save", fields, fds)
        try:
            with await child.receive() as answer:
                if answer.get("state") != "done":
                    raise failure(answer)
                return answer.all("warning")
        except BaseException:
            child.kill()
            raise
        finally:
            child.close()

    async def close(self) -> None:
        """At the step's end: who still waits has been killed."""
        for task in (*self._serving, *([self._saver] if self._saver is not None else [])):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()
        if self._outside_fd >= 0:
            os.close(self._outside_fd)
            self._outside_fd = -1
