"""Who has which RDMA device of this node: moves devices into networks of jobs and back, one after the other.

A device that has left the node's namespace is in the journal from before it leaves until after it is back, so that an
agent after this one finds it again: by its GUID, wherever the kernel has put it meanwhile. A device is a job's as long
as one of its steps has it. Runs in the agent's event loop; the kernel's part (enclos.netns.rdmamove) waits in threads.
Which devices a step may have is rdma.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from enclos.netns import facts, names, rdmamove
from enclos.netns import rdma as node_rdma
from enclos.netns.rdma import NodeDevice
from enclos.netns.rdmamove import Address, Movable
from enclos.runtime import errors
from enclos.runtime.devices import rdma, sitehook, vfs
from enclos.runtime.devices.cdi import Device
from enclos.runtime.devices.rdma import Candidate
from enclos.runtime.journal import Journal
from enclos.runtime.members import Identity, find_network_namespace, identity
from enclos.runtime.settings import Config, Rdma

log = logging.getLogger("enclosd")
T = TypeVar("T")

DAMAGED = (KeyError, TypeError, ValueError)
RAIL_BITS = 3
"""Interfaces of a network on one node that get an IPv4 address: each has a part of rdma.ipv4."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where devices of a job go on this node: its network, and its tenant, which all parts of a het job are together.

    The descriptor stays the giver's.
    """

    job: int
    tenant: int
    netns_fd: int
    vni: int
    index: int
    ifname: str


@dataclass(frozen=True, slots=True)
class Asker:
    """The step that wants devices: the name of its record, its user, its network, and how to get to that."""

    step: str
    uid: int
    network: str
    place: Callable[[], Awaitable[Place]]


@dataclass(slots=True)
class Held:
    """A device that a job has. `rail` is its place among those of the job; `function` is set for one of a pool."""

    movable: Movable
    job: int
    tenant: int
    vni: int
    rail: int
    netns: Identity
    netns_fd: int
    steps: set[str] = field(default_factory=set)
    function: vfs.Function | None = None

    @property
    def record_name(self) -> str:
        return f"rdma.{self.movable.guid:016x}"

    def record(self) -> dict[str, Any]:
        """Enough for an agent after this one to bring it back."""
        function = list(self.function) if self.function else None
        numbers = {"job": self.job, "tenant": self.tenant, "vni": self.vni, "rail": self.rail}
        rest = {"netns": list(self.netns), "function": function, "steps": sorted(self.steps)}
        return {**self.movable.record(), **numbers, **rest}


def of_record(found: dict[str, Any]) -> Held:
    """What `Held.record` made, without a descriptor; raises one of DAMAGED for anything else."""
    device, inode = found["netns"]
    function = None
    if found["function"] is not None:
        name, physical, number = found["function"]
        function = vfs.Function(str(name), str(physical), int(number))
    return Held(
        Movable.of_record(found),
        int(found["job"]),
        int(found["tenant"]),
        int(found["vni"]),
        int(found["rail"]),
        (int(device), int(inode)),
        -1,
        {str(step) for step in found["steps"]},
        function,
    )


class Holdings:
    """The RDMA devices of the node that steps have."""

    def __init__(self, config: Config, journal: Journal, underlay_ifindex: int) -> None:
        self._settings = config.rdma
        self._deadline = config.step.build_deadline_seconds
        self._journal = journal
        self._underlay = underlay_ifindex
        self._held: dict[int, Held] = {}
        # Steps on the node's network, by the name of each device whose node they have.
        self._shared: dict[str, set[str]] = {}
        self._turn = asyncio.Lock()
        # What the last look at the node's devices found: why some cannot move, and which have no link.
        self._busy: dict[str, str] = {}
        self._dark: set[str] = set()
        self._functions: dict[str, vfs.Function] = {}

    async def take(self, text: str, asked: bool, asker: Asker) -> tuple[Device, ...]:
        """The devices for a step, moved into its network where the site wants that.

        Asking again for the same step gives the same.

        Raises:
            EnclosError: see rdma.check, rdma.choose, rdma.choose_moving; rdma_move_failed, rdma_soft_failed,
                rdma_hook_failed, journal_failed. What was moved for the step is back then.
        """
        mode = self._settings.mode
        kernel = node_rdma.mode()
        rdma.check(text, asker.network, mode, kernel)
        if asker.network == "job" and mode == "soft":
            place = await asker.place()
            # Steps of one job that start together: the second one finds what the first one has made.
            async with self._turn:
                return await self._soft(text, asker.uid, place)
        async with self._turn:
            await self._reclaim()
            if asker.network == "job" and mode == "exclusive":
                return await self._take_moving(text, asker)
            found = choose_staying(text, asked, self._settings, self._held.values())
            for device in found:
                self._shared.setdefault(device.name, set()).add(asker.step)
            return found

    # --- Soft-RoCE --------------------------------------------------------------------------------------------

    async def _soft(self, text: str, uid: int, place: Place) -> tuple[Device, ...]:
        """The job's own device on its overlay interface, made by its first step; it ends with the interface.

        In the kernel's shared mode whoever may open its node sends into the job's network, from any namespace: it
        becomes its user's alone.
        """
        # Names are the machine's, also where several nodes of a trial cluster share one.
        name = f"enclos{place.job}n{place.index}"
        rdma.choose_moving(text, [name], [Candidate(name)])
        try:
            await asyncio.to_thread(rdmamove.make_soft, name, place.ifname, place.netns_fd)
            found = await asyncio.to_thread(node_rdma.find_one, name, place.netns_fd)
            if found.node:
                os.chown(found.node, uid, 0)
                os.chmod(found.node, 0o600)
        except OSError as error:
            raise errors.rdma_soft_failed(text, error.errno or 0, getattr(error, "text", "")) from error
        if not found.node:
            raise errors.rdma_no_node(text, name)
        return (rdma.describe(found),)

    # --- devices that move ------------------------------------------------------------------------------------

    async def _take_moving(self, text: str, asker: Asker) -> tuple[Device, ...]:
        place = await asker.place()
        known = {movable.name: movable for movable in await self._spare()}
        listed = _listed(self._settings, self._held.values())
        chosen = rdma.choose_moving(text, listed, self._candidates(known, place.job))
        moved: list[Held] = []
        try:
            for name in chosen:
                if (held := self._by_name(name)) is None:
                    held = self._new(known[name], place)
                    moved.append(held)
                    await self._move(held, asker.step, place)
                elif asker.step not in held.steps:
                    held.steps.add(asker.step)
                    self._journal.write(held.record_name, held.record())
            found = [await asyncio.to_thread(node_rdma.find_one, name, place.netns_fd) for name in chosen]
            for device in found:
                if not device.node:
                    raise errors.rdma_no_node(text, device.name)
        except BaseException as error:
            for held in moved:
                await asyncio.shield(self._return(held))
            if isinstance(error, facts.NetworkFact):
                raise errors.rdma_move_failed(text, str(error)) from error
            raise
        return tuple(rdma.describe(device) for device in found)

    async def _spare(self) -> list[Movable]:
        """The devices for containers that the node has now, as far as it can do without them."""
        self._busy.clear()
        self._dark.clear()
        found: list[Movable] = []
        for device in self._order(node_rdma.find().devices):
            if steps := self._shared.get(device.name):
                self._busy[device.name] = f"step {_short(min(steps))} on the node's network has it"
                continue
            try:
                movable = await asyncio.to_thread(rdmamove.inspect, device.name, self._underlay)
            except facts.DeviceInUse as fact:
                self._busy[device.name] = fact.reason
            except facts.DeviceMissing:
                continue
            else:
                found.append(movable)
                if not device.active and all(row.up for row in movable.interfaces):
                    self._dark.add(device.name)
        return found

    def _order(self, devices: Iterable[NodeDevice]) -> list[NodeDevice]:
        """Those of rdma.devices by name, then the pools', spread over their physical functions."""
        by_name = {device.name: device for device in devices}
        plain = [name for name in by_name if rdma.is_listed(name, self._settings.devices)]
        given = [held.function for held in self._held.values() if held.function is not None]
        functions = vfs.find(self._settings.pools) if self._settings.pools else []
        self._functions = {function.name: function for function in functions}
        pooled = [function.name for function in vfs.spread(functions, given)]
        return [by_name[name] for name in dict.fromkeys((*plain, *pooled)) if name in by_name]

    def _candidates(self, known: Mapping[str, Movable], job: int) -> list[Candidate]:
        away = [
            Candidate(held.movable.name, held.job == job, busy="" if held.job == job else f"job {held.job} has it")
            for held in self._held.values()
        ]
        here = [Candidate(name, ready=name not in self._dark) for name in known]
        return [*away, *here, *(Candidate(name, busy=reason) for name, reason in self._busy.items())]

    def _new(self, movable: Movable, place: Place) -> Held:
        rails = {held.rail for held in self._held.values() if held.job == place.job}
        rail = next(number for number in range(len(rails) + 1) if number not in rails)
        function = self._functions.get(movable.name)
        fd = os.dup(place.netns_fd)
        return Held(movable, place.job, place.tenant, place.vni, rail, identity(fd), fd, set(), function)

    async def _move(self, held: Held, step: str, place: Place) -> None:
        held.steps.add(step)
        self._held[held.movable.guid] = held
        self._journal.write(held.record_name, held.record())
        await self._tell_site("attach", held)
        addresses = self._addresses(held.vni, place.index, held.rail)
        await _in_thread(lambda: rdmamove.move(held.movable, held.netns_fd, addresses))
        log.info("job=%d RDMA device %s moved into its network", held.job, held.movable.name)

    def _addresses(self, vni: int, index: int, rail: int) -> list[Address]:
        """Of the device's interface: as on the overlay, from blocks of their own, each rail a part."""
        plan = names.address_plan(self._settings.ipv4, self._settings.ipv6, vni)
        found = []
        prefix = plan.prefix4 + RAIL_BITS
        if rail < 1 << RAIL_BITS and index < (1 << (32 - prefix)) - 2:
            found.append(Address((plan.base4 + (rail << (32 - prefix)) + 1 + index).to_bytes(4, "big"), prefix))
        found.append(Address((plan.ipv6_int(index) | rail << 24).to_bytes(16, "big"), 104))
        return found

    def share(self, step: str, other: str) -> None:
        """A step enters the container of another one: it has what that has, also when that has ended.

        Raises:
            EnclosError: journal_failed.
        """
        for steps in self._shared.values():
            if other in steps:
                steps.add(step)
        for held in self._held.values():
            if other in held.steps and step not in held.steps:
                held.steps.add(step)
                self._journal.write(held.record_name, held.record())

    def interfaces(self, step: str) -> list[str]:
        """The names of the network interfaces that came to a step's network with its devices."""
        own = [held for held in self._held.values() if step in held.steps]
        return [row.name for held in own for row in held.movable.interfaces]

    async def give_back(self, step: str) -> None:
        """A step has ended: what no other step of its job has goes back to the node. An unknown step is fine."""
        for name in [name for name, steps in self._shared.items() if step in steps]:
            self._shared[name].discard(step)
            if not self._shared[name]:
                del self._shared[name]
        if not any(step in held.steps for held in self._held.values()):
            return
        async with self._turn:
            for held in [held for held in self._held.values() if step in held.steps]:
                held.steps.discard(step)
                if not held.steps:
                    await self._return(held)
                    continue
                with contextlib.suppress(errors.EnclosError):  # The old record names a step too many: no harm.
                    self._journal.write(held.record_name, held.record())

    async def _return(self, held: Held) -> None:
        """Back to the node, and out of the records; what cannot be brought back now is tried again later."""
        held.steps.clear()
        try:
            back = await _in_thread(lambda: _bring_back(held))
        except (facts.NetworkFact, OSError) as error:
            log.error("job=%d RDMA device %s not brought back: %s", held.job, held.movable.name, error)
            return
        if not back:
            log.warning("job=%d RDMA device %s is not back yet", held.job, held.movable.name)
            return
        if held.netns_fd >= 0:
            os.close(held.netns_fd)
        try:
            await self._tell_site("detach", held)
        except errors.EnclosError as error:
            name = held.movable.name
            log.error("job=%d RDMA device %s is back, but the site's hook failed: %s", held.job, name, error)
        self._held.pop(held.movable.guid, None)
        self._journal.remove(held.record_name)
        log.info("job=%d RDMA device %s is back", held.job, held.movable.name)

    async def _reclaim(self) -> None:
        """Bring back what is nobody's: of an agent before this one, or what failed the last time."""
        for held in [held for held in self._held.values() if not held.steps]:
            await self._return(held)

    async def _tell_site(self, event: str, held: Held) -> None:
        if self._settings.hook:
            numbers = sitehook.Numbers(held.tenant, held.job, held.vni)
            await sitehook.run(self._settings.hook, event, numbers, held.movable, self._deadline / 2)

    def _by_name(self, name: str) -> Held | None:
        return next((held for held in self._held.values() if held.movable.name == name), None)

    # --- after a restart of the agent -------------------------------------------------------------------------

    def adopt(self, running: Iterable[str], networks: Mapping[int, int]) -> None:
        """Take over what an agent before this one has moved.

        Args:
            running: the names of the steps' records that were adopted.
            networks: network namespaces of jobs, which stay the caller's.
        """
        steps = set(running)
        for name, record in self._journal.read("rdma"):
            try:
                held = of_record(record)
            except DAMAGED as error:
                log.warning("journal record %s is damaged (%r), ignoring", name, error)
                self._journal.remove(name)
                continue
            held.steps &= steps
            fd = networks.get(held.job, -1)
            if fd >= 0 and identity(fd) == held.netns:
                held.netns_fd = os.dup(fd)
            self._held[held.movable.guid] = held

    async def reclaim(self) -> None:
        """Bring back what no running step has: at the agent's start, and by `enclos gc`."""
        async with self._turn:
            await self._reclaim()


