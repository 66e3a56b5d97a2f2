"""Which device files Slurm's numbers of GPUs mean on this node.

A grant is told in places of the node's list of GPUs: SLURM_STEP_GPUS=0,2. The list is slurmd's, made of gres.conf and
of what AutoDetect found, and nothing in a job's environment says what is in it; `slurmd -G` prints it. It is asked at
the first step with GPUs, and again after slurm.conf or gres.conf changed; devices.gpus of enclos.yaml takes its place.
Runs in the agent, and in `enclos check`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Sequence

from enclos.runtime import errors, hostlist

SLURMD_SECONDS = 15.0
GPU_LIMIT = 1024
SYSTEM_PATH = "/usr/sbin:/sbin:/usr/local/sbin:/opt/slurm/sbin"

_RECORD = re.compile(r"Gres Name=(\S+) .*?\bCount=([0-9]+) .*?\bFile=(\S+)")

Files = tuple[tuple[str, ...], ...]


class GpuList:
    """The node's GPUs, asked once.

    Attributes:
        known: what was found the last time; None before the first step with GPUs.
    """

    def __init__(self, node: str, configured: Sequence[str]) -> None:
        self._node = node
        self._configured = configured
        self._state: object = None
        self.known: Files | None = None
        self._asking = asyncio.Lock()

    async def files(self, slurm_conf: str, stepd: int) -> Files:
        """Device files by Slurm's number.

        Args:
            slurm_conf: path of slurm.conf as slurmstepd has it, or "".
            stepd: pid of a slurmstepd: slurmd lies beside it.

        Raises:
            EnclosError: gpus_not_listed.
        """
        if self._configured:
            return configured(self._configured)
        async with self._asking:
            state = _state(slurm_conf)
            if self.known is None or self._state != state:
                self.known, self._state = await ask(self._node, slurm_conf, stepd), state
            return self.known


def configured(entries: Sequence[str]) -> Files:
    """devices.gpus: one device file per GPU, in the order of gres.conf."""
    return tuple((path,) for entry in entries for path in hostlist.expand(entry, GPU_LIMIT))


def _state(slurm_conf: str) -> object:
    """Changes when the configuration does."""
    found: list[object] = []
    for name in ("slurm.conf", "gres.conf"):
        path = os.path.join(os.path.dirname(slurm_conf), name)
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def slurmd_path(stepd: int = 0) -> str:
    """slurmd lies beside its slurmstepd; elsewhere, along the path. "" where it is not found."""
    try:
        directory = os.path.dirname(os.readlink(f"/proc/{stepd}/exe"))
    except OSError:
        directory = ""
    beside = os.path.join(directory, "slurmd")
    if directory and os.access(beside, os.X_OK):
        return beside
    return shutil.which("slurmd") or shutil.which("slurmd", path=SYSTEM_PATH) or ""


async def ask(node: str, slurm_conf: str = "", stepd: int = 0) -> Files:
    """Run `slurmd -G`.

    Raises:
        EnclosError: gpus_not_listed.
    """
    program = slurmd_path(stepd)
    if not program:
        raise errors.gpus_not_listed("slurmd not found")
    environment = {**os.environ, **({"SLURM_CONF": slurm_conf} if slurm_conf else {})}
    try:
        process = await asyncio.create_subprocess_exec(
            program, "-N", node, "-G", stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=environment
        )
    except OSError as error:
        raise errors.gpus_not_listed(errors.reason(error.errno or 0)) from error
    try:
        async with asyncio.timeout(SLURMD_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise errors.gpus_not_listed(f"slurmd -G took more than {SLURMD_SECONDS:.0f} s") from None
    if process.returncode != 0:
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        # On a node with cgroup v2 it says why in its log alone.
        raise errors.gpus_not_listed(f"slurmd -G: {last[:200] or f'exit status {process.returncode}, see its log'}")
    return parse(output.decode(errors="surrogateescape"))


def parse(output: str) -> Files:
    """The GPUs of `slurmd -G`, whose order is that of the numbers. Those without device files have none.

    A record is one GPU of several files (MultipleFiles, as for MIG), or several of one file each.

    Raises:
        EnclosError: gpus_not_listed.
    """
    found: list[tuple[str, ...]] = []
    for name, count, files in _RECORD.findall(output):
        if name != "gpu":
            continue
        try:
            paths = [] if files == "(null)" else hostlist.expand(files, GPU_LIMIT)
        except hostlist.BadHostlist as error:
            raise errors.gpus_not_listed(f"slurmd -G: File={files[:64]}: {error}") from error
        if len(paths) == int(count):
            found += [(path,) for path in paths]
        elif int(count) == 1 or not paths:
            found += [tuple(paths)] * min(int(count), GPU_LIMIT)
        else:
            raise errors.gpus_not_listed(f"slurmd -G: Count={count} with File={files[:64]}")
    return tuple(found)
