"""Which RDMA devices a step gets: what its user names, what the site lists. Pure.

A container on the node's network opens the device nodes of its own RDMA devices and no others'. In a private network it
gets none: devices are not moved there yet, and in the shared mode of the kernel they would not be private.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from enclos.netns.rdma import CONNECTION_MANAGER, NodeDevice, NodeRdma
from enclos.runtime import errors
from enclos.runtime.devices.cdi import Device, Edits, Node

KIND = "rdma"
AUTO, NONE = "auto", "none"


def wanted(option: str, default: str, network: str) -> str:
    """What a step asks for, or what the site gives it where it says nothing; "" for nothing."""
    if not option:
        return default if default != NONE and network == "host" else ""
    return "" if option == NONE else option


def choose(text: str, asked: bool, network: str, patterns: Sequence[str], node: NodeRdma) -> tuple[Device, ...]:
    """The devices for `text`: "auto", a number, or names.

    Args:
        text: what `wanted` returned, not empty.
        asked: it was the user who said it, who is told if there is nothing.
        patterns: rdma.devices.

    Raises:
        EnclosError: rdma_missing, rdma_needs_host, rdma_unknown, rdma_forbidden, rdma_too_few.
    """
    if asked and not node.mode:
        raise errors.rdma_missing(text)
    if network != "host":
        raise errors.rdma_needs_host(text, network, node.mode)
    usable = [device for device in node.devices if device.node and _listed(device.name, patterns)]
    active = [device for device in usable if device.active]
    if text != AUTO and not text.isdigit():
        return tuple(_device(_named(name, text, patterns, usable)) for name in dict.fromkeys(text.split(",")))
    least = int(text) if text != AUTO else int(asked)
    if len(active) < least:
        raise errors.rdma_too_few(text, len(active))
    return tuple(_device(device) for device in (active if text == AUTO else active[:least]))


def _listed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _named(name: str, text: str, patterns: Sequence[str], usable: Sequence[NodeDevice]) -> NodeDevice:
    if not _listed(name, patterns):
        raise errors.rdma_forbidden(text, name)
    found = next((device for device in usable if device.name == name), None)
    if found is None:
        raise errors.rdma_unknown(text, name, [device.name for device in usable])
    return found


def _device(found: NodeDevice) -> Device:
    origin = f"RDMA device {found.name}"
    shared = Edits(nodes=(Node(CONNECTION_MANAGER, CONNECTION_MANAGER, origin, optional=True),))
    return Device(KIND, found.name, Edits(nodes=(Node(found.node, found.node, origin),)), shared, origin)
