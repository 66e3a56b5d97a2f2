"""A node-step that this agent builds: made by PREPARE, joined by its tasks.

Holds everything that must happen to it in order: policy, network, build, late plan, relay, the answer to its tasks.
Runs in the agent's event loop; mounts nothing, knows nothing of sockets towards Slurm. Its end is steps.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from enclos.runtime import (
    cgroup,
    delegation,
    errors,
    plan,
    policy,
    protocol,
    stepd,
)
from enclos.runtime.answer import Answer
from enclos.runtime.connection import Connection
from enclos.runtime.container import Container, Lent, clone_directories
from enclos.runtime.devices.holdings import Asker, Place
from enclos.runtime.idmap import container_maps
from enclos.runtime.images.served import ServedImage
from enclos.runtime.members import identity
from enclos.runtime.named import Turn
from enclos.runtime.outside import Outside
from enclos.runtime.protocol import ProtocolError
from enclos.runtime.request import StepRequest
from enclos.runtime.saving import Saving
from enclos.runtime.spawner import ChildDied
from enclos.runtime.stepimage import StepImage, retrieve
from enclos.runtime.steplimits import StepLimits
from enclos.runtime.stepnetwork import StepNetwork
from enclos.runtime.steps import JoinReply, Step, Surroundings, start_time

if TYPE_CHECKING:
    from enclos.runtime.slurmclient import SlurmClient

log = logging.getLogger("enclosd")

ATTEMPTS = 2
# Of the reply to a task, what a program that enters later needs as well.
ENTERING = ("set", "default", "unset", "keep_caps", "workdir")


class NodeStep(Step):
    """A step that this agent builds. All methods run in its event loop."""

    def __init__(self, around: Surroundings, request: StepRequest, stepd_pidfd: int) -> None:
        super().__init__(around, _record(request), stepd_pidfd)
        self.request = request
        # With the image that a named container was created from.
        self._settled = request
        self._turn: Turn | None = None
        self._begin = time.perf_counter()
        self._marks: list[tuple[str, float]] = []
        self._decision: policy.Decision | None = None
        self._limits: StepLimits | None = None
        self.container: Container | None = None
        self._network = StepNetwork(around)
        self._answer = Answer(around, self.record_name)
        self._commands = ""
        self._notices: list[str] = []
        self._image = StepImage(around, self.record, self._mark)
        self.ready: asyncio.Task[JoinReply] | None = None
        self._early: asyncio.Task[None] | None = None
        self._has_turn = asyncio.Event()
        self._saving: Saving | None = None
        self._delegating: set[asyncio.Task[None]] = set()
        self._outside = Outside(request.stepd, around.named.node_mounts_fd)
        self._moved = False

    def prepare(self) -> None:
        """Begin to build; errors wait for the first join."""
        self._settled = self.request
        if not (self._image.begun or self.request.name or self.request.image_path()):
            self._image.begin(self.request)
        self._early = asyncio.create_task(self._build_early())
        self._early.add_done_callback(retrieve)

    async def join(self, wanted: StepRequest) -> JoinReply:
        """The answer for one task; the first one finishes the container.

        Args:
            wanted: the request as the task sends it. Only the task knows its working directory for sure, so what
                was begun with another one (a relative path of an image or a mount) is begun anew.

        Raises:
            EnclosError: the reason why there is no container.
        """
        if self.ready is None:
            self._mark("joined")
            # At once, without waiting for anything: the other tasks' joins are here in the same moment.
            self.ready = asyncio.create_task(self._serve_first(wanted))
            self.ready.add_done_callback(retrieve)
        return await self.answer()

    def take_mounts(self, fd: int, task_pid: int, wanted: StepRequest) -> None:
        """The mount namespace of the first task, in which the paths that it names are meant; it is copied."""
        if self.ready is None:
            self._moved = self._outside.follow(fd, task_pid, wanted, policy.site_mounts(self._around.config))
        if wanted.save and self._saving is None:
            ids = [("uid", str(wanted.uid)), ("gid", str(wanted.gid))]
            fields = [*ids, *(("group", str(group)) for group in wanted.groups)]
            self._saving = Saving(self._around.spawner, fields, wanted.save, wanted.tasks, fd)

    def cgroup_channel(self, task_pid: int) -> int:
        """For one task: where it says that Slurm has placed it. The caller closes it."""
        if self._decision is None or not self._decision.delegate:
            return -1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = asyncio.create_task(self._delegate(Connection(ours), task_pid))
        self._delegating.add(task)
        task.add_done_callback(self._delegating.discard)
        return theirs.detach()

    async def _delegate(self, connection: Connection, task_pid: int) -> None:
        """Make the cgroup when the task asks, or never, when its end of the socket is closed."""
        try:
            message = await connection.receive()
            if message is None:
                return
            message.close()
            connection.send([("version", str(protocol.VERSION)), *self._answer_delegate(task_pid)])
        except protocol.ProtocolError:
            log.warning("step=%s: a task asks for a cgroup in no known words", self.name)
        finally:
            connection.close()

    def _answer_delegate(self, task_pid: int) -> list[tuple[str, str]]:
        request = self.request
        try:
            made = delegation.delegate(self.record["cgroup"], task_pid, request.uid, request.gid)
        except OSError as error:
            detail = errors.reason(error.errno) if error.errno else str(error)
            failure = errors.delegate_failed(detail)
            log.warning("step=%s failed: %s", self.name, failure.line())
            return [("status", "error"), ("text", failure.line(self._around.node)), ("hint", failure.hint)]
        self.record["delegated"][str(task_pid)] = made
        self._write_record()
        self.follow(task_pid)
        return [("status", "ok")]

    def save_channel(self) -> int:
        """For one task: where it says that it has ended. The caller closes it; -1 where nothing is saved."""
        if self._saving is None:
            return -1
        return self._saving.channel(self.namespaces(), self._around.node)

    def show_progress(self, show: Callable[[str], None]) -> None:
        self._image.show_progress(show)

    @property
    def joined(self) -> bool:
        return self.ready is not None

    async def answer(self) -> JoinReply:
        assert self.ready is not None
        return await asyncio.shield(self.ready)

    async def _serve_first(self, wanted: StepRequest) -> JoinReply:
        if self._moved or _differs(wanted, self.request):
            await self._begin_anew(wanted)
        return await self._finish()

    async def _begin_anew(self, wanted: StepRequest) -> None:
        self.request = wanted
        if self._early is not None:
            self._early.cancel()
            await asyncio.wait([self._early])
            self._early = None
            self._abandon()

    # --- building ---------------------------------------------------------------------------------------------

    async def _build_early(self) -> None:
        """Decide, then build up to the point where the first task is needed."""
        self._notices.clear()
        self._decision = await self._decide()
        self._limits = self._prepare_limits(self._decision)
        self._settled = self.request
        if self.request.name:
            self._turn = await self._around.named.take_turn(self.request)
            self.record["named"] = self._turn.named.ident if self._turn.named is not None else ""
        try:
            await self._settle_image()
            self._has_turn.set()
            if self._turn is not None and self._turn.running is not None:
                await self._enter(self._turn.running)
            else:
                await self._build()
        except BaseException:
            self._abandon()
            raise
        self._write_record()

    async def _build(self) -> None:
        """A container of the step's own, perhaps on files that are kept."""
        assert self._decision is not None
        config, decision = self._around.config, self._decision
        self._network.kind = decision.network
        kept = self._kept()
        stepd_pid = self.request.stepd
        pid_namespace_of = stepd_pid if stepd.own_namespaces(stepd_pid, self.request.image) else 0
        maps = container_maps(self.request.uid, self.request.gid, self.request.groups, decision.remap_root)
        if maps.dropped:
            count = len(maps.dropped)
            self._notices.append(f"{count} of your groups do not fit into the container's group map, ignoring")
        network = asyncio.create_task(self._network.make(self.request))
        try:
            slurm = await _slurm_client() if decision.slurm else None
            self._commands = os.path.dirname(slurm.commands[0][0]) if slurm else ""
            # Devices move into networks of jobs; a run's is nobody's.
            kind = "none" if self.request.is_run and decision.network == "job" else decision.network
            asker = Asker(self.record_name, self.request.uid, kind, lambda: self._place(network))
            devices = await self._around.devices.select(self.request, asker)
            cgroup_path, leader = self._shown_cgroup(), self._het_leader()
            own_mounts = self._outside.fd >= 0
            node = plan.NodeFacts(self._around.stage, cgroup_path, slurm, devices, leader, pid_namespace_of, own_mounts)
            image = await self._image.get()
            early = plan.make(self._settled, decision, config, maps, node, image, kept)
            self.container = self._new_container(self._turn.beside if self._turn is not None else None)
            self._write_record()
            await self.container.build(early, lambda: self._network.descriptors(network, self.request), self._lent())
            await network
            self.record |= {"devices": self.container.devices, "gpus": self.container.gpus}
            if self._turn is not None and self._turn.beside is not None:
                self.container.environment = list(self._turn.beside.record["environment"])
            self._mark("built")
        except BaseException:
            network.cancel()
            with contextlib.suppress(BaseException):
                await network
            raise

    # --- named containers -------------------------------------------------------------------------------------

    async def _settle_image(self) -> None:
        """The image of a named container is the one that it was created from; one of a registry is got only now."""
        if self._turn is None or self._turn.named is None or self._turn.running is not None:
            return
        self._settled = replace(self.request, image=self._turn.named.image)
        self.record["image"] = self._settled.image
        self._image.forget()
        if not self._settled.image_path():
            self._image.begin(self._settled, self._turn.named.image_key)
            await self._image.get()

    def _kept(self) -> plan.Kept | None:
        """What the root of a named container is made of."""
        if self._turn is None or self._turn.named is None:
            return None
        named, containers = self._turn.named, self._around.named
        beside = self._turn.beside is not None
        return plan.Kept(containers.path(named), containers.backing(named.ident), named.image_key, beside)

    def _lent(self) -> dict[str, Lent]:
        lent: dict[str, Lent] = {"outside": {"mnt": self._outside.fd}} if self._outside.fd >= 0 else {}
        if self._turn is None:
            return lent
        lent["node"] = {"mnt": self._around.named.node_mounts_fd}
        if self._turn.beside is not None:
            lent["beside"] = {"mnt": self._turn.beside.namespaces()["mnt"]}
        return lent

    async def _enter(self, other: Step) -> None:
        """Into the container of another step of the user's: its namespaces, network and identity."""
        assert self._decision is not None
        self._agree_with(other)
        # From now on: the other step may end at any moment, and what is in its container with it.
        self.share(other.namespaces()["user"])
        self._around.devices.holdings.share(self.record_name, other.record_name)
        self._network.share(other)
        self.record |= {key: other.record[key] for key in ("image", "devices", "gpus")}
        self.container = self._new_container(other)
        self.container.gpus = list(other.record["gpus"])
        self._write_record()
        early = plan.enter(self.request)
        await self.container.build(early, self._no_network, {"container": other.namespaces()})
        self.container.environment = list(other.record["environment"])
        self._mark("entered")

    def _new_container(self, other: Step | None) -> Container:
        """On the files of another step's, perhaps: then the image is served as long as either is there."""
        container = Container(self._around.spawner, self._around.images)
        if other is not None and (served := other.served_image()) is not None:
            container.served = served.share()
        return container

    async def _no_network(self) -> list[int]:
        raise ProtocolError("a builder that enters a container wants a network")

    def _agree_with(self, other: Step) -> None:
        """Where the step asks for something else than the running container has: a notice, or an error."""
        request, running = self.request, other.record
        if request.network and self.request.network != running["network"]:
            raise errors.named_other_network(request.name, running["network"], request.network)
        ignored = ["mounts"] if request.mounts else []
        flags = {"remap-root": "remap_root", "mount-home": "mount_home", "writable": "writable"}
        for option, key in flags.items():
            asked = getattr(request, key)
            if asked is not None and asked != running[key]:
                ignored.append(option)
        self._notices += [f"ignoring --container-{name} when attaching to a running container" for name in ignored]
        assert self._decision is not None
        self._decision = replace(self._decision, **{key: running[key] for key in flags.values()})

    def _het_leader(self) -> int:
        """As the prolog told it; 0 for a job that is no part of a het job."""
        job = self._around.jobs.get(self.request.job)
        return job.facts.leader if job is not None else 0

    async def _decide(self) -> policy.Decision:
        config = self._around.config
        if self.request.is_run or not policy.asks_for_job(config):
            return policy.decide(self.request, config)
        job = await self._around.jobs.facts_of(self.request.job, self.request.uid)
        return policy.decide(self.request, config, job.partition, job.account)

    def _slurms_cgroup(self) -> str:
        """Where Slurm keeps the step's tasks; a run stays where its command is."""
        return "" if self.request.is_run else cgroup.step_cgroup(self.request.stepd)

    def _shown_cgroup(self) -> str:
        """What is at /sys/fs/cgroup. A run without limits is in its command's, and the root of all is not shown."""
        if self.record["cgroup"] or not self.request.is_run:
            return str(self.record["cgroup"])
        directory = cgroup.place_of(self.request.stepd)
        return "" if directory.rstrip("/") == cgroup.MOUNT_POINT else directory

    def _prepare_limits(self, decision: policy.Decision) -> StepLimits:
        """Find the step's cgroup; where Slurm has none and there are limits to set, make one, recorded before."""
        limits = StepLimits(decision)
        limits.check()
        self.record["cgroup"] = self._slurms_cgroup()
        self.record["cgroup_id"] = cgroup.ident(self.record["cgroup"])
        if decision.delegate and not (self.record["cgroup"] and self.record["keeper"]):
            raise errors.delegate_without_slurm()
        if limits.needed and not self.record["cgroup"]:
            self.record["cgroup"] = cgroup.own_cgroup(self.record_name)
            self._write_record()
            cgroup.create(self.record["cgroup"])
        return limits

    async def _place(self, network: asyncio.Task[int]) -> Place:
        """Where RDMA devices of the job go: its network, when that has been made."""
        net_fd = await network
        made = await self._around.jobs.network(self.request.job, self.request.uid)
        tenant = self._het_leader() or self.request.job
        return Place(self.request.job, tenant, net_fd, made.vni, made.index, made.ifname)

    async def _finish(self) -> JoinReply:
        """Everything up to the answer for the first task: with a deadline, and a second attempt."""
        deadline = self._around.config.step.build_deadline_seconds
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._image.get()  # Its deadline is another one.
                async with asyncio.timeout(deadline):
                    if self._early is None:
                        await self._around.spawner.ready()
                        self.prepare()
                # However long another step takes to make the container of that name: it has a deadline of its own.
                await self._await_turn()
                async with asyncio.timeout(deadline):
                    assert self._early is not None
                    await self._early
                    await self._build_late()
                    if self._saving is not None:
                        await self._saving.check()
                reply = self._become_joinable()
                self._log_ready(attempt)
                return reply
            except (ChildDied, TimeoutError) as error:
                self._early = None
                self._abandon()
                late = isinstance(error, TimeoutError)
                failure = errors.build_timed_out(deadline) if late else errors.builder_ended("", "killed")
                log.warning("step=%s builder %s (attempt %d)", self.name, "timed out" if late else "died", attempt)
            except errors.EnclosError as error:
                self._fail()
                log.warning("step=%s uid=%d failed: %s", self.name, self.request.uid, error.line())
                raise
            except Exception:
                self._fail()
                log.exception("step=%s failed", self.name)
                raise errors.build_failed("(see the agent's log)", 0) from None
        self._fail()
        raise failure

    async def _await_turn(self) -> None:
        """Until the early part has begun to build, or has failed before."""
        assert self._early is not None
        turn = asyncio.create_task(self._has_turn.wait())
        await asyncio.wait([turn, self._early], return_when=asyncio.FIRST_COMPLETED)
        turn.cancel()

    def _become_joinable(self) -> JoinReply:
        """The container is whole: tasks enter it now, and other steps and programs may."""
        assert self.container is not None and self._decision is not None
        decision = self._decision
        reply = self._answer.make(
            self.request, decision, self.container, self._network, self._commands, self._notices
        )
        self.record |= {key: getattr(decision, key) for key in ("remap_root", "mount_home", "writable")}
        self.record["environment"] = self.container.environment
        self.record["entering"] = self._entering(reply)
        self._set_state("running")
        self.share(self.container.namespaces["user"])
        if self._turn is not None:
            self._around.named.built(self._turn, self, self.container.image_key or str(self.record.get("digest", "")))
            self._turn = None
        return reply

    def _entering(self, reply: JoinReply) -> list[tuple[str, str]]:
        """What makes a process (entering.py) what the step's tasks are, also for an agent after this one."""
        ids = [("gid", str(self.request.gid)), *(("group", str(group)) for group in self.request.groups)]
        return ids + [(key, value) for key, value in reply.fields if key in ENTERING]

    def _fail(self) -> None:
        self._abandon()
        with contextlib.suppress(errors.EnclosError):  # /run is full: perhaps that is why it failed.
            self._set_state("failed")

    async def _build_late(self) -> None:
        """What can only be done now: Slurm has made its directories and started its PMIx server."""
        assert self.container is not None and self._decision is not None and self._limits is not None
        within = cgroup.place_of(self.request.stepd) if self.request.is_run and self._limits.needed else ""
        self.record["limits"] = self._limits.apply(self.record["cgroup"], within)
        request = self.request
        directories = plan.slurm_directories(request, self._het_leader())
        # A run has none.
        server_directory = directories[0] if directories else ""
        starting = self._network.start_relay(request, self.stepd_pidfd, server_directory)
        try:
            clones = clone_directories(directories)
            try:
                if self._turn is not None and self._turn.running is not None:
                    late = plan.late_entered(request, list(clones))
                else:
                    late = plan.late(request, self._decision, list(clones))
                await self.container.finish(late, clones)
            finally:
                for fd in clones.values():
                    os.close(fd)
            if starting is not None:
                await self._network.await_relay(starting)
                self._mark("relayed")
        except BaseException:
            if starting is not None:
                starting.kill()
                starting.close()
            raise

    # --- the end ----------------------------------------------------------------------------------------------

    def namespaces(self) -> Mapping[str, int]:
        return self.container.namespaces if self.container is not None else {}

    def served_image(self) -> ServedImage | None:
        return self.container.served if self.container is not None else None

    def network_namespace(self) -> int:
        return self._network.fd

    async def release(self) -> None:
        if self._saving is not None:
            await self._saving.close()
        for task in (self._early, self.ready):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        self._abandon()
        await self._image.release()
        self._network.close()
        self._outside.close()

    def _abandon(self) -> None:
        """Drop the container and what belongs to it alone. The relay stays: the job's network does, too."""
        self._has_turn.clear()
        if self.container is not None:
            self.container.abandon()
            self.container = None
        self._network.drop()
        self._answer.drop()
        if self._turn is not None:
            self._around.named.given_up(self._turn)
            self._turn = None

    # --- records ----------------------------------------------------------------------------------------------

    def _write_record(self) -> None:
        """Enough for an agent after this one to find the step again."""
        served = self.served_image()
        self.record["server"] = served.process if served is not None else None
        network = self._network
        self.record |= {"network": network.kind, "vni": network.vni}
        self.record |= {"ipv4": network.addresses[0], "ipv6": network.addresses[1]}
        self.record["namespaces"] = {name: identity(fd) for name, fd in self.namespaces().items()}
        self.record["netns"] = identity(network.fd) if network.fd >= 0 else None
        self._around.journal.write(self.record_name, self.record)

    def _set_state(self, state: str) -> None:
        self.record["state"] = state
        self._write_record()

    def _mark(self, name: str) -> None:
        """Remember when this happened, in milliseconds since PREPARE."""
        self._marks.append((name, (time.perf_counter() - self._begin) * 1e3))

    def _log_ready(self, attempt: int) -> None:
        """The agent's line per step: when what happened, and the time of each operation in the builder, in ms."""
        assert self.container is not None
        self._mark("ready")
        asked = [(name, (at - self._begin) * 1e3) for name, at in self.container.marks]
        marks = " ".join(f"{name}@{ms:.1f}" for name, ms in sorted([*self._marks, *asked], key=lambda mark: mark[1]))
        operations = " ".join(f"{name}={ms:.2f}" for name, ms in _summed(self.container.timings))
        image = errors.printable(self.request.image)
        image += f"@{self.record['digest']}" if self.record["digest"] else ""
        log.info("step=%s uid=%d image=%s network=%s tasks=%d attempt=%d %s: %s", self.name, self.request.uid, image,
                 self._network.kind, self.request.tasks, attempt, marks, operations)  # fmt: skip


