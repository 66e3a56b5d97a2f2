"""What a starting agent finds of the agent before it: steps that still run, and things that nobody undid.

Runs once, in the agent, before it serves anybody. Nothing that a running step needs was in the old agent's process,
so adopting is only a matter of taking descriptors again.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from enclos.runtime.agent import Agent, open_stepd
from enclos.runtime.container import NAMESPACES
from enclos.runtime.errors import EnclosError
from enclos.runtime.steps import AdoptedStep, start_time

log = logging.getLogger("enclosd")


def adopt(agent: Agent) -> None:
    """Take over the running steps and their jobs' networks; end steps whose slurmstepd is gone."""
    around = agent.around
    networks: dict[int, int] = {}
    for name, record in around.journal.read("step"):
        try:
            step = _adopt_step(agent, record, networks)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("journal record %s is damaged (%s), ignoring", name, error)
            around.journal.remove(name)
            continue
        agent.watch(step)
        log.info("step=%s adopted", step.name)
    for name, record in around.journal.read("job"):
        try:
            around.jobs.adopt(record, networks.pop(record["facts"]["job"], -1))
        except (KeyError, TypeError, ValueError) as error:
            log.warning("journal record %s is damaged (%s), ignoring", name, error)
            around.journal.remove(name)
    for fd in networks.values():
        os.close(fd)


def _adopt_step(agent: Agent, record: dict[str, Any], networks: dict[int, int]) -> AdoptedStep:
    """A step from its record. With its slurmstepd gone its pidfd is one of a process that has ended, so that
    its end is the same as any other's.
    """
    stepd_pidfd = _stepd(record)
    namespaces: dict[str, int] = {}
    pid = _find_member(record)
    if pid:
        namespaces = open_namespaces(pid, NAMESPACES)
        if record["network"] == "job" and record["job"] not in networks:
            networks[record["job"]] = open_namespaces(pid, ("net",))["net"]
    return AdoptedStep(agent.around, record, stepd_pidfd, namespaces)


def _stepd(record: dict[str, Any]) -> int:
    """The pidfd of the step's slurmstepd, or of a process that has ended."""
    pid = record["stepd"]
    try:
        fd = open_stepd(pid)
        if start_time(pid) == record["stepd_start"]:
            return fd
        os.close(fd)
    except (EnclosError, OSError):
        pass
    return ended_process()


def ended_process() -> int:
    """A pidfd that is readable from the start."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    return fd


def _find_member(record: dict[str, Any]) -> int:
    """A process of the step, known by its mount namespace and uid; 0 when there is none."""
    if record["mnt"] is None:
        return 0
    wanted = tuple(record["mnt"])
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            found = os.stat(f"/proc/{name}/ns/mnt")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == wanted:
            return int(name)
    return 0


def open_namespaces(pid: int, names: tuple[str, ...]) -> dict[str, int]:
    """Descriptors of a process' namespaces, by name; empty when it has ended meanwhile."""
    fds: dict[str, int] = {}
    try:
        for name in names:
            fds[name] = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        for fd in fds.values():
            os.close(fd)
        return {}
    return fds
