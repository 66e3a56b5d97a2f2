"""Ends what is left of a container: every process in its user namespace, until there is none.

slurmstepd ends its tasks; this is for what it left behind, or for when it was killed itself. A fork of the zygote
runs it, because reading all of /proc takes milliseconds that the agent does not have. Runs as root.
"""

from __future__ import annotations

import os
import signal
import socket
import time

from enclos.runtime.cgroup import kill as kill_cgroup
from enclos.runtime.members import Identity, identity, is_member, members
from enclos.runtime.protocol import Message, send

ROUNDS = 200
PAUSE_SECONDS = 0.005
# Looks that found nobody while somebody was forking: on a busy node that proves nothing, and need not go on.
RESTLESS_LOOKS = 20
NEWBORN_LOOKS = 64
LAST_PID = "/proc/sys/kernel/ns_last_pid"


def run(channel: socket.socket, request: Message) -> int:
    """The task `sweep`: `uid`, perhaps `cgroup`, and a descriptor of the container's user namespace.

    The descriptor keeps the namespace's inode number from being given to another while this runs.
    """
    killed, left = sweep(request.number("uid"), identity(request.fds[0]), request.get("cgroup"))
    send(channel, [("state", "done"), ("killed", str(len(killed))), ("left", str(left))])
    return 0


def sweep(uid: int, namespace: Identity, cgroup: str = "") -> tuple[set[int], int]:
    """Kill until a look at all processes finds none that lives.

    A process that forks while it is killed is met in the next round. One that only forks and ends, over and over,
    is in no list of processes by the time it is read: so the newest pids are looked at as they come.

    Args:
        uid: the user. A process of root's in there was not started by him, unless he is root.
        cgroup: directory of the step's cgroup, if it has one: written to only if somebody is left.

    Returns:
        The pids that were killed, and how many still live after the last round (in an uninterruptible wait).
    """
    killed: set[int] = set()
    left: list[int] = []
    restless = 0
    for _ in range(ROUNDS):
        newest = _last_pid()
        left = [pid for pid in members(namespace) if _kill(pid, uid, namespace)]
        left += _newborn(newest, uid, namespace)
        restless += not left and _last_pid() != newest
        if not left and (_last_pid() == newest or restless > RESTLESS_LOOKS):
            break
        if left and cgroup:
            kill_cgroup(cgroup)
        killed.update(left)
        # Death is not instant, and there is no event for "all of these are gone" that a fork could not evade.
        time.sleep(PAUSE_SECONDS if left else 0)
    return killed, len(left)


def _newborn(newest: int, uid: int, namespace: Identity) -> list[int]:
    """Kill the members among the processes that have been started since `newest`, for as long as more come."""
    found = []
    for _ in range(NEWBORN_LOOKS):
        last = _last_pid()
        if last <= newest:
            break
        for pid in range(max(newest + 1, last - NEWBORN_LOOKS), last + 1):
            if is_member(pid, namespace) and _kill(pid, uid, namespace):
                found.append(pid)
        newest = last
    return found


def _last_pid() -> int:
    """The pid that was given last; 0 where the kernel does not tell (CONFIG_CHECKPOINT_RESTORE)."""
    try:
        with open(LAST_PID, "rb", buffering=0) as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return 0


def _kill(pid: int, uid: int, namespace: Identity) -> bool:
    """By pidfd, checked again after it was opened: the pid may have been given to another meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if (uid != 0 and _real_uid(pid) == 0) or not is_member(pid, namespace):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)


def _real_uid(pid: int) -> int:
    """From the status file: the owner of /proc/PID is root for a process that is not dumpable."""
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        status = file.read(4096)
    begin = status.index(b"\nUid:") + 5
    return int(status[begin : status.index(b"\n", begin)].split()[0])

