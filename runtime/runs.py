"""`enclos run` as the agent sees it: who may, how many, and the process that stands for slurmstepd (running.py).

That process asks for its container by JOIN, as a task of Slurm's does, and everything from there on is a step's
(building.py). Runs in the agent's event loop; it holds nothing that a user sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from enclos.runtime import errors, linux
from enclos.runtime.connection import wait_readable
from enclos.runtime.members import identity
from enclos.runtime.request import RUN_JOB
from enclos.runtime.spawner import Child, ChildDied
from enclos.runtime.steps import Step, Surroundings

# Less than a visitor may be silent (visitors.py).
START_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who types `enclos run`, by the kernel's word: the process that connected, and its credentials then.

    `pidfd` is that process', -1 where the kernel tells only its pid. It is closed with this.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    pidfd: int = -1

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)


class Runs:
    """The runs of this machine. Those of an agent before this one are steps only."""

    def __init__(self, around: Surroundings, steps: Mapping[tuple[int, int], Step], slurm: str) -> None:
        """`slurm` is what shows that this machine is a node of Slurm's; "" where nothing does."""
        self._around = around
        self._steps = steps
        self.slurm = slurm
        self._started: dict[int, tuple[int, int]] = {}
        self._last = 0
        self._watchers: set[asyncio.Task[None]] = set()

    @property
    def allowed(self) -> bool:
        """Whether users may have some."""
        allow = self._around.config.run.allow
        return allow == "always" or (allow == "auto" and not self.slurm)

    async def start(self, caller: Caller) -> tuple[int, int]:
        """Start the process for one run.

        Returns:
            the run's number, and the command's end of that process' socket, which is the caller's.

        Raises:
            EnclosError: run_forbidden, run_too_many, run_confined, run_failed.
        """
        if not self.allowed:
            raise errors.run_forbidden(self.slurm)
        if self._count(caller.uid) >= self._around.config.run.per_user:
            raise errors.run_too_many(self._around.config.run.per_user)
        self._last = number = 1 + max([self._last, *(step for job, step in self._steps if job == RUN_JOB)])
        self._started[number] = caller.uid, 0
        child: Child | None = None
        try:
            await self._around.spawner.ready()
            child = self._spawn(caller, number)
            async with asyncio.timeout(START_SECONDS):
                with await child.receive() as answer:
                    (fd,) = answer.take_fds()
            self._started[number] = caller.uid, child.pid
        except BaseException as error:
            del self._started[number]
            if child is not None:
                child.kill()
                child.close()
            if isinstance(error, (ChildDied, TimeoutError, OSError)):
                raise errors.run_failed("the process that starts it was killed") from error
            raise
        watcher = asyncio.create_task(self._watch(child, number))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return number, fd

    def expects(self, number: int, pid: int) -> bool:
        """Whether this is the process of that run."""
        return pid > 0 and self._started.get(number, (0, 0))[1] == pid

    def _count(self, uid: int) -> int:
        """The user's, with those that an agent before this one started."""
        own = [number for number, (owner, _) in self._started.items() if owner == uid]
        others = [key for key, step in self._steps.items() if key[0] == RUN_JOB and step.uid == uid]
        return len(own) + sum(1 for _, number in others if number not in self._started)

    async def _watch(self, child: Child, number: int) -> None:
        try:
            await wait_readable(child.pidfd)
        finally:
            child.close()
            del self._started[number]

    def _spawn(self, caller: Caller, number: int) -> Child:
        """Raises ChildDied, or EnclosError: run_confined."""
        with _Client(caller) as client:
            mounts_fd = client.mounts(self._around.named.node_mounts_fd)
            try:
                client.check_alive()
                fields = [(key, str(getattr(caller, key))) for key in ("uid", "gid", "pid")]
                fields += [("groups", ",".join(str(group) for group in caller.groups)), ("step", str(number))]
                fields.append(("node", self._around.node))
                return self._around.spawner.spawn("run", fields, [client.fd, mounts_fd])
            finally:
                os.close(mounts_fd)


class _Client:
    """The command's process. It has to be one that could start the program itself, with all that a program has here."""

    def __init__(self, caller: Caller) -> None:
        self._pid = caller.pid
        try:
            # 0 is a process of a pid namespace that is not below the agent's.
            if caller.pid:
                self.fd = os.dup(caller.pidfd) if caller.pidfd >= 0 else os.pidfd_open(caller.pid)
            else:
                self.fd = -1
        except ProcessLookupError as error:
            raise errors.run_failed("the command has ended") from error
        if self.fd < 0:
            raise errors.run_confined("it is in another pid namespace")
        try:
            self._check(caller)
        except OSError as error:
            os.close(self.fd)
            raise errors.run_failed("the command has ended") from error
        except BaseException:
            os.close(self.fd)
            raise

    def _check(self, caller: Caller) -> None:
        """The pid may be another process' by now: one of the same user will do, for he may trace it."""
        with open(f"/proc/{self._pid}/status", encoding="utf-8", errors="surrogateescape") as file:
            status = dict(line.split(":", 1) for line in file.read().splitlines())
        if int(status["Uid"].split()[0]) != caller.uid:
            raise errors.run_confined("it runs with the rights of another user")
        if status.get("Seccomp", "0").strip() != "0":
            raise errors.run_confined("its system calls are filtered")
        # A network, too: one that root made (PrivateNetwork= of systemd) is not left by --container-network=host.
        for kind, words in (("user", "user namespace"), ("pid", "pid namespace"), ("net", "network namespace")):
            if os.stat(f"/proc/{self._pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino:
                raise errors.run_confined(f"it is in another {words}")

    def mounts(self, node_fd: int) -> int:
        """A descriptor of the mount namespace in which it names paths, the caller's: one that root made, or the node's.

        What a user made himself, nothing of root's may enter.
        """
        try:
            fd = os.open(f"/proc/{self._pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise errors.run_failed("the command has ended") from error
        if identity(fd) == identity(node_fd):
            return fd
        try:
            owner_fd = linux.owning_user_namespace(fd)
        except OSError:
            os.close(fd)
            raise errors.run_confined("it is in another mount namespace") from None
        own = os.stat("/proc/self/ns/user")
        owners = identity(owner_fd) == (own.st_dev, own.st_ino)
        os.close(owner_fd)
        if not owners:
            os.close(fd)
            raise errors.run_confined("it is in a mount namespace of its user's")
        return fd

    def check_alive(self) -> None:
        """What was looked at by its pid was its own if it has not ended meanwhile."""
        try:
            signal.pidfd_send_signal(self.fd, 0)
        except ProcessLookupError as error:
            raise errors.run_failed("the command has ended") from error

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
