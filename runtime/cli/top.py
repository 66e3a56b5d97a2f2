"""`enclos top`: what the containers on this node use, against their limits; one's own, or all for root.

Reads cgroup files, and /proc where Slurm makes no cgroups: nothing of it costs the agent more than a `ps`. Runs as
whoever types the command.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from enclos.runtime import cgroup
from enclos.runtime.cli import client, common
from enclos.runtime.cli.ps import step_name, user_name
from enclos.runtime.limits import CPU_PERIOD_US

HEAD = (
    *("STEP", "USER", "CPU", "OF", "MEMORY", "OF", "SWAP", "PROCESSES", "OF"),
    *("READ/s", "WRITTEN/s", "OTHERS", "IMAGE"),
)
# What a key of io.max limits, as io.stat counts it.
DISK_COUNTERS = {"rbps": "rbytes", "wbps": "wbytes", "riops": "rios", "wiops": "wios"}
CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of a container at one moment. None where the kernel does not count."""

    cpu_seconds: float
    memory: int | None
    swap: int | None
    processes: int
    read: int | None
    written: int | None
    # By device, as "8:0", and name of the counter.
    disks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Other:
    """Use of what few containers have a limit on, and the limit; `name` is as in --container-limit."""

    name: str
    use: float
    limit: int


@dataclass(frozen=True, slots=True)
class Use:
    """What a container uses, and what it may; None where there is no limit, or no counter."""

    job: int
    step: int
    uid: int
    image: str
    cpu: float
    cpu_limit: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    swap_bytes: int | None
    swap_limit_bytes: int | None
    processes: int
    processes_limit: int | None
    read_bytes_per_second: float | None
    written_bytes_per_second: float | None
    others: tuple[Other, ...]


def run(arguments: list[str]) -> int:
    """Show the use of all containers, once or again and again."""
    parser = common.Parser(
        prog="enclos top",
        description="Show what the containers on this node use, yours or all for root, and what they may: processors, "
        "memory, swap, processes, and disk traffic where the io controller is enabled. OF is the smallest limit that "
        "holds, Slurm's or the container's own; OTHERS are its limits on disks, huge pages and RDMA devices. Where "
        "Slurm makes no cgroups, the step's processes are added up.",
    )
    common.add_json(parser)
    help_interval = "length of a measurement (default: 1)"
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help=help_interval)
    help_count = "end after so many (default: on a terminal never, else after one)"
    parser.add_argument("-n", "--count", type=int, default=0, help=help_count)
    given = parser.parse_args(arguments)
    if not 0.05 <= given.interval <= 3600 or given.count < 0:
        parser.error("--interval: from 0.05 to 3600 seconds; --count: 0 or more")
    live = sys.stdout.isatty() and not given.json
    last = given.count or (0 if live else 1)
    for number, uses in enumerate(measure(given.interval), start=1):
        if given.json:
            common.print_json([asdict(use) for use in uses])
        else:
            print((CLEAR if live else "") + common.table(HEAD, [line(use) for use in uses]), flush=True)
        if number == last:
            break
    return 0


def measure(interval_seconds: float) -> Iterator[list[Use]]:
    """The use over one interval after the other. A container that began or ended within one is left out of it."""
    before: dict[tuple[int, int], Sample] = {}
    began = time.monotonic()
    for round_number in count():
        if round_number:
            time.sleep(interval_seconds)
        containers = client.ask("ps")
        now = time.monotonic()
        samples = {(one["job"], one["step"]): sample(one) for one in containers}
        if round_number:
            seconds = now - began
            yield [
                use(one, before[key], after, seconds)
                for one in containers
                if (key := (one["job"], one["step"])) in before and (after := samples[key])
            ]
        before = {key: found for key, found in samples.items() if found is not None}
        began = now


def sample(container: Mapping[str, Any]) -> Sample | None:
    """None for one that has ended."""
    directory = str(container.get("cgroup", ""))
    return _from_cgroup(Path(directory)) if directory else _from_processes(int(container["stepd"]))


def _from_cgroup(directory: Path) -> Sample | None:
    if not directory.is_dir():
        return None
    counters = _pairs(directory / "cpu.stat")
    disks = _rows(directory / "io.stat")
    has_io = (directory / "io.stat").exists()
    return Sample(
        counters.get("usage_usec", 0) / 1e6,
        _number(directory / "memory.current"),
        _number(directory / "memory.swap.current"),
        _number(directory / "pids.current") or sum(1 for _ in _processes(directory)),
        sum(disk.get("rbytes", 0) for disk in disks.values()) if has_io else None,
        sum(disk.get("wbytes", 0) for disk in disks.values()) if has_io else None,
        disks,
    )


