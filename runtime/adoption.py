"""What a starting agent finds of the agent before it: steps that still run, and things that nobody undid.

Runs once, in the agent, before it serves anybody. Nothing that a running step needs was in the old agent's process,
so adopting is only a matter of taking descriptors again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from enclos.runtime import cgroup, stepd
from enclos.runtime.agent import Agent
from enclos.runtime.errors import EnclosError
from enclos.runtime.images.served import ServedImage
from enclos.runtime.members import Identity, members, open_ancestor, open_if
from enclos.runtime.request import RUN_JOB
from enclos.runtime.steps import AdoptedStep, start_time

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)

log = logging.getLogger("enclosd")


def adopt(agent: Agent) -> None:
    """Take over the running steps and their jobs' networks; end steps whose slurmstepd is gone."""
    around = agent.around
    around.named.adopt_all()
    networks: dict[int, int] = {}
    served: dict[tuple[int, int], ServedImage] = {}
    vnis: set[int] = set()
    for name, record in around.journal.read("step"):
        try:
            step = _adopt_step(agent, record, networks, served)
        except DAMAGED as error:
            log.warning("journal record %s is damaged (%r), ignoring", name, error)
            step = None
        if step is None:
            _remove_cgroup(record)
        if step is None or step.record_name != name:
            around.journal.remove(name)
        if step is not None:
            agent.watch(step)
            vnis.add(int(step.record.get("vni", 0)))
            if (user_fd := step.user_namespace()) >= 0:
                step.share(user_fd)
            around.named.rejoin(step, str(step.record.get("named", "")))
            log.info("step=%s adopted", step.name)
    around.devices.holdings.adopt(agent.records(), networks)
    for name, record in around.journal.read("job"):
        try:
            around.jobs.adopt(record, networks)
        except DAMAGED as error:
            log.warning("journal record %s is damaged (%r), ignoring", name, error)
            around.journal.remove(name)
    around.jobs.evict_strangers(vnis)
    for fd in networks.values():
        os.close(fd)


def _adopt_step(
    agent: Agent,
    record: dict[str, Any],
    networks: dict[int, int],
    served: dict[tuple[int, int], ServedImage],
) -> AdoptedStep | None:
    """A step from its record; None for one that no task has joined: whoever still wants it sends a JOIN.

    With its slurmstepd gone its pidfd is one of a process that has ended, so that its end is the same as any other's.
    """
    numbers = [int(record[key]) for key in ("job", "step", "uid", "stepd", "stepd_start", "tasks")]
    if record["state"] != "running" or min(numbers) < 0:
        return None
    job, network, started = int(record["job"]), str(record["network"]), float(record["started"])
    wanted = {kind: _identity(pair) for kind, pair in record["namespaces"].items()}
    netns = _identity(record["netns"])
    record |= {"job": job, "step": int(record["step"]), "network": network, "started": started}
    found = _find(wanted | ({"net": netns} if netns is not None else {}))
    net_fd = found.pop("net", -1)
    if net_fd >= 0 and network == "job" and job not in networks and job != RUN_JOB:
        networks[job] = os.dup(net_fd)
    return AdoptedStep(agent.around, record, _stepd(record), found, net_fd, _served(record, served))


def _remove_cgroup(record: dict[str, Any]) -> None:
    """Of a step that was never joined: it is in nobody's way, and empty."""
    directory = str(record.get("cgroup", ""))
    if cgroup.is_own(directory) and ".." not in directory:
        cgroup.remove(directory)


def _identity(pair: Sequence[int] | None) -> Identity | None:
    if pair is None:
        return None
    device, inode = pair
    return int(device), int(inode)


def _stepd(record: dict[str, Any]) -> int:
    """The pidfd of the step's slurmstepd, or of a process that has ended."""
    pid = record["stepd"]
    try:
        # Of a run it is by now its user's.
        fd = os.pidfd_open(pid) if record["job"] == RUN_JOB else stepd.open_stepd(pid)
        if start_time(pid) == record["stepd_start"]:
            return fd
        os.close(fd)
    except (EnclosError, OSError):
        pass
    return ended_process()


def _served(record: dict[str, Any], found: dict[tuple[int, int], ServedImage]) -> ServedImage | None:
    """A share of the squashfuse that serves the step's image, if there is one and it still runs."""
    if record.get("server") is None:
        return None
    pid, started = (int(number) for number in record["server"])
    if (pid, started) in found:
        return found[pid, started].share()
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return None
    with suppress(OSError):
        if start_time(pid) == started:
            found[pid, started] = ServedImage(fd, (pid, started))
            return found[pid, started]
    os.close(fd)
    return None


def ended_process() -> int:
    """A pidfd that is readable from the start."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    return fd


def _find(wanted: Mapping[str, Identity | None]) -> dict[str, int]:
    """Descriptors of a container's namespaces by their names, from its processes, as far as they are found.

    Each has to be the recorded one: the container's user may have sent a process into it that still is in the node's
    network, or has made namespaces of its own.
    """
    found: dict[str, int] = {}
    user = wanted.get("user")
    if user is None:
        return found
    for pid in members(user):
        for kind, identity_wanted in wanted.items():
            if kind in found or identity_wanted is None:
                continue
            path = f"/proc/{pid}/ns/{kind}"
            fd = open_ancestor(pid, user) if kind == "user" else open_if(path, identity_wanted)
            if fd >= 0:
                found[kind] = fd
    return found
