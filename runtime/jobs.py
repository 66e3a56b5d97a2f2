"""The jobs of this node: what slurmctld said of them, and the network namespace that their steps share.

A job's network is made by its first step that asks for it, and removed by the job's epilog, by explicit orders, so
that a descriptor that a user keeps open can't hold it. Runs in the agent; sends no netlink itself (`enclos.netns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from enclos.netns import facts, guard, names, overlay, underlay
from enclos.netns.spec import OverlaySpec, Peer
from enclos.runtime import controller, errors, etcfiles, hostlist
from enclos.runtime.controller import JobFacts
from enclos.runtime.journal import Journal
from enclos.runtime.named import NamedContainers
from enclos.runtime.settings import Config
from enclos.runtime.spawner import ChildDied, Spawner

log = logging.getLogger("enclosd")

PROLOG_SECONDS = 0.3
# Names and addresses travel in packets of 128 KiB, and a name has at most 64 bytes.
NAMES_PER_CHILD = 1000


@dataclass(slots=True)
class JobNetwork:
    """A job's network on this node.

    `netns_fd` is the agent's own descriptor, by which the network is also removed. `hosts_fd` is a memfd with
    the /etc/hosts of its containers: with 10,000 nodes it is larger than a packet, and it is made once.
    """

    netns_fd: int
    vni: int
    ifname: str
    addresses: tuple[str, ...]
    own: tuple[str, str]
    hosts_fd: int
    index: int = 0

    def close(self) -> None:
        for fd in (self.netns_fd, self.hosts_fd):
            if fd >= 0:
                os.close(fd)


class Job:
    """One job on this node."""

    def __init__(self, job_facts: JobFacts) -> None:
        self.facts = job_facts
        self.network: JobNetwork | None = None
        self.recorded: dict[str, Any] | None = None
        self.making = asyncio.Lock()
        # The epilog was here: what is being made meanwhile would be nobody's.
        self.ended = False


class Jobs:
    """All jobs that have been announced and have not ended."""

    def __init__(
        self,
        node: str,
        config: Config,
        journal: Journal,
        spawner: Spawner,
        gate: guard.Guard | None,
        found: underlay.Underlay | None,
        named: NamedContainers,
    ) -> None:
        """`gate` and `found` are None on a machine without Slurm: it has no tunnels."""
        self._node = node
        self._config = config
        self._journal = journal
        self._spawner = spawner
        self._guard = gate
        self._underlay = found
        self._jobs: dict[int, Job] = {}
        self._expected: dict[int, asyncio.Event] = {}
        self._named = named
        # slurmctld does not have them any more, but a step of them is still there.
        self._orphans: set[int] = set()

    async def announce(self, job_facts: JobFacts) -> None:
        """Take the facts of a job from its prolog.

        A slurmctld that lost its state gives ids again: what is here of another user's job is not the new one's.
        """
        known = self._jobs.get(job_facts.job)
        if known is not None and known.facts.uid != job_facts.uid:
            log.warning("job=%d is another user's now, the old one's epilog was missed", job_facts.job)
            await self.end(job_facts.job)
        self.learn(job_facts)

    def learn(self, job_facts: JobFacts) -> None:
        """Take the facts of a job; a requeued or resized job replaces what was known, its network stays."""
        job = self._jobs.get(job_facts.job)
        if job is None:
            job = self._jobs[job_facts.job] = Job(job_facts)
        if (expected := self._expected.get(job_facts.job)) is not None:
            expected.set()
        job.facts = job_facts
        self._orphans.discard(job_facts.job)
        self._record(job, job.recorded)

    def get(self, job_id: int) -> Job | None:
        return self._jobs.get(job_id)

    async def end(self, job_id: int) -> None:
        """Remove the job's network and its named containers at once, and forget the job; an unknown job is fine."""
        self._orphans.discard(job_id)
        job = self._jobs.pop(job_id, None)
        if job is not None:
            job.ended = True
            async with job.making:
                await self._remove_network(job)
        await self._named.end_job(job_id)
        if job_id not in self._jobs:
            self._journal.remove(f"job.{job_id}")

    async def reconcile(self, busy: Callable[[], set[int]]) -> list[int] | None:
        """End the jobs that slurmctld no longer has on this node: their epilog was missed.

        Args:
            busy: tells the jobs with steps here, which are ended only when their last step is (`step_ended`).

        Returns:
            The jobs that were ended; None when slurmctld does not answer.
        """
        known = set(self._jobs) | self._named.jobs()
        present = await controller.ask_node(self._node) if known else set()
        if present is None:
            return None
        gone = sorted((known - present) & (self._jobs.keys() | self._named.jobs()))
        self._orphans.update(gone)
        return [job_id for job_id in gone if await self._end_orphan(job_id, busy())]

    async def step_ended(self, job_id: int, busy: set[int]) -> None:
        """A step of this job is gone from the node; `busy` as in `reconcile`."""
        await self._end_orphan(job_id, busy)

    async def _end_orphan(self, job_id: int, busy: set[int]) -> bool:
        if job_id not in self._orphans or job_id in busy:
            return False
        log.info("job=%d is gone, its epilog was missed", job_id)
        await self.end(job_id)
        return True

    async def facts_of(self, job_id: int, uid: int) -> JobFacts:
        """What slurmctld said of a job of this user; raises EnclosError no_job_facts."""
        job = self._jobs.get(job_id)
        if job is None or job.facts.uid != uid:
            job = await self._announced(job_id)
        if job.facts.uid != uid:
            raise errors.no_job_facts(job_id)
        return job.facts

    def alone(self) -> JobNetwork:
        """A network for one container of `enclos run`: as a job's on one node, and it needs no other. The caller's.

        Raises:
            EnclosError: network_failed.
        """
        settings = self._config.network
        spec = OverlaySpec(
            vni=names.ALONE_VNI,
            port=settings.port,
            ifname=settings.ifname,
            mtu=overlay.ALONE_MTU,
            underlay_ifindex=0,
            local="",
            index=0,
            peers=(Peer(0, self._node, ""),),
            ipv4=settings.ipv4,
            ipv6=settings.ipv6,
        )
        try:
            return _network(overlay.create_alone(spec), spec)
        except facts.NetworkFact as fact:
            raise word(fact) from fact

    async def network(self, job_id: int, uid: int) -> JobNetwork:
        """The job's network, made now if no step of the job has asked for it before.

        Args:
            uid: whose step asks; nobody but the job's user gets into it.

        Raises:
            EnclosError: no_job_facts, parts_unknown, not_in_nodelist, name_unknown, underlay_not_found, vni_in_use,
                network_failed, no_tunnels.
        """
        if self._guard is None:
            raise errors.no_tunnels()
        job = self._jobs.get(job_id)
        if job is None or job.facts.uid != uid:
            job = await self._announced(job_id)
        if job.facts.uid != uid:
            raise errors.no_job_facts(job_id)
        async with job.making:
            if job.network is None or job.network.hosts_fd < 0:
                try:
                    spec = await self._spec(job)
                except facts.NetworkFact as fact:
                    raise word(fact) from fact
                if job.ended:
                    raise errors.no_job_facts(job_id)
                if job.network is None:
                    job.network = self._make_network(job, spec)
                else:
                    # Adopted from an agent before this one: the records leave out what can be computed again.
                    job.network = _network(job.network.netns_fd, spec)
            return job.network

    async def _announced(self, job_id: int) -> Job:
        """Wait a moment for the prolog, then ask slurmctld.

        With PrologFlags=NoHold the step may be here before its job is announced, or the prolog may be skipped.
        """
        announced = self._expected.setdefault(job_id, asyncio.Event())
        try:
            async with asyncio.timeout(PROLOG_SECONDS):
                await announced.wait()
        except TimeoutError:
            log.warning("job=%d was not announced by a prolog; asking slurmctld", job_id)
            if (job_facts := await controller.ask_job(job_id)) is not None:
                await self.announce(job_facts)
        finally:
            self._expected.pop(job_id, None)
        job = self._jobs.get(job_id)
        if job is None:
            raise errors.no_job_facts(job_id)
        return job

    def _make_network(self, job: Job, spec: OverlaySpec) -> JobNetwork:
        begin = time.perf_counter()
        assert self._guard is not None
        try:
            addresses = tuple(peer.underlay for peer in spec.peers if peer.index != spec.index)
            self._record(job, {"vni": spec.vni, "ifname": spec.ifname, "addresses": addresses})
            self._guard.admit(spec.vni, addresses)
            try:
                netns_fd = overlay.create(spec)
            except Exception:
                self._guard.evict(spec.vni, addresses)
                raise
        except facts.NetworkFact as fact:
            with contextlib.suppress(errors.EnclosError):
                self._record(job, None)
            raise word(fact) from fact
        log.info("job=%d network made: vni=%d nodes=%d in %.1f ms", job.facts.job, spec.vni, len(spec.peers),
                 (time.perf_counter() - begin) * 1e3)  # fmt: skip
        return _network(netns_fd, spec)

    async def _spec(self, job: Job) -> OverlaySpec:
        """The whole network as this node has to know it; every node computes the same."""
        node_names = await self._node_names(job.facts)
        settings = self._config.network
        assert self._underlay is not None
        addresses = await self._resolve(node_names, settings.underlay.name)
        nodes = enumerate(zip(node_names, addresses, strict=True))
        peers = tuple(Peer(index, name, address) for index, (name, address) in nodes)
        return OverlaySpec(
            vni=names.job_vni(job.facts.leader or job.facts.job),
            port=settings.port,
            ifname=settings.ifname,
            mtu=self._underlay.overlay_mtu,
            underlay_ifindex=self._underlay.ifindex,
            local=self._underlay.address,
            index=node_names.index(self._node),
            peers=peers,
            ipv4=settings.ipv4,
            ipv6=settings.ipv6,
        )

    async def _node_names(self, job_facts: JobFacts) -> list[str]:
        node_names = _expanded(job_facts)
        if self._node not in node_names:
            raise errors.not_in_nodelist(self._node)
        return await self._names_of_parts(job_facts) if job_facts.leader else node_names

    async def _names_of_parts(self, job_facts: JobFacts) -> list[str]:
        """The nodes of all parts of a heterogeneous job, part by part: they are one network.

        A part's prolog tells its own nodes only. Which other jobs are parts of the same one is slurmctld's word
        alone, and so is that this job is one.
        """
        parts = await controller.ask_parts(job_facts.leader) or []
        if any(part.uid != job_facts.uid for part in parts) or job_facts.job not in {part.job for part in parts}:
            raise errors.parts_unknown(job_facts.leader)
        found = list(dict.fromkeys(name for part in parts for name in _expanded(part)))
        if self._node not in found:
            raise errors.parts_unknown(job_facts.leader)
        return found

    async def _resolve(self, node_names: list[str], pattern: str) -> list[str]:
        """From /etc/hosts at once, else by a child that may wait for DNS."""
        assert self._underlay is not None
        family = socket.AF_INET6 if self._underlay.ipv6 else socket.AF_INET
        known = underlay.known_addresses(node_names, pattern, family)
        if all(known):
            return known
        found: list[str] = []
        for start in range(0, len(node_names), NAMES_PER_CHILD):
            found += await self._ask_resolver(node_names[start : start + NAMES_PER_CHILD], pattern, family)
        return found

    async def _ask_resolver(self, node_names: list[str], pattern: str, family: int) -> list[str]:
        wanted = [("pattern", pattern), ("family", str(int(family))), *(("name", name) for name in node_names)]
        child = self._spawner.spawn("resolve", wanted)
        try:
            with await child.receive() as answer:
                if answer.get("state") != "done":
                    raise errors.name_unknown(answer.get("name"))
                return answer.all("address")
        except ChildDied as error:
            raise errors.name_unknown(node_names[0]) from error
        finally:
            child.close()

    async def _remove_network(self, job: Job) -> None:
        network, job.network = job.network, None
        if network is None:
            return
        try:
            # 20 to 40 ms of waiting in the kernel; a thread of its own has a network namespace of its own.
            await asyncio.to_thread(overlay.remove, network.netns_fd, network.ifname)
        except (facts.NetworkFact, OSError) as error:
            log.error("job=%d network not removed: %s", job.facts.job, error)
        self._evict(job.facts.job, network.vni, network.addresses)
        network.close()

    def _evict(self, job_id: int, vni: int, addresses: Sequence[str]) -> None:
        if self._guard is None:
            return
        try:
            self._guard.evict(vni, addresses)
        except (facts.NetworkFact, OSError) as error:
            log.error("job=%d peers not removed from the guard: %s", job_id, error)

    def _record(self, job: Job, network: dict[str, Any] | None) -> None:
        job.recorded = network
        self._journal.write(f"job.{job.facts.job}", {"facts": asdict(job.facts), "network": network})

    # --- after a restart of the agent -------------------------------------------------------------------------

    def adopt(self, record: dict[str, Any], networks: dict[int, int]) -> None:
        """Take over a job of an agent before this one.

        Args:
            networks: by job, its network namespace, held by a step that still runs; what is taken over is removed.
                For a job that is not in it the namespace is gone with the old agent, and what that left in the
                node's guard is removed.
        """
        job = Job(JobFacts(**record["facts"]))
        job_id = job.facts.job
        network = record["network"]
        if network is None:
            self._jobs[job_id] = job
            return
        made = JobNetwork(-1, int(network["vni"]), str(network["ifname"]), tuple(network["addresses"]), ("", ""), -1)
        self._jobs[job_id] = job
        if job_id not in networks:
            try:
                overlay.remove_lost(made.vni, made.ifname)
            except facts.NetworkFact as fact:
                log.error("job=%d lost network not removed: %s", job_id, fact)
            self._evict(job_id, made.vni, made.addresses)
            with contextlib.suppress(errors.EnclosError):
                self._record(job, None)
            return
        job.recorded = network
        assert self._guard is not None, "a job that is known shows that Slurm is here"
        try:
            self._guard.admit(made.vni, made.addresses)
        except (facts.NetworkFact, OSError) as error:
            log.error("job=%d peers not admitted by the guard: %s", job_id, error)
        made.netns_fd = networks.pop(job_id)
        job.network = made

    def evict_strangers(self, others: Iterable[int]) -> None:
        """Remove from the node's guard what belongs to no job that was adopted.

        Args:
            others: VNIs of networks in which a step runs, whose job's own record was lost.
        """
        if self._guard is None:
            return
        known = set(others)
        known |= {job.network.vni for job in self._jobs.values() if job.network is not None}
        for vni, address in sorted(self._guard.elements()):
            if vni not in known:
                family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
                self._evict(0, vni, [socket.inet_ntop(family, address)])


