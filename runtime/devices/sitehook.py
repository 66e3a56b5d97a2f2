"""The site's command that is told when an RDMA device comes to a job and leaves it: partitions, VLANs, rates.

It runs as root, with nothing of the user's in its arguments or environment, and its end is waited for: before the
device moves, and after it is back. Runs in the agent.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE
from typing import NamedTuple

from enclos.netns.nldev import format_guid
from enclos.netns.rdmamove import Movable
from enclos.runtime import errors

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Numbers(NamedTuple):
    """Whose device it is: `tenant` is the job, or of a heterogeneous job the leader of all its parts."""

    tenant: int
    job: int
    vni: int


async def run(command: str, event: str, numbers: Numbers, movable: Movable, deadline: float) -> None:
    """Run `COMMAND attach|detach`, with what it is about in its environment.

    Args:
        deadline: seconds after which it is ended.

    Raises:
        EnclosError: rdma_hook_failed, with the last line that it wrote to standard error.
    """
    environment = {
        "PATH": PATH,
        "ENCLOS_TENANT": f"job{numbers.tenant}",
        "ENCLOS_JOB": str(numbers.job),
        "ENCLOS_VNI": str(numbers.vni),
        "ENCLOS_DEVICE": movable.name,
        "ENCLOS_GUID": format_guid(movable.guid),
        "ENCLOS_PORT_GUIDS": " ".join(format_guid(port) for port in movable.ports),
        "ENCLOS_INTERFACES": " ".join(row.name for row in movable.interfaces),
    }
    try:
        process = await asyncio.create_subprocess_exec(
            command, event, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env=environment, cwd="/"
        )
    except OSError as error:
        raise errors.rdma_hook_failed(command, os.strerror(error.errno or 0)) from error
    try:
        async with asyncio.timeout(deadline):
            _, complaint = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise errors.rdma_hook_failed(command, f"took more than {deadline:.0f} s") from error
        raise
    if process.returncode != 0:
        lines = complaint.decode(errors="replace").strip().splitlines()
        detail = lines[-1] if lines else f"exit status {process.returncode}"
        raise errors.rdma_hook_failed(command, detail[:200])
