"""Which RDMA devices a step gets: what its user names, what the site lists, what its network allows. Pure.

A container on the node's network opens the device nodes of its own RDMA devices and no others'. On a job's network the
site's rdma.mode decides: devices move into it (exclusive), it has a Soft-RoCE device of its own (soft), or it gets
nodes as on the host (shared), which keeps nobody apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from enclos.netns.rdma import CONNECTION_MANAGER, NodeDevice, NodeRdma
from enclos.runtime import errors
from enclos.runtime.devices.cdi import Device, Edits, Node

KIND = "rdma"
AUTO, NONE = "auto", "none"


def wanted(option: str, default: str, network: str, mode: str) -> str:
    """What a step asks for, or what the site gives it where it says nothing; "" for nothing.

    Nobody is given what others could miss: unasked, a step on a private network gets only a device made for it.
    """
    if not option:
        given = network == "host" or (network == "job" and mode == "soft")
        return default if default != NONE and given else ""
    return "" if option == NONE else option


def check(text: str, network: str, mode: str, kernel: str) -> None:
    """Whether a step on that network can have RDMA as the site wants it.

    Args:
        text: what `wanted` returned, not empty.
        mode: rdma.mode.
        kernel: the kernel's mode, "" where it has no RDMA.

    Raises:
        EnclosError: rdma_missing, rdma_needs_network, rdma_not_isolated, rdma_kernel_exclusive.
    """
    if network == "none":
        raise errors.rdma_needs_network(text)
    if not kernel and not (network == "job" and mode == "soft"):  # Its driver brings the rest.
        raise errors.rdma_missing(text)
    if network != "job":
        return
    if mode == "exclusive" and kernel != "exclusive":
        raise errors.rdma_not_isolated(text, kernel)
    if mode != "exclusive" and kernel == "exclusive":
        raise errors.rdma_kernel_exclusive(text, mode)


def choose(text: str, asked: bool, listed: Sequence[str], node: NodeRdma) -> tuple[Device, ...]:
    """The devices for `text` ("auto", a number, or names) whose nodes are shared with other steps.

    Args:
        asked: it was the user who said it, who is told if there is nothing.
        listed: rdma.devices, and the names of the pools' VFs.

    Raises:
        EnclosError: rdma_unknown, rdma_forbidden, rdma_too_few.
    """
    usable = [device for device in node.devices if device.node and is_listed(device.name, listed)]
    active = [device for device in usable if device.active]
    if (names := named(text)) is not None:
        by_name = {device.name: device for device in usable}
        for name in names:
            if not is_listed(name, listed):
                raise errors.rdma_forbidden(text, name)
            if name not in by_name:
                raise errors.rdma_unknown(text, name, list(by_name))
        return tuple(describe(by_name[name]) for name in names)
    least = int(text) if text != AUTO else int(asked)
    if len(active) < least:
        raise errors.rdma_too_few(text, len(active))
    return tuple(describe(device) for device in (active if text == AUTO else active[:least]))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that may move into a network.

    Attributes:
        own: it is in the job's network already.
        ready: it has an active port, or an interface that comes up when it moves.
        busy: why it cannot move: what the node or another job does with it; "" where it can.
    """

    name: str
    own: bool = False
    ready: bool = True
    busy: str = ""


def choose_moving(text: str, listed: Sequence[str], candidates: Iterable[Candidate]) -> list[str]:
    """The names of the devices that a step on a job's network gets; those that the job has already come first.

    Args:
        candidates: of the node, in the order in which they are given; also those that are with other jobs.

    Raises:
        EnclosError: rdma_unknown, rdma_forbidden, rdma_in_use, rdma_too_few.
    """
    found = sorted((one for one in candidates if is_listed(one.name, listed)), key=lambda one: not one.own)
    if (names := named(text)) is not None:
        by_name = {one.name: one for one in found}
        for name in names:
            if not is_listed(name, listed):
                raise errors.rdma_forbidden(text, name)
            if name not in by_name:
                raise errors.rdma_unknown(text, name, list(by_name))
            if by_name[name].busy:
                raise errors.rdma_in_use(text, name, by_name[name].busy)
        return names
    free = [one.name for one in found if one.ready and not one.busy]
    least = int(text) if text != AUTO else 1
    if len(free) < least:
        busy = [f"{one.name}: {one.busy}" for one in found if one.busy]
        raise errors.rdma_too_few(text, len(free), busy)
    return free if text == AUTO else free[:least]


def named(text: str) -> list[str] | None:
    """The names in --container-rdma, each once; None for "auto" and a number."""
    return None if text == AUTO or text.isdigit() else list(dict.fromkeys(text.split(",")))


def is_listed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a device is one of those for containers."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def describe(found: NodeDevice) -> Device:
    """A device as containers get it: the node for its verbs, and the one for connections that all share."""
    origin = f"RDMA device {found.name}"
    shared = Edits(nodes=(Node(CONNECTION_MANAGER, CONNECTION_MANAGER, origin, optional=True),))
    return Device(KIND, found.name, Edits(nodes=(Node(found.node, found.node, origin),)), shared, origin)
