"""What a starting agent finds of the agent before it: steps that still run, and things that nobody undid.

Runs once, in the agent, before it serves anybody. Nothing that a running step needs was in the old agent's process,
so adopting is only a matter of taking descriptors again.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any

from enclos.runtime import stepd
from enclos.runtime.agent import Agent
from enclos.runtime.errors import EnclosError
from enclos.runtime.members import Identity, identity, members, open_ancestor
from enclos.runtime.steps import AdoptedStep, start_time

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)

log = logging.getLogger("enclosd")


def adopt(agent: Agent) -> None:
    """Take over the running steps and their jobs' networks; end steps whose slurmstepd is gone."""
    around = agent.around
    networks: dict[int, int] = {}
    for name, record in around.journal.read("step"):
        try:
            step = _adopt_step(agent, record, networks)
        except DAMAGED as error:
            log.warning("journal record %s is damaged (%r), ignoring", name, error)
            step = None
        if step is None or step.record_name != name:
            around.journal.remove(name)
        if step is not None:
            agent.watch(step)
            log.info("step=%s adopted", step.name)
    for name, record in around.journal.read("job"):
        try:
            around.jobs.adopt(record, networks)
        except DAMAGED as error:
            log.warning("journal record %s is damaged (%r), ignoring", name, error)
            around.journal.remove(name)
    around.jobs.evict_strangers(networks)
    for fd in networks.values():
        os.close(fd)


def _adopt_step(agent: Agent, record: dict[str, Any], networks: dict[int, int]) -> AdoptedStep | None:
    """A step from its record; None for one that no task has joined: whoever still wants it sends a JOIN.

    With its slurmstepd gone its pidfd is one of a process that has ended, so that its end is the same as any other's.
    """
    numbers = [int(record[key]) for key in ("job", "step", "uid", "stepd", "stepd_start", "tasks")]
    if record["state"] != "running" or min(numbers) < 0:
        return None
    job, network, started = int(record["job"]), str(record["network"]), float(record["started"])
    namespace, netns = _identity(record["namespace"]), _identity(record["netns"])
    record |= {"job": job, "step": int(record["step"]), "network": network, "started": started}
    namespace_fd, net_fd = _find(namespace, netns if network == "job" and job not in networks else None)
    if net_fd >= 0:
        networks[job] = net_fd
    return AdoptedStep(agent.around, record, [_stepd(record), *_server(record)], namespace_fd)


def _identity(pair: list[int] | None) -> Identity | None:
    if pair is None:
        return None
    device, inode = pair
    return int(device), int(inode)


def _stepd(record: dict[str, Any]) -> int:
    """The pidfd of the step's slurmstepd, or of a process that has ended."""
    pid = record["stepd"]
    try:
        fd = stepd.open_stepd(pid)
        if start_time(pid) == record["stepd_start"]:
            return fd
        os.close(fd)
    except (EnclosError, OSError):
        pass
    return ended_process()


def _server(record: dict[str, Any]) -> list[int]:
    """The pidfd of the squashfuse that serves the step's image, if there is one and it still runs."""
    if record.get("server") is None:
        return []
    pid, started = (int(number) for number in record["server"])
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return []
    with suppress(OSError):
        if start_time(pid) == started:
            return [fd]
    os.close(fd)
    return []


def ended_process() -> int:
    """A pidfd that is readable from the start."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    return fd


def _find(namespace: Identity | None, netns: Identity | None) -> tuple[int, int]:
    """Descriptors of a container's user namespace and of its network, from its processes; -1 where there is none.

    The network has to be the recorded one: its user may have sent a process into the container that still is in
    the node's network, or in another.
    """
    namespace_fd = net_fd = -1
    if namespace is None:
        return namespace_fd, net_fd
    for pid in members(namespace):
        if namespace_fd < 0:
            namespace_fd = open_ancestor(pid, namespace)
        if netns is not None and net_fd < 0:
            net_fd = _open_if(f"/proc/{pid}/ns/net", netns)
    return namespace_fd, net_fd


def _open_if(path: str, wanted: Identity) -> int:
    """A descriptor of the namespace, if it is the wanted one; -1 otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    if identity(fd) == wanted:
        return fd
    os.close(fd)
    return -1
