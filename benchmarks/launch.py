"""What a container adds to a step: wall time of srun, bare and in containers, interleaved in one run. Needs root.

    sudo .venv/bin/python -m benchmarks.launch [--rounds N] [--quick] [--json]

The step runs a static program that does nothing. Each round runs every case once, in an order that turns, so that
noise of the machine meets all alike; what counts is the difference of the medians. The image has been used before.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from enclos.runtime.cluster.cluster import Cluster

from benchmarks import command, loglines, machine
from benchmarks.figures import Figures, differences, standing_apart
from benchmarks.result import Chart, Claim, Result, Table
from benchmarks.stopwatch import CommandFailed, Stopwatch
from benchmarks.trial import BARE_PROGRAM, CONTAINER, IMAGE_PROGRAM, USER, trial

NAME = "launch"
TITLE = "what a container adds to a step"
CLUSTER = "bench-launch"
NODES = 4
ROUNDS, QUICK_ROUNDS, WARM_UP = 60, 8, 2
PAUSE_SECONDS = 0.15
ATTEMPTS = 3
"""A step may fail where Slurm itself stumbles; the round is taken again, and the failure is noted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many nodes and tasks a step has, and what a container may add to it."""

    name: str
    size: tuple[str, ...]
    tasks_per_node: int
    limit_ms: float
    within_job: bool = False


SHAPES = (
    Shape("1 node, 1 task", ("-N1", "-n1"), 1, 12.0),
    Shape("4 nodes, 16 tasks", ("-N4", "-n16", "--ntasks-per-node=4"), 4, 35.0),
    Shape("1 node, 1 task, a further step of a job", ("-N1", "-n1"), 1, 12.0, True),
)
CASES = {
    "bare": (),
    "container, host network": (*CONTAINER, "--container-network=host"),
    "container, job network": (*CONTAINER, "--container-network=job"),
}


def srun(shape: Shape, case: str) -> list[str]:
    """The command that is timed."""
    return ["srun", *shape.size, *CASES[case], IMAGE_PROGRAM if CASES[case] else BARE_PROGRAM]


@contextmanager
def stopwatch(cluster: Cluster, shape: Shape) -> Iterator[Stopwatch]:
    """A process that times srun: outside any job, or within one, where steps share the job's network."""
    prefix = ("salloc", "--quiet", *shape.size) if shape.within_job else ()
    with Stopwatch(cluster, USER, prefix) as watch:
        yield watch


def measure(watch: Stopwatch, shape: Shape, rounds: int, failures: list[str]) -> dict[str, list[float]]:
    """Milliseconds per case, one sample per round."""
    samples: dict[str, list[float]] = {case: [] for case in CASES}
    names = list(CASES)
    for number in range(rounds):
        turn = number % len(names)
        for case in names[turn:] + names[:turn]:
            samples[case].append(_once(watch, srun(shape, case), failures))
    return samples


def _once(watch: Stopwatch, words: Sequence[str], failures: list[str]) -> float:
    for _ in range(ATTEMPTS):
        try:
            return watch.time(words, PAUSE_SECONDS)
        except CommandFailed as error:
            failures.append(str(error))
    raise CommandFailed(failures[-1])


def run(rounds: int = 0, quick: bool = False) -> Result:
    """All shapes on one cluster."""
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    result = Result(NAME, TITLE, machine=machine.describe())
    with trial(CLUSTER, NODES) as cluster:
        for shape in SHAPES:
            failures: list[str] = []
            with stopwatch(cluster, shape) as watch:
                measure(watch, shape, WARM_UP, failures)
                before = {node: len(cluster.agent_log(node)) for node in cluster.nodes}
                samples = measure(watch, shape, rounds, failures)
            log = "\n".join(cluster.agent_log(node)[start:] for node, start in before.items())
            _report(result, shape, samples, log, failures)
    result.machine["load average after"] = machine.load()
    return result


def _report(
    result: Result, shape: Shape, samples: Mapping[str, list[float]], log: str, failures: Sequence[str]
) -> None:
    rows: dict[str, Sequence[float]] = dict(samples)
    for case in list(CASES)[1:]:
        rows[f"{case}: more than bare, by round"] = differences(samples["bare"], samples[case])
    result.tables.append(Table.of_samples(f"{shape.name}: wall time of srun, ms", rows))
    for case in list(CASES)[1:]:
        added = statistics.median(samples[case]) - statistics.median(samples["bare"])
        text = f"{shape.name}, {case}: at most {shape.limit_ms:g} ms over bare"
        result.claims.append(Claim(text, f"{added:+.1f} ms (difference of medians)", added <= shape.limit_ms))
    for case, values in samples.items():
        if far := standing_apart(values):
            texts = ", ".join(f"{value:.0f}" for value in far)
            result.notes.append(f"{shape.name}, {case}: standing apart, in the figures all the same: {texts} ms")
    for failure in failures:
        result.notes.append(f"{shape.name}: taken again after a failure: {failure}")
    result.charts.append(Chart("spread", shape.name, f"srun, {shape.name}", "ms", dict(samples)))
    result.data[shape.name] = dict(samples)
    _phases(result, shape, log)


def _phases(result: Result, shape: Shape, log: str) -> None:
    """Where the time goes on the node, from the agent's own log."""
    made = [line.ms for line in loglines.networks(log)]
    if made:
        result.tables.append(Table.of_samples(f"{shape.name}: the agent makes a job's network, ms", {"network": made}))
    for network in ("host", "job"):
        lines = [one for one in loglines.steps(log) if one.network == network and one.tasks == shape.tasks_per_node]
        if not lines:
            continue
        marks: dict[str, list[float]] = loglines.by_mark(lines)
        marks["the first task waits"] = [one.join_wait_ms for one in lines if one.join_wait_ms is not None]
        title = f"{shape.name}, {network} network"
        result.tables.append(Table.of_samples(f"{title}: events on the node, ms after PREPARE", marks))
        operations = loglines.by_operation(lines)
        result.tables.append(Table.of_samples(f"{title}: operations in the builder, ms", operations, digits=2))
        medians = {name: Figures.of(values).median for name, values in {**marks, **operations}.items()}
        result.data[f"{title}: medians on the node"] = medians


def main() -> int:
    """0 if all claims are kept, else 1."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help=f"samples per case (default: {ROUNDS})")
    options = parser.parse_args()
    command.need_root()
    return command.finish(run(options.rounds, options.quick), options)


if __name__ == "__main__":
    sys.exit(main())
