"""Ends what is left of a container: every process of the user in its mount namespace, until none is.

slurmstepd ends its tasks; this is for what it left behind, or for when it was killed itself. A fork of the zygote
runs it, because reading all of /proc takes milliseconds that the agent does not have. Runs as root.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

from enclos.runtime.protocol import Message, send

ROUNDS = 200
PAUSE_SECONDS = 0.005


def run(channel: socket.socket, request: Message) -> int:
    """The task `sweep`: `uid`, and a descriptor of the container's mount namespace.

    The descriptor keeps the namespace's inode number from being given to another while this runs.
    """
    namespace = os.fstat(request.fds[0])
    cgroup = request.get("cgroup")
    if cgroup:
        _kill_cgroup(cgroup)
    killed, left = sweep(request.number("uid"), (namespace.st_dev, namespace.st_ino))
    send(channel, [("state", "done"), ("killed", str(len(killed))), ("left", str(left))])
    return 0


def sweep(uid: int, namespace: tuple[int, int]) -> tuple[set[int], int]:
    """Kill until a look at all processes finds none that lives.

    A process that forks while it is killed is met in the next round; a user can't outrun SIGKILL to
    all of his processes in a row for long, as every round also kills the children made meanwhile.

    Returns:
        The pids that were killed, and how many still live after the last round (in an uninterruptible wait).
    """
    killed: set[int] = set()
    left: list[int] = []
    for _ in range(ROUNDS):
        left = list(_members(uid, namespace))
        if not left:
            break
        for pid in left:
            killed.add(pid)
            _kill(pid, uid, namespace)
        # Death is not instant, and there is no event for "all of these are gone" that a fork could not evade.
        time.sleep(PAUSE_SECONDS)
    return killed, len(left)


def _members(uid: int, namespace: tuple[int, int]) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and _is_member(int(name), uid, namespace):
            yield int(name)


def _is_member(pid: int, uid: int, namespace: tuple[int, int]) -> bool:
    """A zombie has no namespaces any more (ENOENT) and does not count."""
    try:
        if _real_uid(pid) != uid:
            return False
        found = os.stat(f"/proc/{pid}/ns/mnt")
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == namespace


def _real_uid(pid: int) -> int:
    """From the status file: the owner of /proc/PID is root for a process that is not dumpable."""
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        status = file.read(4096)
    begin = status.index(b"\nUid:") + 5
    return int(status[begin : status.index(b"\n", begin)].split()[0])


def _kill(pid: int, uid: int, namespace: tuple[int, int]) -> None:
    """By pidfd, checked again after it was opened: the pid may have been given to another meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _is_member(pid, uid, namespace):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(pidfd)


def _kill_cgroup(path: str) -> None:
    """cgroup.kill (Linux 5.14) ends everything in the step's cgroup at once, however fast it forks."""
    try:
        with open(f"{path}/cgroup.kill", "w") as file:
            file.write("1")
    except OSError:
        return