async def _in_thread(work: Callable[[], T]) -> T:
    """The kernel does not stop in the middle of a move: who is cancelled waits for its end before he goes on."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def choose_staying(text: str, asked: bool, settings: Rdma, away: Collection[Held] = ()) -> tuple[Device, ...]:
    """Devices whose nodes a step gets, and which stay where they are.

    Args:
        away: those that jobs have.

    Raises:
        EnclosError: rdma_in_use; see rdma.choose.
    """
    by_name = {held.movable.name: held for held in away}
    for name in rdma.named(text) or ():
        if name in by_name:
            raise errors.rdma_in_use(text, name, f"job {by_name[name].job} has it")
    return rdma.choose(text, asked, _listed(settings, away), node_rdma.find())


def _listed(settings: Rdma, away: Collection[Held]) -> list[str]:
    """What is for containers: patterns, and the names of the pools' functions."""
    pooled = [function.name for function in vfs.find(settings.pools)] if settings.pools else []
    return [*settings.devices, *pooled, *(held.function.name for held in away if held.function is not None)]


def _bring_back(held: Held) -> bool:
    """In a thread. Without a descriptor the namespace is looked for: somebody outside the job may hold it."""
    if rdmamove.settle(held.movable):
        return True
    fd = held.netns_fd if held.netns_fd >= 0 else find_network_namespace(held.netns)
    if fd < 0:
        return False
    try:
        return rdmamove.bring_back(held.movable, fd)
    finally:
        if fd != held.netns_fd:
            os.close(fd)


def _short(record_name: str) -> str:
    """`JOB.STEP` of a step's record."""
    return ".".join(record_name.split(".")[1:3])
