"""What every node-step has: its record, its slurmstepd, and an end at which nothing of it is left.

A step that this agent builds is in building.py; one of an agent before it is here. Runs in the agent's event loop;
mounts nothing, knows nothing of sockets towards Slurm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from enclos.runtime import cgroup, delegation, errors, steplimits
from enclos.runtime.connection import wait_readable
from enclos.runtime.devices.node import NodeDevices
from enclos.runtime.images.checks import Checks
from enclos.runtime.images.imports import Imports
from enclos.runtime.images.served import ServedImage
from enclos.runtime.images.store import MountedImages
from enclos.runtime.jobs import Jobs
from enclos.runtime.journal import Journal
from enclos.runtime.members import Identity, identity
from enclos.runtime.named import NamedContainers
from enclos.runtime.request import StepRequest, step_name
from enclos.runtime.settings import Config
from enclos.runtime.spawner import ChildDied, Spawner

log = logging.getLogger("enclosd")

# Of a step's record: not for people.
HIDDEN = (
    *("stepd_start", "namespaces", "netns", "vni", "server", "limits"),
    *("keeper", "delegated", "cgroup_id"),
    *("named", "remap_root", "mount_home", "gpus", "environment", "entering"),
)

SWEEPS = 5
SWEEP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every step of the node shares."""

    node: str
    config: Config
    stage: str
    journal: Journal
    spawner: Spawner
    images: MountedImages
    imports: Imports
    checks: Checks
    jobs: Jobs
    devices: NodeDevices
    named: NamedContainers
    # How many steps there are in a container that several share, by its user namespace.
    sharing: Counter[Identity] = field(default_factory=Counter)


@dataclass(slots=True)
class JoinReply:
    """What a task needs to enter the container. The descriptors stay the step's."""

    fields: list[tuple[str, str]]
    fds: dict[str, int] = field(default_factory=dict)


