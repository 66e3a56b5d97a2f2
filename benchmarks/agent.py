"""The agent's memory after 1, 100 and 1,000 steps, its descriptors, and how often it wakes up while idle. Needs root.

    sudo .venv/bin/python -m benchmarks.agent [--steps N] [--quick] [--json]

One node. Most steps are steps of one job, several at a time; every twentieth is a job of its own. They take turns with
the job's network and the node's. Figures are taken when the agent has no step left. A wake-up is a context switch of
the agent or of the processes that stay with it, of any thread, as the kernel counts them; where strace is there, it
counts system calls too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which

from enclos.runtime.cluster.cluster import Cluster

from benchmarks import command, machine
from benchmarks.result import Chart, Claim, Result, Table
from benchmarks.stopwatch import Stopwatch
from benchmarks.trial import CONTAINER, IMAGE_PROGRAM, USER, trial

NAME = "agent"
TITLE = "memory, descriptors and wake-ups of the agent"
CLUSTER = "bench-agent"
NODE = "n1"
CPUS = 8
STEPS, QUICK_STEPS = 1000, 100
AT_ONCE = 4
JOB_EVERY = 20
IDLE_SECONDS, QUICK_IDLE_SECONDS = 20.0, 5.0
LIMIT_KB = 40 * 1024
SLACK_KB = 128
"""What counts as no growth: the allocator's pages, touched in another order. A leak of 150 bytes per step is more.

Python's free lists of tuples grow by 2 kB per step, up to a megabyte, until a full collection empties them.
"""
SETTLE_SECONDS = 30.0
STAYING = ("enclos-zygote", "enclos-spare", "enclos-visitors")
"""Processes that are there without any step, beside the agent itself."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds, in kB; `pss` shares common pages among their users. And how many descriptors."""

    rss: int
    anonymous: int
    pss: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The agent and the processes that stay with it after so many steps, by name."""

    steps: int
    agent: Footprint
    others: dict[str, Footprint]
    mounts: int

    @property
    def together(self) -> int:
        """Proportional size of all, in kB: each page once."""
        return self.agent.pss + sum(other.pss for other in self.others.values())


def footprint(pid: int) -> Footprint:
    """Read /proc/PID; `pss` is 0 where the kernel has no smaps_rollup."""
    status = machine.status_kb(Path(f"/proc/{pid}/status").read_text())
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    pss = machine.status_kb(rollup.read_text()).get("Pss", 0) if rollup.exists() else 0
    return Footprint(status["VmRSS"], status["RssAnon"], pss, len(os.listdir(f"/proc/{pid}/fd")))


def descendants(pid: int) -> dict[int, str]:
    """Names of a process's children, and of theirs, by pid; what ends meanwhile may be left out."""
    found: dict[int, str] = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
                found |= descendants(int(child))
    return found


