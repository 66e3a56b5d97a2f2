"""The agent's log read back: the line per step, and the line per network. Pure.

A step's line ends in marks, `NAME@MS` since PREPARE, a colon, and `OPERATION=MS` of the builder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A path may hold anything that marks hold, so they are looked for after the last field.
STEP = re.compile(r"\bstep=(?P<step>\d+\.\d+) (?P<fields>uid=.* attempt=\d+) (?P<marks>[^:=]*): (?P<rest>.*)$")
NETWORK = re.compile(r"\bjob=(?P<job>\d+) network made: .*?nodes=(?P<nodes>\d+) in (?P<ms>\d+\.\d+) ms")
FIELD = re.compile(r"(\w+)=(\S+)")
MARK = re.compile(r"(\S+)@(\d+\.\d+)")
OPERATION = re.compile(r"(\w+)=(\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class StepLine:
    """One container that was made: when what happened, and how long the builder's operations took, in ms."""

    step: str
    network: str
    tasks: int
    marks: tuple[tuple[str, float], ...]
    operations: dict[str, float]

    @property
    def join_wait_ms(self) -> float | None:
        """From the first task's JOIN to its answer; None where a mark is missing."""
        joined = [ms for name, ms in self.marks if name == "joined"]
        return self.marks[-1][1] - joined[0] if joined else None


@dataclass(frozen=True, slots=True)
class NetworkLine:
    """One job's network that was made on a node."""

    job: int
    nodes: int
    ms: float


def steps(log: str) -> list[StepLine]:
    """Every step whose container became ready; other lines are passed over."""
    found = []
    for line in log.splitlines():
        match = STEP.search(line)
        if match is None:
            continue
        fields = dict(FIELD.findall(match["fields"]))
        found.append(
            StepLine(
                match["step"],
                fields.get("network", ""),
                int(fields.get("tasks", "0")),
                numbered(MARK.findall(match["marks"])),
                {name: float(ms) for name, ms in OPERATION.findall(match["rest"])},
            )
        )
    return found


def numbered(marks: Iterable[tuple[str, str]]) -> tuple[tuple[str, float], ...]:
    """A mark that occurs again gets a number, so that each name is one event: ready, ready#2."""
    seen: dict[str, int] = {}
    result = []
    for name, ms in marks:
        seen[name] = seen.get(name, 0) + 1
        result.append((name if seen[name] == 1 else f"{name}#{seen[name]}", float(ms)))
    return tuple(result)


def networks(log: str) -> list[NetworkLine]:
    """Every network that was made."""
    found = (NETWORK.search(line) for line in log.splitlines())
    return [NetworkLine(int(match["job"]), int(match["nodes"]), float(match["ms"])) for match in found if match]


def by_mark(lines: Sequence[StepLine]) -> dict[str, list[float]]:
    """Samples of each mark, in the order of their medians."""
    samples: dict[str, list[float]] = {}
    for line in lines:
        for name, ms in line.marks:
            samples.setdefault(name, []).append(ms)
    return dict(sorted(samples.items(), key=lambda item: sorted(item[1])[len(item[1]) // 2]))


def by_operation(lines: Sequence[StepLine], most: int = 8) -> dict[str, list[float]]:
    """Samples of the costliest operations, those first, then of all together.

    OpenImage, JoinNetwork and EnterUserNamespace ask the agent for something, and their times hold its answer's.
    """
    samples: dict[str, list[float]] = {}
    for line in lines:
        for name, ms in line.operations.items():
            samples.setdefault(name, []).append(ms)
    costly = sorted(samples.items(), key=lambda item: -sum(item[1]) / len(item[1]))[:most]
    return {**dict(costly), "all operations": [sum(line.operations.values()) for line in lines]}
