"""Processes that a cluster started, remembered so that no other process can be taken for them.

A pid alone may belong to somebody else by the time it is used; a pid with its start time cannot. Signals go
through a pidfd that is opened before the start time is compared, so nothing can change in between.

Holds no knowledge of Slurm or of namespaces. Runs as root.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the outermost pid namespace that /proc shows: pid and start time (clock ticks since boot)."""

    pid: int
    start: int

    @classmethod
    def parse_stat(cls, stat: str) -> Process:
        """Read pid and start time from a line of /proc/PID/stat; the name in it may hold any character."""
        head, _, tail = stat.rpartition(")")
        return cls(pid=int(head.split("(", 1)[0]), start=int(tail.split()[19]))

    @classmethod
    def of_pid(cls, pid: int) -> Process | None:
        """The process that has this pid now, or None."""
        try:
            return cls.parse_stat(Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape"))
        except (FileNotFoundError, ProcessLookupError):
            return None

    def is_alive(self) -> bool:
        """True while it runs; a zombie that nobody has reaped yet counts as ended."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="surrogateescape")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return Process.parse_stat(stat) == self and stat.rpartition(")")[2].split()[0] not in "ZX"

    def open(self) -> int | None:
        """A pidfd of exactly this process (the caller closes it), or None when it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if Process.of_pid(self.pid) != self:
            os.close(pidfd)
            return None
        return pidfd

    def send(self, number: int) -> None:
        """Send a signal; a process that is gone is fine."""
        pidfd = self.open()
        if pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            os.close(pidfd)

    def kill(self, timeout: float = 10.0) -> None:
        """SIGKILL it and wait for its end.

        Raises:
            TimeoutError: it is still there after `timeout` seconds (uninterruptible in the kernel).
        """
        self.send(signal.SIGKILL)
        self.wait(timeout)

    def wait(self, timeout: float) -> None:
        """Wait for its end, whoever its parent is; TimeoutError after `timeout` seconds."""
        pidfd = self.open()
        if pidfd is None:
            return
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        ended = poller.poll(timeout * 1000)
        os.close(pidfd)
        if not ended:
            raise TimeoutError(f"process {self.pid} did not end within {timeout:g} s")


def pids() -> Iterator[int]:
    """The pids of all processes."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            yield int(entry.name)


def pids_in(namespace: str, kind: str = "pid") -> list[int]:
    """Processes whose namespace of this kind is `namespace` (as /proc/PID/ns/KIND reads), zombies left out."""
    found = []
    for pid in pids():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            process = Process.of_pid(pid)
            inside = os.readlink(f"/proc/{pid}/ns/{kind}") == namespace
            if inside and process is not None and process.is_alive():
                found.append(pid)
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty when the process is gone."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    rows = (row.partition(b"=") for row in data.split(b"\0") if row)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in rows}
