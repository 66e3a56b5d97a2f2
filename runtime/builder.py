"""A builder: the fork of the zygote that makes one container and exits.

Holds what the operations of a plan share: the channel to the agent, the descriptors by name, the identity to act
under, and the time that each operation took. Starts as root in the agent's mount namespace; from BecomeUser on it
is the user, who may signal it but not look into it. It holds no lock that anybody waits for.

Packets on the channel, all in the encoding of `protocol`:

    builder -> agent   need (what=net|image|map…), give (what=image|idmap, a descriptor), ready, done, error
    agent -> builder   the answer to a need; the late plan
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from enclos.runtime import errors, protocol
from enclos.runtime.asuser import as_user
from enclos.runtime.devices.cdi import Edits
from enclos.runtime.mounts import Mount

if TYPE_CHECKING:
    from enclos.runtime.operations import Operation


class AgentGone(Exception):
    """The agent closed the channel: nobody wants this container any more."""


@dataclass(slots=True)
class Builder:
    """The state of one build.

    `fds` maps names to descriptors that later operations use; all are close-on-exec and die with the process.
    """

    channel: socket.socket
    uid: int
    gid: int
    groups: tuple[int, ...]
    user_name: str = ""
    group_names: list[tuple[str, int]] = field(default_factory=list)
    other_users: list[tuple[str, int, int]] = field(default_factory=list)
    image_path: str = ""
    image_is_directory: bool = False
    image_mounts: list[Mount] = field(default_factory=list)
    lowers: int = 0
    rootfs_limit: str = ""
    devices: Edits = field(default_factory=Edits)
    texts: dict[str, bytes] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)
    results: list[tuple[str, str]] = field(default_factory=list)
    timings: list[tuple[str, float]] = field(default_factory=list)

    def execute(self, plan: Sequence[Operation]) -> None:
        """Run the operations in order, and keep the milliseconds of each."""
        for operation in plan:
            begin = time.perf_counter()
            try:
                operation.execute(self)
            except OSError as error:
                if error.errno == errno.ENOSPC and self.rootfs_limit:
                    raise errors.rootfs_full(self.rootfs_limit) from error
                if error.errno == errno.EIO and self.rootfs_limit:
                    raise errors.image_damaged(self.image_path, errors.reason(errno.EIO)) from error
                raise errors.build_failed(operation.describe(), error.errno or 0) from error
            self.timings.append((type(operation).__name__, (time.perf_counter() - begin) * 1e3))

    def keep(self, name: str, fd: int) -> int:
        """Own `fd` under `name`; a descriptor that had the name before is closed."""
        old = self.fds.pop(name, None)
        if old is not None:
            os.close(old)
        self.fds[name] = fd
        return fd

    def drop(self, name: str) -> None:
        """Close the descriptor of that name, if there is one."""
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def need(self, what: str, *fields: tuple[str, str], fds: Sequence[int] = ()) -> protocol.Message:
        """Ask the agent for something and wait for its answer."""
        self._send([("state", "need"), ("what", what), *fields], fds)
        return self._answer()

    def give(self, what: str, fd: int, *fields: tuple[str, str]) -> None:
        """Hand the agent a copy of a descriptor that it keeps for others."""
        self._send([("state", "give"), ("what", what), *fields], [fd])

    def _send(self, fields: protocol.Fields, fds: Sequence[int] = ()) -> None:
        try:
            protocol.send(self.channel, fields, fds)
        except ConnectionError as error:
            raise AgentGone from error

    def _answer(self) -> protocol.Message:
        try:
            message = protocol.receive(self.channel)
        except ConnectionError as error:
            raise AgentGone from error
        if message is None:
            raise AgentGone
        return message

    def as_user(self) -> contextlib.AbstractContextManager[None]:
        """Look up paths as the user."""
        return as_user(self.uid, self.gid, self.groups)

    def run(self, early: Sequence[Operation]) -> None:
        """Make the container, wait for the first task, and finish with the late plan that it brings."""
        self.execute(early)
        self._report("ready")
        with self._answer() as message:
            plan_fd, *fds = message.take_fds()
            for name, fd in zip(message.all("name"), fds, strict=True):
                self.keep(name, fd)
            self.execute(load_plan(plan_fd).operations)
        self._report("done")

    def _report(self, state: str) -> None:
        timings = [("timing", f"{name} {ms:.3f}") for name, ms in self.timings]
        self._send([("state", state), *self.results, *timings])
        self.timings.clear()
        self.results.clear()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a builder executes, as data: who the user is, and the operations in their order."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    operations: tuple[Operation, ...]

    def describe(self) -> list[str]:
        """One line per operation, as `enclos render` prints and golden tests compare them."""
        return [operation.describe() for operation in self.operations]


def store_plan(plan: Plan) -> int:
    """A memfd that holds the plan; the caller owns it.

    Pickle is safe here: both ends are this program, as root, over a socket pair that nobody else can open.
    A memfd, because a plan with the names of 10,000 nodes does not fit into a packet.
    """
    fd = os.memfd_create("enclos-plan", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        pickle.dump(plan, file, protocol=pickle.HIGHEST_PROTOCOL)
    return fd


def load_plan(fd: int) -> Plan:
    """Read back a plan of `store_plan`; takes over the descriptor."""
    with open(fd, "rb") as file:
        file.seek(0)
        plan = pickle.load(file)
    if not isinstance(plan, Plan):
        raise protocol.ProtocolError("not a plan")
    return plan


def build(channel: socket.socket, request: protocol.Message) -> int:
    """The task `build` of the zygote: its only descriptor is the plan's memfd.

    Returns:
        The exit status: 0 when the container is complete.
    """
    # The agent gives up on a builder by its deadline; a SIGPIPE must not hide what went wrong.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    (plan_fd,) = request.take_fds()
    plan = load_plan(plan_fd)
    builder = Builder(channel, plan.uid, plan.gid, plan.groups)
    try:
        builder.run(plan.operations)
    except AgentGone:
        return 1
    except errors.EnclosError as error:
        failure = [("subject", error.subject), ("what", error.what), ("cause", error.cause), ("hint", error.hint)]
        with contextlib.suppress(ConnectionError):
            protocol.send(channel, [("state", "error"), *failure])
        return 1
    return 0