class Step:
    """A step on this node, tied to its slurmstepd: what every step has, built by this agent or one before it."""

    def __init__(self, around: Surroundings, record: dict[str, Any], stepd_pidfd: int) -> None:
        self._around = around
        self.record = record
        self.stepd_pidfd = stepd_pidfd
        self._shared_fd = -1
        self._told: set[str] = set()
        # Until slurmstepd has ended.
        self._watchers: set[asyncio.Task[None]] = set()
        # Set when slurmstepd is gone and nobody can enter its container any more.
        self.ended = asyncio.Event()

    @property
    def key(self) -> tuple[int, int]:
        return self.record["job"], self.record["step"]

    @property
    def uid(self) -> int:
        return int(self.record["uid"])

    @property
    def name(self) -> str:
        return step_name(self.record["job"], self.record["step"])

    @property
    def record_name(self) -> str:
        """With slurmstepd's pid: a requeued job has the same step again while the old one is cleaned up."""
        return f"step.{self.name}.{self.record['stepd']}"

    def prepare(self) -> None:
        """Begin to build, where there is something to build."""

    async def join(self, wanted: StepRequest) -> JoinReply:
        """The answer for one task; raises EnclosError where there is none."""
        raise errors.agent_restarted()

    def show_progress(self, show: Callable[[str], None]) -> None:
        """Where the first task shows what takes time, where something does."""

    @property
    def joined(self) -> bool:
        """Whether a task has asked to join, so that `answer` is enough for the others."""
        return False

    async def answer(self) -> JoinReply:
        """The answer that the first task gets or got."""
        raise errors.agent_restarted()

    def take_mounts(self, fd: int, task_pid: int, wanted: StepRequest) -> None:
        """The mount namespace that a task came from; it stays the caller's."""

    def save_channel(self) -> int:
        """A descriptor for one task that has joined, the caller's; -1 where it needs none."""
        return -1

    def cgroup_channel(self, task_pid: int) -> int:
        """A descriptor by which a task gets a cgroup of its own when it has joined, the caller's; -1 for none."""
        return -1

    async def task_ended(self, pid: int) -> None:
        """End what a task has left below its cgroup, so that Slurm can remove that."""
        directory = self.record.get("delegated", {}).get(str(pid))
        if directory is not None and not await asyncio.to_thread(delegation.revoke, directory):
            log.error("step=%s: what is below %s cannot be ended", self.name, directory)

    def follow(self, pid: int) -> None:
        """See the end of a task that divides its cgroup.

        slurmstepd tells it, too, but not where cgroups fill the memory that it shares with the step: it gets no further
        then before they are gone.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # It ended while no agent was there.
            pidfd = -1
        self._watchers.add(asyncio.create_task(self._revoke_at_end(pid, pidfd)))

    async def _revoke_at_end(self, pid: int, pidfd: int) -> None:
        if pidfd >= 0:
            try:
                await wait_readable(pidfd)
            finally:
                os.close(pidfd)
        await self.task_ended(pid)

    @property
    def running(self) -> bool:
        """Whether another step of its user can enter its container."""
        return bool(self.record["state"] == "running" and self.namespaces())

    def namespaces(self) -> Mapping[str, int]:
        """Descriptors of the container's namespaces by their names, which stay the step's; empty where it has none."""
        return {}

    def network_namespace(self) -> int:
        """A descriptor of the network namespace, the step's; -1 for the node's, or where it is not known."""
        return -1

    def served_image(self) -> ServedImage | None:
        """The image, where a process serves it: whoever else has files of it takes a share."""
        return None

    def admit(self, pid: int) -> None:
        """Put a task that is about to join where the step's limits are, if Slurm has no cgroup for it.

        Raises:
            EnclosError: limit_refused.
        """
        directory = str(self.record.get("cgroup", ""))
        if cgroup.is_own(directory):
            try:
                cgroup.enter(directory, pid)
            except OSError as error:
                raise errors.limit_refused("--container-limit", errors.reason(error.errno or 0)) from error

    def limit_news(self) -> list[errors.EnclosError]:
        """The limits that the step has met since the last call, in words; mostly none."""
        happened = steplimits.news(str(self.record.get("cgroup", "")), self.record.get("limits", []))
        fresh = [error for error in happened if error.subject not in self._told]
        self._told |= {error.subject for error in fresh}
        return fresh

    def user_namespace(self) -> int:
        """The container's user namespace, or -1; it stays the step's."""
        return self.namespaces().get("user", self._shared_fd)

    def share(self, user_fd: int) -> None:
        """Count this step among those of a container, by its user namespace, from before it is in until its end."""
        fd = os.dup(user_fd)
        self._unshare()
        if self._shared_fd >= 0:
            os.close(self._shared_fd)
        self._shared_fd = fd
        self._around.sharing[identity(user_fd)] += 1

    def _unshare(self) -> bool:
        """Whether no other step is in the container."""
        if self._shared_fd < 0:
            return True
        space = identity(self._shared_fd)
        self._around.sharing[space] -= 1
        if self._around.sharing[space] > 0:
            return False
        del self._around.sharing[space]
        return True

    async def release(self) -> None:
        """Give up everything that belongs to the step alone, when nothing of it runs any more."""

    async def watch(self, forget: Callable[[Step], None]) -> None:
        """Wait for the end of slurmstepd, then clean up behind the step."""
        if self.record.get("keeper"):
            self._watchers.add(asyncio.create_task(self._guard()))
        for pid in self.record.get("delegated", {}):
            self.follow(int(pid))
        await wait_readable(self.stepd_pidfd)
        forget(self)
        for task in self._watchers:
            task.cancel()
        try:
            self._around.named.left(self)
            self.ended.set()
            if self._unshare():
                await self._sweep()
            else:
                cgroup.kill(self._cgroup())
        finally:
            await self.release()
            await self._around.devices.holdings.give_back(self.record_name)
            if self._shared_fd >= 0:
                os.close(self._shared_fd)
            await self._remove_cgroup()
            os.close(self.stepd_pidfd)
            self._around.journal.remove(self.record_name)
        log.info("step=%s ended after %.1f s", self.name, time.time() - self.record["started"])

    async def _guard(self) -> None:
        """Kill everything when Slurm kills everything: below the tasks' cgroups it does not look (delegation.py)."""
        pid, started = self.record["keeper"]
        with contextlib.suppress(OSError):
            keeper = os.pidfd_open(pid)
            try:
                if start_time(pid) == started:
                    await wait_readable(keeper)
            finally:
                os.close(keeper)
        cgroup.kill(self._cgroup())

    def _cgroup(self) -> str:
        """Directory of the step's cgroup; "" if it has none, or when the same step of a requeued job has that place."""
        directory = str(self.record.get("cgroup", ""))
        known = int(self.record.get("cgroup_id", 0))
        return "" if known and cgroup.ident(directory) != known else directory

    async def _remove_cgroup(self) -> None:
        """One of ours, or what Slurm has left; a thread waits for the kernel, which takes its time with the killed."""
        if directory := self._cgroup():
            remove = cgroup.remove if cgroup.is_own(directory) else delegation.remove_step
            if not await asyncio.to_thread(remove, directory):
                log.error("step=%s: %s cannot be removed", self.name, directory)

    async def _sweep(self) -> None:
        """Kill what slurmstepd left in the container. The zygote may die meanwhile; the work can be done again."""
        namespace_fd = self.user_namespace()
        if namespace_fd < 0:
            return
        for _ in range(SWEEPS):
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._around.spawner.ready()
                    await self._sweep_once(namespace_fd)
                return
            except (ChildDied, TimeoutError):
                continue
        log.error("step=%s: what is left of it could not be ended", self.name)

    async def _sweep_once(self, namespace_fd: int) -> None:
        fields = [("uid", str(self.uid)), ("cgroup", self._cgroup())]
        child = self._around.spawner.spawn("sweep", fields, [namespace_fd])
        try:
            with await child.receive() as answer:
                self._log_sweep(answer.get("killed"), answer.get("left"))
        except BaseException:
            child.kill()
            raise
        finally:
            child.close()

    def _log_sweep(self, killed: str, left: str) -> None:
        if (killed, left) != ("0", "0"):
            log.warning("step=%s killed %s processes that were left, %s still there", self.name, killed, left)

    def describe(self) -> dict[str, Any]:
        """What `enclos ps` shows."""
        return {key: value for key, value in self.record.items() if key not in HIDDEN}