async def _slurm_client() -> SlurmClient:
    """Looked for in a thread: ldd runs for some milliseconds, and most nodes never need it."""
    from enclos.runtime import slurmclient

    return await asyncio.to_thread(slurmclient.find)


def _record(request: StepRequest) -> dict[str, Any]:
    """What is kept of a step beyond the agent's life, and shown by `enclos ps`."""
    return {
        "job": request.job,
        "step": request.step,
        "uid": request.uid,
        "image": request.image,
        "digest": "",
        "network": "",
        "ipv4": "",
        "ipv6": "",
        "devices": [],
        "gpus": [],
        "environment": [],
        "tasks": request.tasks,
        "state": "building",
        "started": time.time(),
        "stepd": request.stepd,
        "stepd_start": start_time(request.stepd),
        "namespaces": {},
        "netns": None,
        "vni": 0,
        "server": None,
        "cgroup": "",
        "cgroup_id": 0,
        "keeper": _keeper(request),
        "delegated": {},
        "name": request.name,
        "named": "",
        "limits": [],
    }


def _keeper(request: StepRequest) -> tuple[int, int] | None:
    """The process beside slurmstepd whose end is Slurm's SIGKILL (spank/delegate.c), if it is that."""
    with contextlib.suppress(OSError):
        if request.keeper and stepd.parent(request.keeper) == request.stepd:
            return request.keeper, start_time(request.keeper)
    return None


def _differs(wanted: StepRequest, begun: StepRequest) -> bool:
    """What only a task knows for sure."""
    known = [(asked.image and asked.image_path(), asked.mounts, asked.gpus) for asked in (wanted, begun)]
    return known[0] != known[1]


def _summed(timings: list[tuple[str, float]]) -> list[tuple[str, float]]:
    sums: dict[str, float] = {}
    for name, ms in timings:
        sums[name] = sums.get(name, 0.0) + ms
    return list(sums.items())
