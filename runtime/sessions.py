"""`enclos exec` as the agent sees it: finds the step, and has a process enter its container (entering.py).

Runs in the agent's event loop. It holds no descriptor that a user sent: what it passes on is the end of a socket that
the process made, which by then is the user's own, in his container.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping

from enclos.runtime import cgroup, errors, protocol, seccomp, stepd
from enclos.runtime.connection import wait_readable
from enclos.runtime.request import RUN, RUN_JOB, step_name
from enclos.runtime.spawner import Child, ChildDied
from enclos.runtime.steps import Step, Surroundings

PER_USER = 16
# At the same moment: each may take as long as ENTER_SECONDS, where the user stops it, and there are few places.
OPENING_PER_USER = 4
# Less than a visitor may be silent (visitors.py).
ENTER_SECONDS = 6.0


class Sessions:
    """The programs that were started from outside; those of an agent before this one are not counted."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._open: Counter[int] = Counter()
        self._opening: Counter[int] = Counter()
        self._watchers: set[asyncio.Task[None]] = set()

    async def enter(self, step: Step, uid: int) -> int:
        """Have a process enter, for this user or root; returns the command's end of its socket, the caller's.

        Raises:
            EnclosError: exec_too_many, exec_failed.
        """
        if self._open[uid] >= PER_USER or self._opening[uid] >= OPENING_PER_USER:
            raise errors.exec_too_many(step.name, PER_USER)
        self._open[uid] += 1
        self._opening[uid] += 1
        child: Child | None = None
        try:
            await self._around.spawner.ready()
            child = self._spawn(step)
            fd = await _answer(child, step.name)
        except BaseException as error:
            self._leave(uid)
            if child is not None:
                child.kill()
                child.close()
            if isinstance(error, (ChildDied, TimeoutError, OSError)):
                raise errors.exec_failed(step.name, "the process that enters it was killed") from error
            raise
        finally:
            self._opening[uid] -= 1
            if not self._opening[uid]:
                del self._opening[uid]
        watcher = asyncio.create_task(self._watch(child, uid))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return fd

    async def _watch(self, child: Child, uid: int) -> None:
        try:
            await wait_readable(child.pidfd)
        finally:
            child.close()
            self._leave(uid)

    def _leave(self, uid: int) -> None:
        self._open[uid] -= 1
        if not self._open[uid]:
            del self._open[uid]

    def _spawn(self, step: Step) -> Child:
        """Raises ChildDied, or EnclosError: exec_failed."""
        record = step.record
        wanted = record.get("entering")
        if not wanted:
            raise errors.exec_failed(step.name, "an agent of an older release made it")
        stepd_pid = int(record["stepd"])
        if stepd.lives_elsewhere(stepd_pid, "pid"):
            raise errors.exec_failed(step.name, "Slurm gives the job a PID namespace of its own")
        directory = cgroup.place_for_more(str(record.get("cgroup", "")))
        if directory is None:
            raise errors.exec_failed(step.name, "no task of it runs any more")
        fields = [(str(key), str(value)) for key, value in wanted]
        fields += [("uid", str(step.uid)), ("stepd", str(stepd_pid)), ("cgroup", directory)]
        if step.key[0] == RUN_JOB and not directory:
            fields.append(("follow", "1"))
        seccomp_fd = _filter() if record.get("remap_root") else -1
        try:
            fds = _descriptors(step, seccomp_fd)
            return self._around.spawner.spawn("enter", [*fields, ("fds", ",".join(fds))], list(fds.values()))
        finally:
            if seccomp_fd >= 0:
                os.close(seccomp_fd)


def find(steps: Mapping[tuple[int, int], Step], uid: int, message: protocol.Message) -> Step:
    """The step that a request names; without `step` the only one of the job.

    Raises:
        EnclosError: exec_no_container, in the same words for another user's; exec_several, exec_building.
    """
    job = message.number("job")
    number = message.number("step") if message.get("step") else None
    found = [
        step
        for key, step in steps.items()
        if key[0] == job and number in (None, key[1]) and uid in (0, step.uid) and step.record["state"] != "failed"
    ]
    if not found:
        raise errors.exec_no_container(_name(job) if number is None else step_name(job, number))
    if len(found) > 1:
        raise errors.exec_several(_name(job), sorted(step.name for step in found))
    if not found[0].running:
        raise errors.exec_building(found[0].name)
    return found[0]


def _name(job: int) -> str:
    return RUN if job == RUN_JOB else str(job)


async def _answer(child: Child, name: str) -> int:
    async with asyncio.timeout(ENTER_SECONDS):
        with await child.receive() as answer:
            if answer.get("state") != "ready":
                raise errors.exec_failed(name, answer.get("cause"))
            (fd,) = answer.take_fds()
            return fd


def _descriptors(step: Step, seccomp_fd: int) -> dict[str, int]:
    fds = {"stepd": step.stepd_pidfd, **step.namespaces()}
    if step.network_namespace() >= 0:
        fds["net"] = step.network_namespace()
    if seccomp_fd >= 0:
        fds["seccomp"] = seccomp_fd
    return fds


def _filter() -> int:
    fd = os.memfd_create("enclos-seccomp", os.MFD_CLOEXEC)
    os.write(fd, seccomp.remap_root_filter(os.uname().machine))
    return fd
