"""Keeping the tunnels' UDP port: a vxlan device per address family that does nothing else.

Privileged: runs in the agent, in the node's network namespace. The devices stay when the agent ends: any
user who binds the port while no tunnel is up would make every later network of the node fail.

The kernel lets devices share one socket per family and port, so the tunnels of jobs join the holder's.
Nothing can come in through a holder: its VNI is in no set, and the guard drops what it would deliver.
"""

from __future__ import annotations

import errno

from enclos.netns import link
from enclos.netns.batch import Batch
from enclos.netns.diag import udp_port_owner
from enclos.netns.facts import KernelRefused, PortTaken
from enclos.netns.names import HOLDER_NAMES, HOLDER_VNI
from enclos.netns.namespace import has_ipv6
from enclos.netns.netlink import Netlink

ANY_ADDRESS = {4: bytes(4), 6: bytes(16)}


def hold_port(port: int) -> None:
    """Ensure that one device per family is up with this UDP port. One that is there is kept if it fits.

    Raises:
        PortTaken: somebody's socket has the port; .uid says whose.
        KernelRefused: EEXIST if another device has our name or the reserved VNI.
    """
    with Netlink() as nl:
        for version in (4, 6) if has_ipv6() else (4,):
            _hold(nl, version, port)


def _hold(nl: Netlink, version: int, port: int) -> None:
    name = HOLDER_NAMES[version]
    present = _find(nl, name)
    if present and (present.vni, present.port) != (HOLDER_VNI, port):
        if present.vni != HOLDER_VNI:
            raise KernelRefused(errno.EEXIST, name, f"a {present.kind or 'foreign'} device has this name")
        # The port in the settings has changed. Tunnels of running jobs hold the old one by themselves.
        _run(nl, link.delete_link(name), name)
        present = None
    if not present:
        _run(nl, link.create_vxlan(name, HOLDER_VNI, port, ANY_ADDRESS[version]), name)
        present = link.get_link(nl, name)
        _run(nl, link.without_link_local(present.ifindex), name)
    if not present.flags & link.IFF_UP:
        try:
            _run(nl, link.set_up(present.ifindex), name)
        except KernelRefused as refused:
            _run(nl, link.delete_link(name), name)
            if refused.errno == errno.EADDRINUSE:
                raise PortTaken(port, link.FAMILY[version], udp_port_owner(port)) from refused
            raise


def release_port() -> None:
    """Remove the holders; missing is fine."""
    with Netlink() as nl:
        for name in HOLDER_NAMES.values():
            if _find(nl, name):
                _run(nl, link.delete_link(name), name)


def _find(nl: Netlink, name: str) -> link.Link | None:
    try:
        return link.get_link(nl, name)
    except KernelRefused as refused:
        if refused.errno == errno.ENODEV:
            return None
        raise


def _run(nl: Netlink, request: bytes, name: str) -> None:
    batch = Batch()
    batch.add(request, name)
    nl.run(batch)
