"""RDMA in a container against the node's own namespace, and against TCP over the job's overlay. Needs root and qemu.

    sudo .venv/bin/python -m benchmarks.rdma [--rounds N] [--quick] [--json]

It runs in a guest (tests/vm), between two nodes of a trial cluster with two cards each: Soft-RoCE, emulated, so that
only ratios mean something. The guest has one processor and a clock that counts instructions, and its cards are pairs of
veth: by the host's clock, or where qemu carries the packets, ratios of single rounds went from 0.1 to 4. One card of
each node stays in the node's namespace, where a step without container uses it; the other one moves into the network of
a container's job. Both steps stay, so that all are measured seconds apart: each round measures every case once, every
second round the other way round. Half of the rounds have cards exchanged.

"node" is the node as it is without Enclos. Packets of Soft-RoCE pass the node's netfilter, so there the guard's table
costs them something, which is a case of its own; those of an adapter do not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from enclos.runtime.cluster.cluster import Cluster

from benchmarks import command, machine
from benchmarks.figures import median_interval
from benchmarks.result import Chart, Claim, Result, Table

if TYPE_CHECKING:
    from shells import Shells

NAME = "rdma"
TITLE = "verbs in a container, on the node, and TCP over the overlay"
ROUNDS, QUICK_ROUNDS = 30, 4
ROOT = Path(__file__).resolve().parents[1]
GUEST_SECONDS = 1500
SAMPLES = "rdma-samples.json"
CONFIG = 'rdma:\n  devices: ["rx*"]\n'
NODE, CONTAINER, GUARDED, OVERLAY = CASES = ("node", "container", "node with the guard", "overlay TCP")
LATENCY, BANDWIDTH = "latency, us", "bandwidth, MB/s"
MARGIN = 0.03
# Which cards are the node's, in the one half of the rounds and in the other.
HALVES = (("vf1", "vf3"), ("vf0", "vf2"))
# As the agent's own in 10.78.0.0/16.
ADDRESSES = {NODE: "10.79.0.2", CONTAINER: "10.78.0.2", GUARDED: "10.79.0.2", OVERLAY: "10.77.0.2"}
TABLE = "/run/guard.nft"

# What ibv_rc_pingpong says of its round trips: with events, for two programs that poll leave nobody else a processor.
# Messages of 4 kB: of long ones packets are lost, and sent again, which Soft-RoCE may answer by an error (status 9).
VERBS = {
    LATENCY: ("ibv_rc_pingpong -e -g 1 -s 2 -n 1000", re.compile(r"([\d.]+) usec/iter"), 1 / 2),
    BANDWIDTH: ("ibv_rc_pingpong -e -g 1 -s 4096 -n 1000", re.compile(r"([\d.]+) Mbit/sec"), 1 / 8),
}
ATTEMPTS = 3
# Round trips of two bytes, then a stream, between two ends of a TCP connection; prints both figures.
STREAM = """\
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static char block[65536];
static double now(void)
{
\tstruct timespec t;
\tclock_gettime(CLOCK_MONOTONIC, &t);
\treturn t.tv_sec + t.tv_nsec / 1e9;
}
static void all(int fd, int out, size_t size)
{
\tfor (size_t done = 0; done < size;) {
\t\tssize_t n = out ? write(fd, block, size - done) : read(fd, block, size - done);
\t\tif (n <= 0)
\t\t\texit(1);
\t\tdone += n;
\t}
}
int main(int argc, char **argv)
{
\tstruct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(5000)};
\tint one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
\tif (argc < 2) {
\t\tsetsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
\t\tbind(fd, (void *)&a, sizeof a);
\t\tlisten(fd, 1);
\t\tfd = accept(fd, NULL, NULL);
\t} else {
\t\tinet_pton(AF_INET, argv[1], &a.sin_addr);
\t\tif (connect(fd, (void *)&a, sizeof a))
\t\t\treturn 1;
\t}
\tsetsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
\tdouble start = now();
\tfor (int i = 0; i < 300; i++) {
\t\tall(fd, argc > 1, 2);
\t\tall(fd, argc < 2, 2);
\t}
\tdouble middle = now();
\tfor (int i = 0; i < 100; i++)
\t\tall(fd, argc > 1, sizeof block);
\tall(fd, argc < 2, 1);
\tprintf("%f %f\\n", (middle - start) / 600 * 1e6, 100 * sizeof block / (now() - middle) / 1e6);
\treturn 0;
}
"""

Samples = dict[str, dict[str, list[float]]]


def run(rounds: int = 0, quick: bool = False) -> Result:
    """Start a guest that measures, and judge what it brings."""
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    words = ["tests/vm/vm", "--kernel", "exclusive", "--counting", "--cpus", "1", "--timeout", str(GUEST_SECONDS)]
    words += ["run", ".venv/bin/python", "-m", "benchmarks.rdma", "--rounds", str(rounds), "--into", f"/vm/{SAMPLES}"]
    subprocess.run(words, cwd=ROOT, stdout=sys.stderr, check=True)
    found = json.loads((ROOT / "build/vm/run-exclusive" / SAMPLES).read_text())
    return judge(found, Result(NAME, TITLE, machine=machine.describe()))


def judge(samples: Samples, result: Result) -> Result:
    """Tables, and the claim that a container costs verbs nothing."""
    for what, cases in samples.items():
        result.tables.append(Table.of_samples(what, cases))
        result.charts.append(Chart("spread", what.partition(",")[0], f"verbs and TCP: {what}", what[-4:], cases))
        ratios = [a / b for a, b in zip(cases[CONTAINER], cases[NODE], strict=True)]
        low, high = median_interval(ratios)
        text = f"{what}: container to node 1.00 within {MARGIN:.0%} (median of the rounds' ratios, interval of 95 %)"
        measured = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        result.claims.append(Claim(text, measured, low >= 1 - MARGIN and high <= 1 + MARGIN))
        medians = {case: statistics.median(values) for case, values in cases.items()}
        guarded = statistics.median(a / b for a, b in zip(cases[GUARDED], cases[NODE], strict=True))
        result.notes.append(f"{what}: with the guard's table the node has {guarded:.3f} of what it has without")
        result.notes.append(f"{what}: TCP over the overlay is {medians[OVERLAY] / medians[NODE]:.2f} of verbs")
    result.data = dict(samples)
    return result


# ---------------------------------------------------------------- in the guest


def measure(rounds: int, into: Path) -> None:
    """All samples, one a round of each case; written after each round, so that a guest that is ended leaves some."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cluster")]
    import fabric
    from vm import verbs

    cluster = Cluster.up("bench-rdma", 2, 4, config=CONFIG)
    try:
        fabric.plug_into(cluster, cables=False)
        verbs.install(cluster.layout.images)
        source = cluster.layout.shared / "stream.c"
        source.write_text(STREAM)
        subprocess.run(["cc", "-O2", "-static", "-o", cluster.layout.shared / "stream", source], check=True)
        samples: Samples = {what: {case: [] for case in CASES} for what in VERBS}
        for half, cards in enumerate(HALVES):
            with _steps(cluster, cards, f"--container-image={verbs.IMAGE}") as steps:
                _take_over_guard(cluster)
                for number in range((rounds + half) // len(HALVES)):
                    _round(cluster, steps, samples, CASES[:: -1 if number % 2 else 1])
                    into.write_text(json.dumps(samples))
                _give_back_guard(cluster)
    finally:
        Cluster.remove("bench-rdma")


@contextmanager
def _steps(cluster: Cluster, cards: tuple[str, str], image: str) -> Iterator[dict[str, Shells]]:
    """A step without container, with these cards, and one in containers, to which the other ones move."""
    from shells import Shells

    rows = list(zip(cluster.nodes, cards, ("10.79.0.1/19", "10.79.0.2/19"), strict=True))
    for node, card, address in rows:
        cluster.run(f"ip address add {address} dev {card}", node=node)
    options = (image, "--container-network=job", "--container-rdma=1", "--container-mounts=/shared:/shared:ro")
    with Shells(cluster, "usera", cluster.nodes) as bare, Shells(cluster, "usera", cluster.nodes, *options) as inside:
        yield {NODE: bare, CONTAINER: inside, GUARDED: bare, OVERLAY: inside}
    cluster.await_idle(60)
    for node, card, address in rows:
        cluster.run(f"ip address del {address} dev {card}", node=node)


def _take_over_guard(cluster: Cluster) -> None:
    """Take the guard's table away; the agents, which would bring it back, wait meanwhile."""
    for node in cluster.nodes:
        os.kill(cluster.agent_pid(node), signal.SIGSTOP)
        _on(cluster, node, f"nft list table inet enclos > {TABLE}; nft delete table inet enclos")


def _give_back_guard(cluster: Cluster) -> None:
    for node in cluster.nodes:
        _on(cluster, node, f"nft -f {TABLE}")
        os.kill(cluster.agent_pid(node), signal.SIGCONT)


@contextmanager
def _guard(cluster: Cluster, case: str) -> Iterator[None]:
    """The table is there for the case that is about it."""
    if case == GUARDED:
        for node in cluster.nodes:
            _on(cluster, node, f"nft -f {TABLE}")
    yield
    if case == GUARDED:
        for node in cluster.nodes:
            _on(cluster, node, "nft delete table inet enclos")


def _on(cluster: Cluster, node: str, script: str) -> None:
    done = cluster.run(f"set -e; {script}", node=node)
    if done.returncode != 0:
        raise RuntimeError(f"{script}: {done.stderr}")


def _round(cluster: Cluster, steps: dict[str, Shells], samples: Samples, order: Sequence[str]) -> None:
    for case in order:
        if case == OVERLAY:
            latency, bandwidth = _pair(steps[case], "/shared/stream", ADDRESSES[case]).split()[-2:]
            samples[LATENCY][case].append(float(latency))
            samples[BANDWIDTH][case].append(float(bandwidth))
    for what, (program, figure, factor) in VERBS.items():
        for case in (case for case in order if case != OVERLAY):
            with _guard(cluster, case):
                text = _pair(steps[case], program, ADDRESSES[case])
            if (found := figure.search(text)) is None:
                raise RuntimeError(f"{program} ({case}) printed no figure: {text}")
            samples[what][case].append(float(found[1]) * factor)


def _pair(shells: Shells, program: str, server: str) -> str:
    """Both ends of one program; what the client printed."""
    client = f"timeout 60 {program} {server}"
    for _ in range(ATTEMPTS):
        shells.tell("n2", f"exec timeout 60 {program}")
        # The server needs a moment until it listens.
        said = shells.run("n1", f"for i in $(seq 30); do {client} && exit 0; sleep 0.2; done; exit 1")
        other = shells.hear("n2")
        if said.status == other.status == 0:
            return said.text
    raise RuntimeError(f"{client}: {said.text}{other.text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all claims are kept, else 1."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help=f"samples per case (default: {ROUNDS})")
    parser.add_argument("--into", type=Path, help="in a guest: where the samples go")
    options = parser.parse_args(arguments)
    command.need_root()
    if options.into:
        begin = time.monotonic()
        measure(options.rounds, options.into)
        print(f"rdma: {options.rounds} rounds in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        return 0
    return command.finish(run(options.rounds, options.quick), options)


if __name__ == "__main__":
    sys.exit(main())
