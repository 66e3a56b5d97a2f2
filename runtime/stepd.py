"""A slurmstepd as the agent sees it: which process it is, and in which namespaces it lives.

Slurm's namespace/linux (26.05; src/plugins/namespace/linux/namespace_linux.c, namespace_p_join) starts slurmstepd
itself in its job's namespaces: always a mount namespace, and as the site sets, pid and user namespaces. Runs in the
agent, as root.
"""

from __future__ import annotations

import os

from enclos.runtime import errors


def of_request(told: int, peer_pid: int, *, is_task: bool) -> int:
    """The pid of the slurmstepd that a request is from, in the agent's pid namespace.

    Args:
        told: its pid as the plugin knows it; right unless it lives in a pid namespace of its job's.
        peer_pid: of the process that connected, translated by the kernel.
        is_task: the peer is a task, slurmstepd's child; else it is slurmstepd.

    Raises:
        EnclosError: bad_request, when the peer has ended.
    """
    try:
        if not lives_elsewhere(peer_pid, "pid"):
            return told
        return parent(peer_pid) if is_task else peer_pid
    except OSError as error:
        raise errors.bad_request(f"stepd={told}: {errors.reason(error.errno or 0)}") from error


def own_namespaces(pid: int, image: str) -> bool:
    """Whether a slurmstepd has a pid namespace of its job's.

    Raises:
        EnclosError: slurm_user_namespace: from inside one, no task may join what the agent makes beside it: it has
            power over the user namespaces below its own only (user_namespaces(7)). Or bad_request, when it has ended.
    """
    try:
        if lives_elsewhere(pid, "user"):
            raise errors.slurm_user_namespace(image)
        return lives_elsewhere(pid, "pid")
    except OSError as error:
        raise errors.bad_request(f"stepd={pid}: {errors.reason(error.errno or 0)}") from error


def lives_elsewhere(pid: int, kind: str) -> bool:
    """Whether a process is in another namespace of this kind than the agent; OSError when it is gone."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino


def open_stepd(pid: int) -> int:
    """A pidfd of a slurmstepd, checked to be one of root's after it was opened; the caller owns it.

    Raises:
        EnclosError: bad_request.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise errors.bad_request(f"stepd={pid}: {errors.reason(error.errno or 0)}") from error
    try:
        executable = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        owner = _real_uid(pid)
    except OSError as error:
        os.close(pidfd)
        raise errors.bad_request(f"stepd={pid}: {errors.reason(error.errno or 0)}") from error
    # Debian calls the file slurmstepd-wlm.
    if owner != 0 or not os.path.basename(executable).startswith("slurmstepd"):
        os.close(pidfd)
        raise errors.bad_request(f"stepd={pid} is no slurmstepd")
    return pidfd


def open_runner(pid: int) -> int:
    """The same for the process that stands for slurmstepd in `enclos run` (running.py), which is root's by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise errors.bad_request(f"stepd={pid}: {errors.reason(error.errno or 0)}") from error
    try:
        if _real_uid(pid) != 0 or _status(pid, b"Name") != b"enclos-run":
            raise errors.bad_request(f"stepd={pid} is no enclos-run")
    except BaseException as error:
        os.close(pidfd)
        if isinstance(error, OSError):
            raise errors.bad_request(f"stepd={pid}: {errors.reason(error.errno or 0)}") from error
        raise
    return pidfd


def has_tasks(pid: int) -> bool:
    """Whether a slurmstepd has a child that lives. One that has had tasks and has none is about to end.

    Source: proc(5), /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN); without it the answer is yes.
    """
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                children = file.read(65536).split()
            if any(_lives(int(child)) for child in children):
                return True
    except ProcessLookupError:
        return False
    except OSError:
        return os.path.exists(f"/proc/{pid}")
    return False


def _lives(pid: int) -> bool:
    try:
        return _status(pid, b"State") not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _real_uid(pid: int) -> int:
    """The real uid: slurmstepd has the user's as its effective one at times, also while its tasks ask to join."""
    return int(_status(pid, b"Uid"))


def parent(pid: int) -> int:
    """Pid of its parent; OSError when it is gone."""
    return int(_status(pid, b"PPid"))


def _status(pid: int, field: bytes) -> bytes:
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        text = file.read(65536)
    return (b"\n" + text).partition(b"\n" + field + b":")[2].split(None, 1)[0]
