"""The RDMA devices that this node has: names, GUIDs, whether a port is up, and the device nodes that programs open.

Facts only; who may have which is decided elsewhere. Only the nodes of verbs (uverbs) are told, never those with which a
program could send management packets in everybody's name (umad, issm). Runs in the agent, and in `enclos check` as
anybody: the kernel tells this to all.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from enclos.netns import nldev
from enclos.netns.facts import DeviceMissing, KernelRefused
from enclos.netns.namespace import inside
from enclos.netns.netlink import Netlink

FOLDER = "/dev/infiniband"
CONNECTION_MANAGER = f"{FOLDER}/rdma_cm"
"""One for all devices: addresses are resolved in the namespace of who opens it."""
PORT_ACTIVE = 4


class NodeDevice(NamedTuple):
    """A device; `node` is the path of its uverbs node, "" where the module ib_uverbs is not loaded."""

    name: str
    guid: int
    active: bool
    node: str


class NodeRdma(NamedTuple):
    """What the node has; `mode` is "" where the kernel has no RDMA."""

    mode: str
    devices: tuple[NodeDevice, ...]


def find() -> NodeRdma:
    """Ask the kernel, in the network namespace of the caller.

    Raises:
        KernelRefused: it does not answer as it should.
    """
    try:
        nl = Netlink(nldev.NETLINK_RDMA)
    except OSError:  # EPROTONOSUPPORT: ib_core is not there.
        return NodeRdma("", ())
    with nl:
        return NodeRdma(nldev.mode(nl), tuple(_describe(nl, device) for device in nldev.devices(nl)))


def mode() -> str:
    """The kernel's mode, "" where it has no RDMA."""
    try:
        nl = Netlink(nldev.NETLINK_RDMA)
    except OSError:
        return ""
    with nl:
        return nldev.mode(nl)


def find_one(name: str, netns_fd: int) -> NodeDevice:
    """A device of another namespace; the kernel may have given it other nodes when it came there.

    Raises:
        DeviceMissing: it is not there.
        KernelRefused: the kernel does not answer as it should.
    """
    with inside(netns_fd), Netlink(nldev.NETLINK_RDMA) as nl:
        for device in nldev.devices(nl):
            if device.name == name:
                return _describe(nl, device)
    raise DeviceMissing(name)


def _describe(nl: Netlink, device: nldev.RdmaDevice) -> NodeDevice:
    active = any(port.state == PORT_ACTIVE for port in nldev.ports(nl, device))
    try:
        node = os.path.join(FOLDER, nldev.chardev(nl, device, "uverbs"))
    except KernelRefused:
        node = ""
    return NodeDevice(device.name, device.node_guid, active, node)
