"""A job's network on one node: made in one go, removed at once. Reads from top to bottom as it happens.

Privileged: runs in the agent, which has one thread and is in the node's network namespace. Knows neither
jobs nor steps; what to make is in the OverlaySpec.
"""

from __future__ import annotations

import errno
import os

from enclos.netns import link
from enclos.netns.batch import Batch
from enclos.netns.diag import udp_port_owner
from enclos.netns.facts import KernelRefused, PortTaken, VniInUse
from enclos.netns.hosts import hosts_lines
from enclos.netns.names import birth_name, mac_bytes, namespace_number
from enclos.netns.namespace import create_private, has_ipv6, new_namespace, session_in
from enclos.netns.netlink import Netlink
from enclos.netns.peers import alone_batch, network_batch
from enclos.netns.spec import OverlaySpec, Peer

__all__ = [
    "ALONE_MTU",
    "OverlaySpec",
    "Peer",
    "create",
    "create_alone",
    "create_private",
    "hosts_lines",
    "remove",
    "remove_lost",
]


ALONE_MTU = 1450
"""Of a network without other nodes: what most have."""
NOWHERE = b"\x7f\0\0\1"


def create(spec: OverlaySpec) -> int:
    """Make a network namespace with the node's end of the network in it, ready for traffic.

    The vxlan device comes to life in the new namespace; only its UDP socket is in the node's. On failure
    nothing is left. The process stays in its own network namespace.

    Returns:
        The namespace's descriptor, close-on-exec, the caller's.

    Raises:
        VniInUse: a device of this node has the VNI and port.
        PortTaken: somebody else's socket has the port (hold_port() prevents it).
        BlockTooSmall: more nodes than addresses.
        KernelRefused: anything else; .object is what was being made.
    """
    netns_fd, inner = new_namespace()
    with inner:
        try:
            with Netlink() as outer:
                _name_namespace(spec.vni, netns_fd, outer)
                _create_device(spec, netns_fd, inner, outer)
            try:
                _fill(spec, inner)
            except BaseException:
                # The end of a namespace is asynchronous; the VNI has to be free when we return.
                remove(netns_fd, birth_name(spec.vni))
                remove(netns_fd, spec.ifname)
                raise
        except BaseException:
            os.close(netns_fd)
            raise
    return netns_fd


def create_alone(spec: OverlaySpec) -> int:
    """The same for a network without other nodes: nothing of it is in the node's namespace, nor leaves its own.

    Of the spec `local` and `underlay_ifindex` do not count. The device is there because programs look for an interface
    that is not the loopback; its tunnel leads nowhere. It ends with the namespace.

    Returns and raises as `create`.
    """
    netns_fd, inner = new_namespace()
    with inner:
        try:
            name = birth_name(spec.vni)
            batch = Batch()
            request = link.create_vxlan(name, spec.vni, spec.port, NOWHERE, mac=mac_bytes(spec.vni, 0), mtu=spec.mtu)
            batch.add(request, f"vxlan device {name}")
            inner.run(batch)
            inner.run(alone_batch(spec, link.get_link(inner, name).ifindex, has_ipv6()))
        except BaseException:
            os.close(netns_fd)
            raise
    return netns_fd


def _name_namespace(vni: int, netns_fd: int, outer: Netlink) -> None:
    """So that an agent after this one can remove the device, whoever holds the namespace then: see remove_lost.

    The number is taken (EEXIST) while somebody holds the namespace of a network that had the VNI before; that one's
    device is gone, and this one does without.
    """
    batch = Batch()
    batch.add(link.name_namespace(netns_fd, namespace_number(vni)), f"namespace of VNI {vni}")
    try:
        outer.run(batch)
    except KernelRefused as refused:
        if refused.errno != errno.EEXIST:
            raise


def _create_device(spec: OverlaySpec, netns_fd: int, inner: Netlink, outer: Netlink) -> None:
    """One request, sent in the node's namespace, so that the tunnel's socket is there."""
    name = birth_name(spec.vni)
    batch = Batch()
    request = link.create_vxlan(
        name,
        spec.vni,
        spec.port,
        link.pack_address(spec.local),
        spec.underlay_ifindex,
        netns_fd,
        mac_bytes(spec.vni, spec.index),
        spec.mtu,
    )
    batch.add(request, f"vxlan device of VNI {spec.vni}")
    try:
        outer.run(batch)
    except KernelRefused as refused:
        # EEXIST means a taken name or a taken VNI. Nobody but us is in the new namespace, and up to kernel
        # 6.13 the name is looked up in ours: if neither has it, it is the VNI.
        if refused.errno == errno.EEXIST and not _has_link(inner, name) and not _has_link(outer, name):
            raise VniInUse(spec.vni) from refused
        raise


def _fill(spec: OverlaySpec, inner: Netlink) -> None:
    index = link.get_link(inner, birth_name(spec.vni)).ifindex
    try:
        inner.run(network_batch(spec, index, has_ipv6()))
    except KernelRefused as refused:
        if refused.errno == errno.EADDRINUSE and refused.object == spec.ifname:
            family = link.FAMILY[link.ip_version(spec.local)]
            raise PortTaken(spec.port, family, udp_port_owner(spec.port)) from refused
        raise


def _has_link(nl: Netlink, name: str) -> bool:
    try:
        link.get_link(nl, name)
    except KernelRefused as refused:
        if refused.errno == errno.ENODEV:
            return False
        raise
    return True


def remove(netns_fd: int, ifname: str) -> None:
    """Delete the device now; missing is fine. The VNI is free afterwards.

    Closing the descriptor would not do: a user's descriptor of the namespace, or a TCP socket with unsent
    data and no process, keeps it alive for minutes.
    """
    batch = Batch()
    batch.add(link.delete_link(ifname), ifname)
    with session_in(netns_fd) as nl:
        try:
            nl.run(batch)
        except KernelRefused as refused:
            if refused.errno != errno.ENODEV:
                raise


def remove_lost(vni: int, ifname: str) -> None:
    """Delete the device of a namespace that nobody of ours has a descriptor of; missing is fine.

    For an agent that starts: the one before it was killed, and what keeps the namespace alive is a descriptor of a
    user, or a TCP socket with unsent data and no process.
    """
    with Netlink() as nl:
        for name in (birth_name(vni), ifname):
            batch = Batch()
            batch.add(link.delete_link_in(namespace_number(vni), name), name)
            try:
                nl.run(batch)
            except KernelRefused as refused:
                # EINVAL: no namespace has the number any more.
                if refused.errno not in (errno.ENODEV, errno.EINVAL):
                    raise
