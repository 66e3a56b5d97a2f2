"""Who is in a container: the processes in its user namespace, and in those below it.

Nobody leaves a user namespace upwards, while a task may make mount, network or further user namespaces of its own:
so this is how a container's processes are found, whatever they did. Looks only. Runs as root, in the agent when it
starts and in sweepers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from enclos.runtime import linux

Identity = tuple[int, int]
# As deep as the kernel lets user namespaces nest (user_namespaces(7)).
DEPTH = 33


def identity(fd: int) -> Identity:
    """Device and inode of a namespace, which name it as long as anything keeps it alive."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def members(namespace: Identity) -> Iterator[int]:
    """The pids of all processes in this user namespace or one below it."""
    own = os.stat("/proc/self/ns/user")
    for name in os.listdir("/proc"):
        if name.isdigit() and is_member(int(name), namespace, (own.st_dev, own.st_ino)):
            yield int(name)


def is_member(pid: int, namespace: Identity, own: Identity | None = None) -> bool:
    """Is the process in this user namespace or one below it, and not a zombie?

    Args:
        own: the caller's user namespace, in which most processes are: it saves opening theirs.
    """
    try:
        status = os.stat(f"/proc/{pid}/ns/user")
    except OSError:
        return False
    found = status.st_dev, status.st_ino
    if found == own != namespace:
        return False
    if found != namespace:
        fd = open_ancestor(pid, namespace)
        if fd < 0:
            return False
        os.close(fd)
    return not _is_dead(pid)


def _is_dead(pid: int) -> bool:
    """A zombie, all of it: where only the first thread has ended, the others run on."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read(4096)
    except OSError:
        return True
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0] in b"ZX" and int(fields[17]) <= 1


def find_network_namespace(wanted: Identity) -> int:
    """A descriptor of a network namespace that some process is in or holds open; -1 where there is none."""
    name = f"net:[{wanted[1]}]"
    for pid in (entry for entry in os.listdir("/proc") if entry.isdigit()):
        for folder in (f"/proc/{pid}/ns", f"/proc/{pid}/fd"):
            try:
                found = [entry for entry in os.listdir(folder) if _leads_to(f"{folder}/{entry}", name)]
            except OSError:
                continue
            for entry in found:
                if (fd := open_if(f"{folder}/{entry}", wanted)) >= 0:
                    return fd
    return -1


def _leads_to(path: str, name: str) -> bool:
    """By the link's text: to look at what a user's descriptor leads to may take for ever."""
    try:
        return os.readlink(path) == name
    except OSError:
        return False


def open_if(path: str, wanted: Identity) -> int:
    """A descriptor of the namespace, if it is the wanted one; -1 otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    if identity(fd) == wanted:
        return fd
    os.close(fd)
    return -1


def open_ancestor(pid: int, namespace: Identity) -> int:
    """A descriptor of this user namespace, reached from a process in it or below it; -1 when it can't be."""
    try:
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    for _ in range(DEPTH):
        if identity(fd) == namespace:
            return fd
        try:
            parent = linux.parent_user_namespace(fd)
        except OSError:
            break  # The parent is above the caller's own.
        finally:
            os.close(fd)
        fd = parent
    else:
        os.close(fd)
    return -1
