"""On which machine the figures were taken: a figure without it says nothing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path


def describe() -> dict[str, str]:
    """Kernel, processors, memory, load, time and versions, as texts by name."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{os.cpu_count()} x {processor()}",
        "memory": f"{memory_kb() // 1024} MiB",
        "load average": load(),
        "python": platform.python_version(),
    }


def load() -> str:
    """The load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def processor() -> str:
    """The processor's model as the kernel names it."""
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = row.partition(":")
        if key.strip() in ("model name", "Processor", "cpu model"):
            return value.strip()
    return platform.machine()


def memory_kb() -> int:
    """MemTotal."""
    return status_kb(Path("/proc/meminfo").read_text())["MemTotal"]


def status_kb(text: str) -> dict[str, int]:
    """The rows `NAME: NUMBER kB` of a file of /proc, by name."""
    found = {}
    for row in text.splitlines():
        name, _, value = row.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0])
    return found


def line(facts: Mapping[str, str]) -> str:
    """The facts in one line, for stdout."""
    return "; ".join(f"{name} {value}" for name, value in facts.items())