def _processes(directory: Path) -> Iterator[str]:
    for parent, _, _ in os.walk(directory):
        yield from _text(Path(parent, "cgroup.procs")).split()


def _from_processes(stepd: int) -> Sample | None:
    """The sum of slurmstepd's descendants that are alive; what has ended and was waited for is in its parent's time."""
    try:
        found = psutil.Process(stepd).children(recursive=True)
    except psutil.Error:
        return None
    seconds, memory, living = 0.0, 0, 0
    for process in found:
        with suppress(psutil.Error), process.oneshot():
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
            memory += process.memory_info().rss
            living += 1
    return Sample(seconds, memory, None, living, None, None)


def use(container: Mapping[str, Any], before: Sample, after: Sample, seconds: float) -> Use:
    """The difference of two samples, with the limits that hold now."""
    directory = str(container.get("cgroup", ""))

    def limit(file: str) -> int | None:
        found = cgroup.granted(directory, file) if directory else cgroup.UNLIMITED
        return None if found == cgroup.UNLIMITED else int(found)

    def rate(first: int | None, last: int | None) -> float | None:
        return None if first is None or last is None else max(0.0, (last - first) / seconds)

    quota, cpus = limit("cpu.max"), len(cgroup.granted_cpus(directory)) if directory else 0
    known = [value for value in (quota / CPU_PERIOD_US if quota else 0.0, float(cpus)) if value]
    return Use(
        int(container["job"]),
        int(container["step"]),
        int(container["uid"]),
        str(container.get("image", "")),
        max(0.0, (after.cpu_seconds - before.cpu_seconds) / seconds),
        min(known, default=None),
        after.memory,
        limit("memory.max"),
        after.swap,
        limit("memory.swap.max"),
        after.processes,
        limit("pids.max"),
        rate(before.read, after.read),
        rate(before.written, after.written),
        tuple(_others(Path(directory), before, after, seconds)) if directory else (),
    )


def _others(directory: Path, before: Sample, after: Sample, seconds: float) -> Iterator[Other]:
    """Limits on disks, huge pages and RDMA devices of the step's own cgroup: Slurm has none of these."""
    for disk, limits in _rows(directory / "io.max").items():
        for key, most in limits.items():
            counter = DISK_COUNTERS.get(key, "")
            used = after.disks.get(disk, {}).get(counter, 0) - before.disks.get(disk, {}).get(counter, 0)
            yield Other(f"io={disk}:{key}", max(0.0, used / seconds), most)
    for path in sorted(directory.glob("hugetlb.*.max")):
        _, page, *rest = path.name.split(".")
        if rest == ["max"] and (pages := _number(path)) is not None:
            yield Other(f"hugetlb={page.removesuffix('B')}", _number(directory / f"hugetlb.{page}.current") or 0, pages)
    current = _rows(directory / "rdma.current")
    for device, limits in _rows(directory / "rdma.max").items():
        for key, most in limits.items():
            yield Other(f"rdma={device}:{key}", current.get(device, {}).get(key, 0), most)


def line(found: Use) -> tuple[str, ...]:
    """The cells of one container."""
    return (
        step_name(found.job, found.step),
        user_name(found.uid),
        f"{found.cpu:.2f}",
        "-" if found.cpu_limit is None else f"{found.cpu_limit:g}",
        size(found.memory_bytes),
        size(found.memory_limit_bytes),
        size(found.swap_bytes),
        str(found.processes),
        "-" if found.processes_limit is None else str(found.processes_limit),
        size(found.read_bytes_per_second),
        size(found.written_bytes_per_second),
        " ".join(_against(one) for one in found.others) or "-",
        found.image,
    )


def _against(one: Other) -> str:
    """In bytes, or how many."""
    if one.name.startswith("hugetlb") or one.name.endswith("bps"):
        return f"{one.name} {size(one.use)}/{size(one.limit)}"
    return f"{one.name} {one.use:g}/{one.limit}"


def size(number: float | None) -> str:
    """Bytes for a person, with three digits: 512K, 1.25G."""
    if number is None:
        return "-"
    for suffix in ("", "K", "M", "G", "T"):
        if number < 1000 or suffix == "T":
            break
        number /= 1024
    return f"{number:.3g}{suffix}"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _pairs(path: Path) -> dict[str, int]:
    rows = (row.split() for row in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _rows(path: Path) -> dict[str, dict[str, int]]:
    """Of a file with a device a row, such as io.stat: its numbers by their names; "max" is none."""
    rows = [row.split() for row in _text(path).splitlines()]
    pairs = {row[0]: [word.partition("=") for word in row[1:]] for row in rows if row}
    return {one: {name: int(value) for name, _, value in words if value.isdigit()} for one, words in pairs.items()}