def switches(pid: int) -> int:
    """Context switches of all threads of a process since its start, voluntary or not: each ends a time it ran."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for row in (task / "status").read_text().splitlines():
            name, _, value = row.partition(":")
            if name.endswith("voluntary_ctxt_switches"):
                total += int(value)
    return total


def rest(processes: dict[int, str]) -> bool:
    """Are these the processes that stay, and do they sleep? A spare builder gets ready before it does."""
    with suppress(FileNotFoundError, ProcessLookupError):
        states = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in processes}
        return states == {"S"} and sorted(processes.values()) == sorted(STAYING)
    return False


def settle(cluster: Cluster) -> None:
    """Wait until the agent has no step any more, and no process but those that stay.

    Raises:
        TimeoutError: something stays.
    """
    agent = cluster.agent_pid(NODE)
    journal = cluster.path_on(NODE, "/run/enclos/journal")
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(journal.iterdir()) or not rest(descendants(agent)):
        if time.monotonic() > deadline:
            left = [*(path.name for path in journal.iterdir()), *descendants(agent).values()]
            raise TimeoutError(f"the agent still has {', '.join(left)} after {SETTLE_SECONDS:g} s")
        time.sleep(0.05)


def take(cluster: Cluster, steps: int) -> Sample:
    """A sample of the idle agent."""
    settle(cluster)
    agent = cluster.agent_pid(NODE)
    others = {name: footprint(pid) for pid, name in descendants(agent).items()}
    mounts = len(Path(f"/proc/{agent}/mountinfo").read_text().splitlines())
    return Sample(steps, footprint(agent), others, mounts)


def srun(number: int) -> list[str]:
    """One step; the two networks take turns, in the long job and among the jobs of their own."""
    network = "job" if (number + number // JOB_EVERY) % 2 else "host"
    words = ["srun", "-N1", "-n1", "--mem=0", *CONTAINER, f"--container-network={network}", IMAGE_PROGRAM]
    return words if number % JOB_EVERY == 0 else [*words[:3], "--exact", "--cpus-per-task=1", *words[3:]]


def run_steps(cluster: Cluster, first: int, last: int) -> None:
    """Steps number first to last, the jobs of their own between the parts of one long job."""
    numbers = range(first, last + 1)
    inside = [srun(number) for number in numbers if number % JOB_EVERY]
    alone = [srun(number) for number in numbers if number % JOB_EVERY == 0]
    with Stopwatch(cluster, USER, ("salloc", "--quiet", "-N1", "-n4")) as watch:
        for group in groups(inside, AT_ONCE):
            watch.run(group)
    with Stopwatch(cluster, USER) as watch:
        for words in alone:
            watch.time(words)


def groups(commands: Sequence[list[str]], size: int) -> Iterator[Sequence[list[str]]]:
    """Cut into groups of at most `size`."""
    for start in range(0, len(commands), size):
        yield commands[start : start + size]


def stations(steps: int) -> list[int]:
    """After how many steps a sample is taken: 1, then tenths of the way, among them the 100th of 1,000."""
    return sorted({0, 1, *(max(1, steps * tenth // 10) for tenth in range(1, 11))})


def idle(cluster: Cluster, seconds: float) -> dict[str, int]:
    """Context switches of the agent and its processes while nothing asks them for anything."""
    agent = cluster.agent_pid(NODE)
    pids = {"enclosd": agent, **{name: pid for pid, name in descendants(agent).items()}}
    before = {name: switches(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return {name: switches(pid) - before[name] for name, pid in pids.items()}


def idle_calls(cluster: Cluster, seconds: float) -> list[str] | None:
    """System calls of the idle agent and its processes, as strace shows them; None where there is no strace.

    The calls that they were waiting in when strace came are no wake-ups: strace shows them as begun.
    """
    if which("strace") is None:
        return None
    agent = cluster.agent_pid(NODE)
    words = ["timeout", "-s", "INT", f"{seconds:g}", "strace", "-f", "-q"]
    words += [word for pid in (agent, *descendants(agent)) for word in ("-p", str(pid))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return [row for row in done.stderr.splitlines() if not waits(row)]


def waits(row: str) -> bool:
    """Is this strace's row of a call that had begun before and has not returned, or strace's own word?"""
    return row.startswith("strace:") or "<detached ...>" in row or row.rstrip().endswith("<unfinished ...>")


def run(steps: int = 0, quick: bool = False) -> Result:
    """Steps on a fresh cluster, then the idle time."""
    steps = steps or (QUICK_STEPS if quick else STEPS)
    seconds = QUICK_IDLE_SECONDS if quick else IDLE_SECONDS
    result = Result(NAME, TITLE, machine=machine.describe())
    with trial(CLUSTER, 1, CPUS) as cluster:
        samples, done = [], 0
        for station in stations(steps):
            if station > done:
                run_steps(cluster, done + 1, station)
            done = station
            samples.append(take(cluster, done))
        woken = idle(cluster, seconds)
        calls = idle_calls(cluster, seconds / 4)
    report_memory(result, samples)
    report_idle(result, woken, calls, seconds)
    result.machine["load average after"] = machine.load()
    return result


def report_memory(result: Result, samples: Sequence[Sample]) -> None:
    headings: tuple[str, ...] = ("steps", "RSS kB", "RssAnon kB", "PSS kB", "fds", "mounts")
    rows = []
    for one in samples:
        agent = one.agent
        values = (agent.rss, agent.anonymous, agent.pss, agent.descriptors, one.mounts)
        others = [str(value) for name in STAYING for value in (one.others[name].pss, one.others[name].descriptors)]
        rows.append((str(one.steps), *map(str, values), *others, str(one.together)))
    headings += tuple(f"{name} {what}" for name in STAYING for what in ("PSS", "fds"))
    result.tables.append(Table("the agent, idle after so many steps", (*headings, "all PSS"), tuple(rows)))
    first, last = samples[1], samples[-1]
    settled = next(one for one in samples if one.steps >= min(100, last.steps // 10))
    size = last.agent.rss
    text = f"at most {LIMIT_KB // 1024} MB resident after {last.steps} steps"
    measured = f"{size / 1024:.1f} MB; with the processes that stay with it, {last.together / 1024:.1f} MB (PSS)"
    result.claims.append(Claim(text, measured, size <= LIMIT_KB))
    grown = last.agent.anonymous - settled.agent.anonymous
    text = f"no growth from step {settled.steps} to step {last.steps} (up to {SLACK_KB} kB)"
    result.claims.append(Claim(text, f"{grown:+d} kB of anonymous memory", grown <= SLACK_KB))
    text = f"as many descriptors and mounts after {last.steps} steps as after the first"
    then, now = (opened(one) for one in (first, last))
    result.claims.append(Claim(text, f"{now}, before {then}", then == now))
    lines = {
        "agent, resident": [(one.steps, one.agent.rss / 1024) for one in samples],
        "agent, anonymous": [(one.steps, one.agent.anonymous / 1024) for one in samples],
        "with the processes that stay, PSS": [(one.steps, one.together / 1024) for one in samples],
    }
    result.charts.append(Chart("line", "memory", "memory over steps", "MiB", lines))
    result.data["samples"] = [asdict(one) for one in samples]


def opened(sample: Sample) -> str:
    """Descriptors of each process, and the agent's mounts."""
    counts = (str(one.descriptors) for one in (sample.agent, *(sample.others[name] for name in STAYING)))
    return f"{'+'.join(counts)} and {sample.mounts}"


def report_idle(result: Result, woken: dict[str, int], calls: Sequence[str] | None, seconds: float) -> None:
    times = ", ".join(f"{name} {count}" for name, count in woken.items())
    text = f"no wake-up in {seconds:g} s without work"
    result.claims.append(Claim(text, f"context switches: {times}", not any(woken.values())))
    if calls is not None:
        shown = "; ".join(calls[:3])
        text = f"no system call in {seconds / 4:g} s without work (strace)"
        result.claims.append(Claim(text, f"{len(calls)} {shown}".strip(), not calls))
    result.data["idle"] = {"seconds": seconds, "switches": woken, "calls": calls}


def main() -> int:
    """0 if all claims are kept, else 1."""
    parser = command.parser(__doc__)
    parser.add_argument("--steps", type=int, default=0, help=f"how many steps to run (default: {STEPS})")
    options = parser.parse_args()
    command.need_root()
    return command.finish(run(options.steps, options.quick), options)


if __name__ == "__main__":
    sys.exit(main())
