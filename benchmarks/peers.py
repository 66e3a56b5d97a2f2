"""How long it takes to give one namespace the entries for 10,000 peers. Needs root; at most 0.5 s is wanted.

    sudo .venv/bin/python benchmarks/peers.py [--peers N] [--rounds N] [--json]

Each round makes a namespace with its vxlan device and sends everything that the agent would: addresses,
forwarding entries, neighbours (underlay, IPv4, IPv6) and routes. `create` is the whole of it, packing and
namespace included, as the agent pays for it; the parts below it are sent one kind at a time in rounds of
their own, to show where the time goes. `scattered` are the routes when no two underlay addresses adjoin.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from enclos.netns import link, namespace, overlay, peers
from enclos.netns.batch import Batch
from enclos.netns.names import mac_bytes
from enclos.netns.netlink import Netlink
from enclos.netns.spec import OverlaySpec, Peer
from enclos.runtime.linux import CLONE_NEWNET, unshare

WANTED_SECONDS = 0.5
VNI = 77
BLOCK = 20 << 24


def underlay_address(place: int, step: int) -> str:
    """The place-th address of 20.0.0.0/8, `step` apart."""
    number = BLOCK + 1 + place * step
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


def specification(count: int, step: int = 1) -> OverlaySpec:
    """A network of `count` peers and this node."""
    nodes = tuple(Peer(place, f"n{place}", underlay_address(place, step)) for place in range(count + 1))
    return OverlaySpec(
        VNI, 4789, "enclos0", 1450, 0, nodes[0].underlay, 0, nodes, "10.77.0.0/16", "fd65:6e63:6c6f::/48"
    )


@contextmanager
def device(spec: OverlaySpec) -> Iterator[tuple[Netlink, int]]:
    """A namespace with the bare device, up, with its addresses; a session in it, and the device's index."""
    bare = dataclasses.replace(spec, peers=spec.peers[:1])
    fd = overlay.create(bare)
    with namespace.session_in(fd) as nl:
        yield nl, link.get_link(nl, spec.ifname).ifindex
    overlay.remove(fd, spec.ifname)
    os.close(fd)


def parts(spec: OverlaySpec, scattered: OverlaySpec) -> dict[str, Callable[[Batch, int], None]]:
    """Each kind of entry by itself."""
    others = spec.peers[1:]
    macs = [mac_bytes(VNI, peer.index) for peer in others]
    below = [link.pack_address(peer.underlay) for peer in others]
    far = [link.pack_address(peer.underlay) for peer in scattered.peers[1:]]
    names = [peer.name for peer in others]
    plan = spec.plan
    ipv4 = [plan.ipv4_int(peer.index).to_bytes(4, "big") for peer in others]
    ipv6 = [plan.ipv6_int(peer.index).to_bytes(16, "big") for peer in others]
    pairs = {name: list(zip(of, macs, strict=True)) for name, of in (("u", below), ("4", ipv4), ("6", ipv6))}
    return {
        "forwarding entries": lambda b, i: b.extend(link.add_forwarding(i, pairs["u"], 4), "fdb", names),
        "neighbours, underlay": lambda b, i: b.extend(link.add_neighbours(i, pairs["u"], 4), "neighbour", names),
        "neighbours, IPv4": lambda b, i: b.extend(link.add_neighbours(i, pairs["4"], 4), "neighbour", names),
        "neighbours, IPv6": lambda b, i: b.extend(link.add_neighbours(i, pairs["6"], 6), "neighbour", names),
        "routes, overlay": lambda b, i: peers.overlay_routes(b, spec, i, True),
        "routes, underlay": lambda b, i: peers.underlay_routes(b, spec, i, below),
        "routes, underlay, scattered": lambda b, i: peers.underlay_routes(b, scattered, i, far),
    }


def measure(spec: OverlaySpec, scattered: OverlaySpec, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what was done; the kinds take turns, so that noise meets all alike."""
    kinds = parts(spec, scattered)
    times: dict[str, list[float]] = {"create": [], "create, scattered": [], "packing alone": []}
    times |= {name: [] for name in kinds}
    for _ in range(rounds):
        for name, wanted in (("create", spec), ("create, scattered", scattered)):
            start = time.perf_counter()
            fd = overlay.create(wanted)
            times[name].append(time.perf_counter() - start)
            overlay.remove(fd, wanted.ifname)
            os.close(fd)
        start = time.perf_counter()
        list(peers.network_batch(spec, 2).chunks(1 << 17))
        times["packing alone"].append(time.perf_counter() - start)
        for name, fill in kinds.items():
            with device(spec) as (nl, index):
                start = time.perf_counter()
                batch = Batch()
                fill(batch, index)
                nl.run(batch)
                times[name].append(time.perf_counter() - start)
    return times


def report(times: dict[str, list[float]], count: int) -> None:
    """A table: median, lowest and highest of the rounds, in milliseconds."""
    print(f"{count} peers, {len(times['create'])} rounds; milliseconds")
    print(f"{'':30}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name, seconds in times.items():
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        print(f"{name:30}" + "".join(f"{1000 * figure:10.1f}" for figure in figures))


def main() -> int:
    """0 if the median of `create` is within the goal for 10,000 peers, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("benchmarks/peers.py: needs root, it makes network namespaces")
    # Everything happens in a namespace of our own: no VNI, port or rule of the machine is in the way.
    unshare(CLONE_NEWNET)
    spec, scattered = specification(arguments.peers), specification(arguments.peers, step=2)
    times = measure(spec, scattered, arguments.rounds)
    if arguments.json:
        print(json.dumps({"peers": arguments.peers, "seconds": times}))
    else:
        report(times, arguments.peers)
    worst = max(statistics.median(times[name]) for name in ("create", "create, scattered"))
    return 0 if worst <= WANTED_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
