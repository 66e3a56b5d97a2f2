"""Named containers of this node: which there are, who is in them, whose turn it is to make or enter one, and their end.

What was written into one is a file system of its own, mounted in the node's mount namespace where only root can go,
so that it outlives agents; a record in the journal comes first. Builders mount it, a fork of the zygote removes it
(operations/kept.py). Runs in the agent's event loop; mounts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from enclos.runtime import errors, stepd
from enclos.runtime.journal import Journal
from enclos.runtime.request import StepRequest, step_key
from enclos.runtime.settings import Named as Settings
from enclos.runtime.spawner import ChildDied, Spawner

if TYPE_CHECKING:
    from enclos.runtime.steps import Step

log = logging.getLogger("enclosd")

DISCARD_ATTEMPTS = 5
DISCARD_SECONDS = 60.0
# The epilog waits for the removal; a builder that its user has stopped may hold a container for longer.
END_PATIENCE_SECONDS = 3.0
# How long a slurmstepd without tasks is waited for. It ends in milliseconds, or when what it keeps is saved or flushed.
LEAVING_SECONDS = 10.0

# Whose it is: uid, job (0: of all jobs, or of none), name.
Key = tuple[int, int, str]


@dataclass(slots=True)
class Named:
    """One named container. One that `enclos run` made (`of_run`) has no job to end with, whatever the scope is.

    `steps` are those in running ones on its files, oldest first: mostly all in the same namespaces. `making` is held
    by the step that makes or enters one, from its decision until it is in.
    """

    key: Key
    ident: str
    image: str = ""
    image_key: str = ""
    made: bool = False
    of_run: bool = False
    steps: list[Step] = field(default_factory=list)
    making: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class Turn:
    """A step's turn at a named container.

    Attributes:
        running: the step whose container it enters; None where it makes one of its own.
        beside: the step beside whose container it makes one on the same files (`no_exec`).
    """

    named: Named | None
    running: Step | None = None
    beside: Step | None = None


class NamedContainers:
    """All of this node."""

    def __init__(
        self, settings: Settings, journal: Journal, directory: str, node_mounts_fd: int, spawner: Spawner
    ) -> None:
        """`node_mounts_fd` is the node's mount namespace, kept open; `directory` is where it has the files."""
        self.node_mounts_fd = node_mounts_fd
        self._settings = settings
        self._journal = journal
        self._directory = directory
        self._spawner = spawner
        self._all: dict[Key, Named] = {}
        self._count = 0
        self._removing: set[asyncio.Task[None]] = set()
        self._left_over: set[str] = set()
        self.find_step: Callable[[int, int], Step | None] = lambda job, step: None

    def path(self, named: Named) -> str:
        """Where its file system is mounted, in the node's mount namespace."""
        return f"{self._directory}/{named.ident}"

    def jobs(self) -> set[int]:
        """The jobs that have named containers here."""
        return {job for _, job, _ in self._all if job}

    # --- turns ------------------------------------------------------------------------------------------------

    async def take_turn(self, request: StepRequest) -> Turn:
        """Wait until no other step makes or enters the container of that name, and decide what this one does.

        Every turn ends by `built` or `given_up`.

        Raises:
            EnclosError: named_missing, named_exists, named_not_running, named_limit.
        """
        unnamed = self._unnamed(request)
        if unnamed is not None:
            if request.name_flag == "create":
                raise errors.named_exists(request.name)
            return Turn(None, running=unnamed)
        key = (request.uid, request.job if self._settings.scope == "job" else 0, request.name)
        while True:
            named = self._all.get(key) or self._new(key, request.is_run)
            await named.making.acquire()
            if self._all.get(key) is named:
                break
            named.making.release()
        try:
            await _let_leave(named)
            return self._decide(named, request)
        except errors.EnclosError:
            await self._let_go(named)
            raise

    def _unnamed(self, request: StepRequest) -> Step | None:
        """A running step of the user's that the name means: JOB.STEP. Of his other jobs only where names reach them."""
        key = step_key(request.name)
        step = self.find_step(*key) if key is not None else None
        if step is None or step.uid != request.uid or (step.key[0] != request.job and self._settings.scope == "job"):
            return None
        return step if step.running and step.key != (request.job, request.step) else None

    def _decide(self, named: Named, request: StepRequest) -> Turn:
        running = next((step for step in named.steps if step.running), None)
        if request.name_flag == "create" and named.made:
            raise errors.named_exists(request.name)
        if request.name_flag == "exec" and running is None:
            raise errors.named_not_running(request.name)
        if running is not None:
            beside = request.name_flag == "no_exec"
            return Turn(named, running=None if beside else running, beside=running if beside else None)
        if not named.made:
            if not request.image:
                raise errors.named_missing(request.name)
            others = [key[2] for key, other in self._all.items() if key[0] == request.uid and other is not named]
            if len(others) >= self._settings.per_user:
                raise errors.named_limit(request.name, self._settings.per_user, set(others))
            named.image = request.image_path() or request.image
            self._record(named)
        return Turn(named)

    def _new(self, key: Key, of_run: bool) -> Named:
        self._count += 1
        uid, job, _ = key
        named = self._all[key] = Named(key, f"{uid}.{job}.{self._count}", of_run=of_run)
        return named

    def built(self, turn: Turn, step: Step, image_key: str) -> None:
        """The step is in; the next one may look."""
        named = turn.named
        if named is None:
            return
        if not named.made:
            named.made, named.image_key = True, image_key
            self._record(named)
        named.steps.append(step)
        named.making.release()

    def given_up(self, turn: Turn) -> None:
        """The step did not get in. What it began to create is removed before the next one looks."""
        if turn.named is not None:
            self._in_background(self._let_go(turn.named))

    async def _let_go(self, named: Named) -> None:
        try:
            if not named.made:
                await self._remove(named)
        finally:
            named.making.release()

    def left(self, step: Step) -> None:
        """The step has ended."""
        for named in self._all.values():
            if step in named.steps:
                named.steps.remove(step)

    # --- the end ----------------------------------------------------------------------------------------------

    async def end_job(self, job_id: int) -> None:
        """Remove what the job kept, and what could not be removed before."""
        for ident in list(self._left_over):
            await self._discard(ident)
        for named in [named for named in self._all.values() if named.key[1] == job_id]:
            try:
                async with asyncio.timeout(END_PATIENCE_SECONDS):
                    await named.making.acquire()
            except TimeoutError:
                log.warning("job=%d ended while a step was entering its container %s", job_id, named.ident)
                await self._remove(named)
                continue
            try:
                await self._remove(named)
            finally:
                named.making.release()

    async def remove(self, uid: int, name: str) -> int:
        """Remove the user's containers of that name in which no step runs; returns how many."""
        found = [named for named in self._all.values() if named.key[0] == uid and named.key[2] == name]
        count = 0
        for named in found:
            # Looked at one by one: while one is removed, a step may begin in the next.
            if named.making.locked() or any(step.running for step in named.steps):
                continue
            async with named.making:
                await self._remove(named)
            count += 1
        return count

    async def _remove(self, named: Named) -> None:
        if self._all.get(named.key) is named:
            del self._all[named.key]
        await self._discard(named.ident)

    async def _discard(self, ident: str) -> None:
        """Remove its files, then its record."""
        for _ in range(DISCARD_ATTEMPTS):
            try:
                async with asyncio.timeout(DISCARD_SECONDS):
                    await self._spawner.ready()
                    await self._discard_once(ident)
                self._journal.remove(f"named.{ident}")
                self._left_over.discard(ident)
                return
            except (ChildDied, TimeoutError):
                continue
        self._left_over.add(ident)
        log.error("named container %s could not be removed, trying again at the next end of a job", ident)

    async def _discard_once(self, ident: str) -> None:
        fields = [("path", f"{self._directory}/{ident}"), ("backing", self.backing(ident))]
        child = self._spawner.spawn("discard", fields, [self.node_mounts_fd])
        try:
            (await child.receive()).close()
        except BaseException:
            child.kill()
            raise
        finally:
            child.close()

    def backing(self, ident: str) -> str:
        """The file on the node's disk that holds its file system; "" where that is memory."""
        return f"{self._settings.directory}/{ident}.ext4" if self._settings.directory else ""

    def _in_background(self, work: Any) -> None:  # noqa: ANN401  # a coroutine
        task = asyncio.create_task(work)
        self._removing.add(task)
        task.add_done_callback(self._removed)

    def _removed(self, task: asyncio.Task[None]) -> None:
        self._removing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a named container was not removed", exc_info=error)

    # --- records ----------------------------------------------------------------------------------------------

    def _record(self, named: Named) -> None:
        uid, job, name = named.key
        record = {"uid": uid, "job": job, "name": name, "image": named.image, "image_key": named.image_key}
        self._journal.write(f"named.{named.ident}", {**record, "made": named.made, "run": named.of_run})

    def adopt_all(self) -> None:
        """Take over what agents before this one made; called before any step asks."""
        for name, record in self._journal.read("named"):
            try:
                self._adopt(name.removeprefix("named."), record)
            except (KeyError, TypeError, ValueError) as error:
                log.warning("journal record %s is damaged (%r), ignoring", name, error)
                self._in_background(self._discard(name.removeprefix("named.")))

    def _adopt(self, ident: str, record: dict[str, Any]) -> None:
        """What was not finished, or belongs to a scope that the site no longer has, is removed."""
        key = (int(record["uid"]), int(record["job"]), str(record["name"]))
        number = int(ident.rpartition(".")[2])
        self._count = max(self._count, number)
        of_run = record.get("run") is True
        fits = of_run or (key[1] == 0) == (self._settings.scope == "global")
        if not record["made"] or key in self._all or not fits:
            self._in_background(self._discard(ident))
            return
        self._all[key] = Named(key, ident, str(record["image"]), str(record["image_key"]), made=True, of_run=of_run)

    def rejoin(self, step: Step, ident: str) -> None:
        """A running step of an agent before this one is in that container."""
        for named in self._all.values():
            if named.ident == ident:
                named.steps.append(step)

    async def settled(self) -> None:
        """Wait for removals that are under way."""
        while self._removing:
            with contextlib.suppress(Exception):
                await asyncio.wait(set(self._removing))


async def _let_leave(named: Named) -> None:
    """Wait for steps whose tasks are over, while their slurmstepd is not.

    srun has come back then, and the user's next step is not meant to enter what is going, but to start it again, with
    mounts and identity of its own.
    """
    deadline = time.monotonic() + LEAVING_SECONDS
    for step in list(named.steps):
        # `enclos run` starts its program a moment after it is in: that is no leaving.
        while step.running and not stepd.has_tasks(int(step.record["stepd"])) and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(step.ended.wait(), 0.2)
            if step.ended.is_set():
                break
