"""Network namespaces: new ones with their sysctls, and doing something inside another.

Privileged: runs in the agent, which has one thread, so a namespace that is entered and left again is seen
by nobody else. That we come back is checked by nothing less than `finally`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enclos.netns.batch import Batch
from enclos.netns.facts import KernelRefused
from enclos.netns.link import set_up
from enclos.netns.netlink import Netlink
from enclos.runtime.linux import CLONE_NEWNET, setns, unshare

OWN = "/proc/thread-self/ns/net"
LOOPBACK_INDEX = 1
SYSCTLS = {
    # Services and ping work without the capabilities that nobody has over this namespace.
    "ipv4/ip_unprivileged_port_start": "0",
    "ipv4/ping_group_range": "0 2147483647",
}


@contextmanager
def returning() -> Iterator[None]:
    """Come back to the present network namespace, whatever happens."""
    own = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        setns(own, CLONE_NEWNET)
        os.close(own)


@contextmanager
def inside(netns_fd: int) -> Iterator[None]:
    """Run the body in this namespace. Sockets made there stay there; /proc/sys/net is that namespace's."""
    with returning():
        setns(netns_fd, CLONE_NEWNET)
        yield


def session_in(netns_fd: int) -> Netlink:
    """An rtnetlink session in that namespace; the caller closes it."""
    with inside(netns_fd):
        return Netlink()


def new_namespace() -> tuple[int, Netlink]:
    """A namespace with only a loopback that is down, its sysctls set, and a session in it.

    Returns:
        Descriptor and session, both the caller's.

    Raises:
        KernelRefused: ENOSPC is user.max_net_namespaces.
    """
    with returning():
        try:
            unshare(CLONE_NEWNET)
        except OSError as error:
            raise KernelRefused(error.errno or 0, "network namespace", error.strerror or "") from error
        netns_fd = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for name, value in SYSCTLS.items():
                write_sysctl(name, value)
            if has_ipv6():
                # Booted with ipv6.disable_ipv6=1, every new namespace starts without.
                _enable_ipv6()
            return netns_fd, Netlink()
        except BaseException:
            os.close(netns_fd)
            raise


def _enable_ipv6() -> None:
    """Read first: the write takes the kernel's lock of all networks, by trying again until it has it."""
    with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "rb", buffering=0) as file:
        if file.read(4) == b"0\n":
            return
    write_sysctl("ipv6/conf/all/disable_ipv6", "0")


def write_sysctl(name: str, value: str) -> None:
    """`ipv4/NAME` of the namespace that the process is in."""
    try:
        fd = os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused(error.errno or 0, f"sysctl net/{name}", error.strerror or "") from error
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise KernelRefused(error.errno or 0, f"sysctl net/{name}", error.strerror or "") from error
    finally:
        os.close(fd)


def has_ipv6() -> bool:
    """False where the kernel runs with ipv6.disable=1 or was built without."""
    return Path("/proc/sys/net/ipv6").exists()


def create_private() -> int:
    """A namespace with only a loopback, up. Returns its descriptor, close-on-exec, the caller's."""
    netns_fd, nl = new_namespace()
    with nl:
        try:
            batch = Batch()
            batch.add(set_up(LOOPBACK_INDEX), "loopback")
            nl.run(batch)
        except BaseException:
            os.close(netns_fd)
            raise
    return netns_fd
