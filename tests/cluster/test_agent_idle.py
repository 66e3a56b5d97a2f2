"""The agent at rest: it does not wake up, and steps leave it as many descriptors as it had.

Both are read from /proc, of the agent and of the processes that stay with it. Memory over many steps is a benchmark
(benchmarks/agent.py).
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Run
from enclos.runtime.cluster.cluster import Cluster
from faults import spare

IDLE_SECONDS = 5.0
STEPS = 20
SETTLE_SECONDS = 10.0
STAYING = ["enclos-spare", "enclos-visitors", "enclos-zygote"]


def descendants(pid: int) -> dict[str, int]:
    """Children of a process and theirs, by name; of two with one name, one gets its pid added."""
    found: dict[str, int] = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                name = Path(f"/proc/{child}/comm").read_text().strip()
                found[f"{name} {child}" if name in found else name] = int(child)
                found |= descendants(int(child))
    return found


def processes(cluster: Cluster, node: str) -> dict[str, int]:
    """The agent and the processes that stay with it, when there is no step and no other process any more."""
    agent = cluster.agent_pid(node)
    records = cluster.path_on(node, "/run/enclos/journal")
    deadline = time.monotonic() + SETTLE_SECONDS
    while list(records.glob("step.*")) or sorted(descendants(agent)) != STAYING:
        assert time.monotonic() < deadline, f"{node}: {os.listdir(records)}, {descendants(agent)}"
        time.sleep(0.05)
    spare(cluster, node)
    return {f"{node} {name}": pid for name, pid in {"enclosd": agent, **descendants(agent)}.items()}


def everywhere(cluster: Cluster) -> dict[str, int]:
    """The processes of all nodes."""
    return {name: pid for node in cluster.nodes for name, pid in processes(cluster, node).items()}


def switches(pid: int) -> int:
    """How often the threads of a process have stopped running: each time it had been woken before."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        rows = (row.split() for row in status.read_text().splitlines())
        total += sum(int(row[1]) for row in rows if row[0].endswith("voluntary_ctxt_switches:"))
    return total


def descriptors(pid: int) -> dict[str, int]:
    """Open descriptors by what they are; numbers of sockets and pipes are left out."""
    found: dict[str, int] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        kind = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0]
        found[kind] = found.get(kind, 0) + 1
    return found


def step(cluster: Cluster, image: str, network: str) -> list[str]:
    """A step on every node, with two tasks on each."""
    nodes = len(cluster.nodes)
    container = [f"--container-image={image}", f"--container-network={network}"]
    return ["srun", f"-N{nodes}", f"-n{2 * nodes}", *container, "true"]


@pytest.fixture
def rested(idle: Cluster, usera: Run, image: str) -> Cluster:
    """The cluster after a step of each kind, so that what is made once has been made."""
    for network in ("job", "host"):
        done = usera(step(idle, image, network))
        assert done.returncode == 0, done.stderr
    idle.await_idle()
    return idle


def test_idle_agent_does_not_wake_up(rested: Cluster) -> None:
    resting = everywhere(rested)
    before = {name: switches(pid) for name, pid in resting.items()}
    time.sleep(IDLE_SECONDS)
    after = {name: switches(pid) for name, pid in resting.items()}
    woken = {name: after[name] - before[name] for name in resting if after[name] != before[name]}
    assert not woken, f"context switches in {IDLE_SECONDS:g} s: {woken}"


def test_a_wake_up_is_counted(rested: Cluster) -> None:
    """The counters would show one: a question of the command line wakes the agent."""
    agent = rested.agent_pid("n1")
    before = switches(agent)
    asked: subprocess.CompletedProcess[str] = rested.run(["enclos", "ps"], node="n1")
    assert asked.returncode == 0, asked.stderr
    assert switches(agent) > before


def test_steps_leave_no_descriptor(rested: Cluster, usera: Run, image: str) -> None:
    before = {name: descriptors(pid) for name, pid in everywhere(rested).items()}
    for number in range(STEPS):
        done = usera(step(rested, image, ("job", "host", "none")[number % 3]))
        assert done.returncode == 0, done.stderr
    rested.await_idle()
    after = {name: descriptors(pid) for name, pid in everywhere(rested).items()}
    assert after == before
