"""RDMA in a container against the node's own namespace, and against TCP over the job's overlay. Needs root and qemu.

    sudo .venv/bin/python -m benchmarks.rdma [--rounds N] [--quick] [--json]

It runs in a guest (tests/vm), between two nodes of a trial cluster with a card each: Soft-RoCE, emulated, so that only
ratios mean something. Each round measures every case once, in an order that turns: in the node's namespace, in a
container with the device moved into its job's network, and TCP between the same containers.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from enclos.runtime.cluster.cluster import Cluster, Running

from benchmarks import command, machine
from benchmarks.result import Chart, Claim, Result, Table

NAME = "rdma"
TITLE = "verbs in a container, on the node, and TCP over the overlay"
ROUNDS, QUICK_ROUNDS = 10, 2
ROOT = Path(__file__).resolve().parents[1]
GUEST_SECONDS = 1500
SAMPLES = "rdma-samples.json"
CONFIG = 'rdma:\n  devices: ["rx*"]\n'
IMAGE = "/images/verbs.sqsh"
CASES = ("node", "container", "overlay TCP")
LATENCY, BANDWIDTH = "latency, us", "bandwidth, MB/s"
MARGIN = 0.03

# perftest's tables: bytes, iterations, then t_min t_max t_typical ... or BW peak, BW average.
ROW = re.compile(r"^\s*\d+\s+\d+\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", re.MULTILINE)
VERBS = {
    LATENCY: ("ib_write_lat -F -x 1 -s 2 -n 300", 3),
    BANDWIDTH: ("ib_write_bw -F -x 1 -s 65536 -n 100", 2),
}
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

Start = Callable[[str, str], Running]
"""Starts a script on a node."""
Samples = dict[str, dict[str, list[float]]]


def run(rounds: int = 0, quick: bool = False) -> Result:
    """Start a guest that measures, and judge what it brings."""
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    words = ["tests/vm/vm", "--kernel", "exclusive", "--timeout", str(GUEST_SECONDS), "run"]
    words += [".venv/bin/python", "-m", "benchmarks.rdma", "--rounds", str(rounds), "--into", f"/vm/{SAMPLES}"]
    subprocess.run(words, cwd=ROOT, stdout=sys.stderr, check=True)
    found = json.loads((ROOT / "build/vm/run-exclusive" / SAMPLES).read_text())
    return judge(found, Result(NAME, TITLE, machine=machine.describe()))


def judge(samples: Samples, result: Result) -> Result:
    """Tables, and the claim that a container costs verbs nothing."""
    for what, cases in samples.items():
        result.tables.append(Table.of_samples(what, cases))
        result.charts.append(Chart("spread", what.partition(",")[0], f"verbs and TCP: {what}", what[-4:], cases))
        medians = {case: statistics.median(values) for case, values in cases.items()}
        ratio = statistics.median(a / b for a, b in zip(cases["container"], cases["node"], strict=True))
        text = f"{what}: container to node 1.00 within {MARGIN:.0%} (median of the rounds' ratios)"
        result.claims.append(Claim(text, f"{ratio:.3f}", abs(ratio - 1) <= MARGIN))
        result.notes.append(f"{what}: TCP over the overlay is {medians['overlay TCP'] / medians['node']:.2f} of verbs")
    result.data = dict(samples)
    return result


# ---------------------------------------------------------------- in the guest


def measure(rounds: int) -> Samples:
    """All samples, one a round of each case."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cluster")]
    import fabric
    from vm import cards

    cards.require()
    cluster = Cluster.up("bench-rdma", 2, 4, config=CONFIG)
    try:
        fabric.plug_into(cluster)
        source = cluster.layout.shared / "stream.c"
        source.write_text(STREAM)
        subprocess.run(["cc", "-O2", "-static", "-o", cluster.layout.shared / "stream", source], check=True)
        fabric.make_image(cluster.layout.images)
        samples: Samples = {what: {case: [] for case in CASES} for what in VERBS}
        for number in range(rounds):
            turn = number % len(CASES)
            for case in CASES[turn:] + CASES[:turn]:
                _once(cluster, case, samples)
        return samples
    finally:
        Cluster.remove("bench-rdma")


def _once(cluster: Cluster, case: str, samples: Samples) -> None:
    if case == "overlay TCP":
        with _container(cluster, "--container-mounts=/shared:/shared:ro") as start:
            latency, bandwidth = _pair(start, "/shared/stream", "/shared/stream 10.77.0.2").split()
        samples[LATENCY][case].append(float(latency))
        samples[BANDWIDTH][case].append(float(bandwidth))
        return
    with _node(cluster) if case == "node" else _container(cluster, "--container-rdma=rx0,rx2") as start:
        peer = "10.78.0.2"
        for what, (program, column) in VERBS.items():
            row = ROW.search(_pair(start, program, f"{program} {peer}"))
            assert row is not None
            samples[what][case].append(float(row[column]))


def _pair(start: Start, server: str, client: str) -> str:
    """Both ends of one program; what the client printed."""
    with start("n2", f"timeout 60 {server}") as other:
        script = f"for i in 1 2 3 4 5 6 7 8; do timeout 60 {client} && exit 0; sleep 1; done; exit 1"
        with start("n1", script) as one:
            out, err = one.communicate(timeout=120)
        other.communicate(timeout=120)
    if one.returncode or other.returncode:
        raise RuntimeError(f"{client}: {out}{err}")
    return str(out)


@contextmanager
def _node(cluster: Cluster) -> Iterator[Start]:
    """In the nodes' namespaces, where the interfaces have addresses meanwhile."""
    for node, name, address in (("n1", "vf0", "10.78.0.1"), ("n2", "vf2", "10.78.0.2")):
        cluster.run(f"ip address add {address}/19 dev {name}", node=node)
    yield lambda node, script: cluster.popen(["sh", "-c", script], node=node)
    for node, name, address in (("n1", "vf0", "10.78.0.1"), ("n2", "vf2", "10.78.0.2")):
        cluster.run(f"ip address del {address}/19 dev {name}", node=node)


@contextmanager
def _container(cluster: Cluster, *options: str) -> Iterator[Start]:
    """In containers of one job, each end a step."""
    words = ["salloc", "-N2", "-n2", "-c1", "--no-shell"]
    found = re.search(r"Granted job allocation (\d+)", cluster.run(words, "usera", timeout=60).stderr)
    assert found is not None
    place = ["srun", f"--jobid={found[1]}", "-N1", "-n1", "--overlap", "--container-network=job"]

    def start(node: str, script: str) -> Running:
        own = [option.replace("rx0,rx2", "rx0" if node == "n1" else "rx2") for option in options]
        return cluster.popen([*place, "-w", node, f"--container-image={IMAGE}", *own, "sh", "-c", script], "usera")

    yield start
    cluster.run(["scancel", found[1]], "usera")
    cluster.await_idle(60)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all claims are kept, else 1."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help=f"samples per case (default: {ROUNDS})")
    parser.add_argument("--into", type=Path, help="in a guest: where the samples go")
    options = parser.parse_args(arguments)
    command.need_root()
    if options.into:
        begin = time.monotonic()
        options.into.write_text(json.dumps(measure(options.rounds)))
        print(f"rdma: {options.rounds} rounds in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        return 0
    return command.finish(run(options.rounds, options.quick), options)


if __name__ == "__main__":
    sys.exit(main())
