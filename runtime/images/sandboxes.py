"""The sandboxes of one import, and the agent that waits for it: what they say, and their end when nobody wants it."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from enclos.runtime import errors, protocol
from enclos.runtime.images import sandbox
from enclos.runtime.images.sandbox import Rights, Sandbox


class Unwanted(Exception):
    """The agent closed the channel: nobody waits for the image any more."""


class Sandboxes:
    """Those of one import. `stop` has to be called."""

    def __init__(self, agent: socket.socket) -> None:
        self.agent = agent
        self._running: list[Sandbox] = []

    def start(self, name: str, job: sandbox.Job, rights: Rights, work: str = "", fds: Sequence[int] = ()) -> Sandbox:
        """As sandbox.start."""
        running = sandbox.start(name, job, rights, work, fds)
        self._running.append(running)
        return running

    def end(self, running: Sandbox) -> None:
        """Kill one where it still runs, and wait for it."""
        self._running.remove(running)
        running.end()

    def stop(self) -> None:
        """End all."""
        while self._running:
            self._running.pop().end()

    def receive(self, running: Sandbox) -> protocol.Message | None:
        """The next message of one sandbox, while the agent is there; raises the error that it reports."""
        (ready,) = self.await_any([running])[:1]
        return self.message_of(ready)

    def await_any(self, sandboxes: Sequence[Sandbox]) -> list[Sandbox]:
        """Wait until some of these have something to say, or have ended. Raises Unwanted."""
        poller = select.poll()
        poller.register(self.agent, select.POLLIN)
        by_fd = {running.channel.fileno(): running for running in sandboxes}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poller.poll()]
        if self.agent.fileno() in ready:
            raise Unwanted  # It says nothing while this works: it has closed.
        return [by_fd[fd] for fd in ready]

    @staticmethod
    def message_of(running: Sandbox) -> protocol.Message | None:
        """What a sandbox says; None at its end. Raises the error that it reports."""
        try:
            message = protocol.receive(running.channel)
        except ConnectionError:
            return None
        if message is not None:
            message.close()  # A sandbox has no descriptors to give.
            if message.get("state") == "error":
                parts = (message.get(part) for part in ("subject", "what", "cause", "hint"))
                raise errors.EnclosError(*parts, transient=message.get("transient") == "1")
        return message

    def tell(self, state: str, *fields: tuple[str, str]) -> None:
        """Send something to the agent."""
        protocol.send(self.agent, [("state", state), *fields])


def ended(status: int) -> str:
    """The words for what `Sandbox.wait` returned."""
    if status > 128:
        return f"the importer was ended by signal {status - 128}"
    return f"the importer ended with {status}"
