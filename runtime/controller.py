"""Asks slurmctld about a job, where the prolog has not told: a fallback, off the usual launch path.

Slurm may skip a prolog: with PrologFlags=Alloc,NoHold, slurmd 22.05 does so when the step's credential overtakes the
prolog's request (seen in about one of forty launches). Runs in the agent; starts `squeue`, which costs milliseconds.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass

SQUEUE_SECONDS = 10.0
# Only fields that no user can write into: a job's name could hold anything.
FORMAT = "%A|%U|%N|%P|%a|%i"
RUNNING = "--states=configuring,running,suspended,stopped,resizing"


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What slurmctld says of a job; nothing in it comes from the user.

    `leader` is the job id of the heterogeneous job's first part, 0 for a job that is no part of one; `part` its place
    among the parts, where squeue was asked.
    """

    job: int
    uid: int
    nodelist: str
    account: str = ""
    partition: str = ""
    leader: int = 0
    part: int = 0


async def ask_job(job_id: int) -> JobFacts | None:
    """The facts of one job; None where slurmctld does not answer or does not know it as one that runs.

    One that completes is not asked for again: its epilog may be over.
    """
    jobs = await _squeue(RUNNING, f"--jobs={job_id}")
    return next((job for job in jobs or [] if job.job == job_id), None)


async def ask_parts(leader: int) -> list[JobFacts] | None:
    """All parts of a heterogeneous job in their order, also those that have ended.

    None where slurmctld does not answer, or where one is missing in the middle: then the places of those behind it
    are not what other nodes think.
    """
    jobs = await _squeue("--states=all", f"--jobs={leader}")
    parts = sorted((job for job in jobs or [] if job.leader == leader), key=lambda job: job.part)
    return parts if parts and [job.part for job in parts] == list(range(len(parts))) else None


async def ask_node(node: str) -> set[int] | None:
    """The ids of all jobs that slurmctld believes to run on a node; None where it does not answer.

    One that completes may have had its epilog already.
    """
    jobs = await _squeue(RUNNING, f"--nodelist={node}")
    return None if jobs is None else {job.job for job in jobs}


async def _squeue(*arguments: str) -> list[JobFacts] | None:
    command = ("squeue", "--noheader", "--local", f"--format={FORMAT}", *arguments)
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return None
    try:
        async with asyncio.timeout(SQUEUE_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    if process.returncode != 0:
        return None
    return parse(output.decode("utf-8", "surrogateescape"))


def parse(output: str) -> list[JobFacts]:
    """Lines of `squeue` in our format; those without a node list (pending jobs) are left out."""
    jobs = []
    for line in output.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 6 and fields[0].isdigit() and fields[1].isdigit() and fields[2]:
            # A part of a heterogeneous job is LEADER+PART, a task of an array ARRAY_TASK.
            leader, plus, part = fields[5].partition("+")
            het = (int(leader), int(part)) if plus and leader.isdigit() and part.isdigit() else (0, 0)
            jobs.append(JobFacts(int(fields[0]), int(fields[1]), fields[2], fields[4], fields[3], *het))
    return jobs
