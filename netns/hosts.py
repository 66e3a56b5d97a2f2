"""The lines of /etc/hosts by which the nodes of a network find each other. Pure.

The container's whole file is written elsewhere; here is only what the network knows.
"""

from __future__ import annotations

from enclos.netns.spec import OverlaySpec


def hosts_lines(spec: OverlaySpec) -> str:
    """One line per node and family, `10.77.0.1 n1`, each with a newline, in the order of the indexes."""
    plan = spec.plan
    ipv4 = [f"{plan.ipv4(peer.index)} {peer.name}\n" for peer in spec.peers]
    ipv6 = [f"{plan.ipv6(peer.index)} {peer.name}\n" for peer in spec.peers]
    return "".join(ipv4 + ipv6)