def _expanded(job_facts: JobFacts) -> list[str]:
    """The names in a job's node list."""
    try:
        return hostlist.expand(job_facts.nodelist)
    except hostlist.BadHostlist as error:
        raise errors.no_job_facts(job_facts.job) from error


def _network(netns_fd: int, spec: OverlaySpec) -> JobNetwork:
    addresses = tuple(peer.underlay for peer in spec.peers if peer.index != spec.index)
    own = spec.plan.ipv4(spec.index), spec.plan.ipv6(spec.index)
    return JobNetwork(netns_fd, spec.vni, spec.ifname, addresses, own, _hosts_file(spec), spec.index)


def _hosts_file(spec: OverlaySpec) -> int:
    """A memfd with the node's /etc/hosts, in which the names of the job's nodes lead to the overlay."""
    try:
        with open("/etc/hosts", "rb") as file:
            text = file.read()
    except FileNotFoundError:
        text = b""
    fd = os.memfd_create("enclos-hosts", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(etcfiles.hosts(text, overlay.hosts_lines(spec).splitlines()))
    return fd


def word(fact: facts.NetworkFact) -> errors.EnclosError:
    """A fact of the network in words for a person."""
    match fact:
        case facts.VniInUse():
            return errors.vni_in_use(fact.vni)
        case facts.NameUnknown():
            return errors.name_unknown(fact.name)
        case facts.UnderlayMissing():
            return errors.underlay_not_found(str(fact))
        case facts.RelayPortTaken():
            return errors.relay_port_taken(fact.address, fact.port)
        case facts.KernelRefused():
            return errors.network_failed(fact.errno or 0, fact.object + (f": {fact.text}" if fact.text else ""))
        case _:
            return errors.network_failed(0, str(fact))
