"""Fetches the image of a job when its prolog says which one: before its first step asks, as a job's other resources.

`sbatch --container-image` leaves the name in the job's environment for prologs (spank_job_control_setenv). That is the
user's word: it can make the agent do for him what his step could, and no more. The prolog does not wait; a step that
begins meanwhile waits for the same import. Runs in the agent's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from enclos.runtime import errors, stored
from enclos.runtime.controller import JobFacts
from enclos.runtime.images.imports import want_of
from enclos.runtime.images.reference import BadReference, Reference, parse
from enclos.runtime.spawner import ChildDied
from enclos.runtime.steps import Surroundings

log = logging.getLogger("enclosd")

PERSON_SECONDS = 30


class Prefetch:
    """The images that are being fetched for jobs of this node, one for each."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._running: dict[int, asyncio.Task[None]] = {}

    def begin(self, job: JobFacts, image: str) -> None:
        """Start to fetch, unless it is none of a registry, or the site does not want it. A requeued job begins anew."""
        config = self._around.config
        if not (config.enabled and config.imports.prefetch) or job.uid == 0:
            return
        try:
            reference = parse(image, config.imports.default_registry)
        except BadReference:
            return  # Its step will say so.
        if not reference.is_registry:
            return
        self.end(job.job)
        task = self._running[job.job] = asyncio.create_task(self._fetch(job, reference))
        task.add_done_callback(lambda done: self._forget(job.job, done))

    def end(self, job: int) -> None:
        """The job is over; others that wait for the same import go on."""
        if (task := self._running.pop(job, None)) is not None:
            task.cancel()

    def _forget(self, job: int, task: asyncio.Task[None]) -> None:
        if self._running.get(job) is task:
            del self._running[job]

    async def _fetch(self, job: JobFacts, reference: Reference) -> None:
        around, image = self._around, errors.printable(reference.text)
        try:
            ids, home = await self._person(job.uid)
            if await stored.find(around, ids, reference, reference.digest, _quiet) is not None:
                return
            want = want_of(reference, reference.digest, ids, home, "", "")
            around.imports.cache.release(await around.imports.obtain(want, _quiet))
            log.info("job=%d uid=%d image=%s is here", job.job, job.uid, image)
        except errors.EnclosError as error:
            log.info("job=%d uid=%d image=%s not fetched: %s", job.job, job.uid, image, error.line())
        except (ChildDied, TimeoutError):
            log.info("job=%d uid=%d image=%s not fetched", job.job, job.uid, image)

    async def _person(self, uid: int) -> tuple[tuple[int, int, tuple[int, ...]], str]:
        """Ids and home of a user; the prolog does not have them, and a name service may take its time."""
        child = self._around.spawner.spawn("person", [("uid", str(uid))])
        try:
            async with asyncio.timeout(PERSON_SECONDS):
                with await child.receive() as answer:
                    groups = tuple(int(group) for group in answer.all("group"))
                    return (uid, answer.number("gid"), groups), answer.get("home")
        finally:
            with contextlib.suppress(ChildDied):
                child.kill()
            child.close()


def _quiet(text: str) -> None:
    """Nobody looks on."""