class AdoptedStep(Step):
    """A step that an agent before this one built; its tasks have joined already."""

    def __init__(
        self,
        around: Surroundings,
        record: dict[str, Any],
        stepd_pidfd: int,
        namespaces: dict[str, int],
        net_fd: int,
        served: ServedImage | None,
    ) -> None:
        """Takes over the descriptors. Of the namespaces perhaps only the user's is there: then nobody else gets in."""
        super().__init__(around, record, stepd_pidfd)
        self._namespaces = namespaces
        self._net_fd = net_fd
        self._served = served

    @property
    def running(self) -> bool:
        missing = self.record["network"] != "host" and self._net_fd < 0
        return len(self._namespaces) == len(self.record["namespaces"]) and not missing

    def namespaces(self) -> Mapping[str, int]:
        return self._namespaces

    def network_namespace(self) -> int:
        return self._net_fd

    def served_image(self) -> ServedImage | None:
        return self._served

    async def release(self) -> None:
        if self._served is not None:
            self._served.release()
            self._served = None
        for fd in (*self._namespaces.values(), self._net_fd):
            if fd >= 0:
                os.close(fd)
        self._namespaces.clear()
        self._net_fd = -1


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (proc_pid_stat(5), field 22); pid and it name one process.

    Raises:
        FileNotFoundError: there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        stat = file.read(4096)
    return int(stat[stat.rindex(b")") + 2 :].split()[19])
