"""The network of one step on this node: its namespace, its addresses, and the PMIx relay into it.

What a job network is made of, and who shares it, is jobs.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from enclos.netns import facts, namespace, relay
from enclos.runtime.connection import wait_readable
from enclos.runtime.jobs import JobNetwork, word
from enclos.runtime.request import StepRequest
from enclos.runtime.spawner import Child, ChildDied
from enclos.runtime.steps import Step, Surroundings


class StepNetwork:
    """What a step has of networks. `drop` after a failed attempt to build, `close` at the end.

    Attributes:
        kind: job, host or none; "" before it is decided.
        fd: the namespace; -1 for the node's own.
        addresses: IPv4 and IPv6 of this node on a job's network, or "".
        vni: of a job's network, 0 of others.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.kind = ""
        self.fd = -1
        self.addresses: tuple[str, str] = ("", "")
        self.vni = 0
        self._alone: JobNetwork | None = None
        self._relay: Child | None = None

    async def make(self, request: StepRequest) -> int:
        """The network namespace; -1 for the node's own.

        The job's is copied: its epilog may close it while this step is still there, and then another job's
        namespace may get the number.
        """
        if self.kind == "job" and request.is_run:
            self._alone = self._around.jobs.alone()
            self.fd = os.dup(self._alone.netns_fd)
        elif self.kind == "job":
            made = await self._around.jobs.network(request.job, request.uid)
            self.fd, self.vni = os.dup(made.netns_fd), made.vni
        elif self.kind == "none":
            try:
                self.fd = namespace.create_private()
            except facts.NetworkFact as fact:
                raise word(fact) from fact
        return self.fd

    async def descriptors(self, making: asyncio.Task[int], request: StepRequest) -> list[int]:
        """What the builder needs of it: its namespace, and /etc/hosts where it has names of its own."""
        net_fd = await making
        if self.kind != "job":
            return [net_fd]
        if self._alone is not None:
            made = self._alone
        else:
            made = await self._around.jobs.network(request.job, request.uid)
        self.addresses = made.own
        return [net_fd, made.hosts_fd]

    def share(self, other: Step) -> None:
        """Be on the network of a step whose container is entered."""
        self.kind = other.record["network"]
        self.addresses = other.record["ipv4"], other.record["ipv6"]
        self.vni = int(other.record.get("vni", 0))
        if other.network_namespace() >= 0:
            self.fd = os.dup(other.network_namespace())

    # --- the relay --------------------------------------------------------------------------------------------

    def start_relay(self, request: StepRequest, stepd_pidfd: int, server_directory: str) -> Child | None:
        """Make slurmstepd's PMIx server reachable from the namespace; None where there is nothing to do.

        The targets are sockets that slurmstepd itself listens on, never what the environment names.
        """
        if self.fd < 0 or self._relay is not None or request.is_run:
            return None
        if not os.path.isdir(server_directory):
            return None  # No PMIx in this step: the sockets of slurmstepd need not be looked through.
        targets = relay.step_listeners(request.stepd)
        if not targets:
            return None
        try:
            listeners = relay.listen(self.fd, targets)
        except facts.NetworkFact as fact:
            raise word(fact) from fact
        with contextlib.ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener)
            fds = [stepd_pidfd, *(listener.fileno() for listener in listeners)]
            uid = self._around.config.network.relay_uid
            return self._around.spawner.spawn("relay", [("uid", str(uid))], fds)

    async def await_relay(self, starting: Child) -> None:
        """A relay that was killed while it started would leave MPI programs waiting."""
        try:
            starting_says = await starting.receive()
        except ChildDied:
            if starting.pidfd >= 0:
                await wait_readable(starting.pidfd)  # The next one needs its addresses.
            raise
        starting_says.close()
        self._relay = starting

    # --- the end ----------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Close the namespace. The relay of a job's network stays, as that does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._alone is not None:
            self._alone.close()
            self._alone = None
        if self.kind != "job":
            self._drop_relay()

    def close(self) -> None:
        """Close all."""
        self.drop()
        self._drop_relay()

    def _drop_relay(self) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.close()
            self._relay = None
