"""`enclos ps`: the containers on this node; one's own, or all for root.

Runs as whoever types the command.
"""

from __future__ import annotations

import pwd
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from enclos.runtime import request
from enclos.runtime.cli import client, common
from enclos.runtime.request import BATCH_STEP, INTERACTIVE_STEP

_STEP_NAMES = {BATCH_STEP: "batch", INTERACTIVE_STEP: "interactive"}
HEAD = ("STEP", "USER", "STATE", "NETWORK", "ADDRESS", "TASKS", "TIME", "DEVICES", "IMAGE")


def run(arguments: list[str]) -> int:
    """List containers."""
    parser = common.Parser(
        prog="enclos ps",
        description="List the containers on this node: yours, or all for root. A line is one job step, whose tasks "
        "here share the container, or run.N of 'enclos run'. ADDRESS is this node's address on the job's network.",
    )
    common.add_json(parser)
    given = parser.parse_args(arguments)
    containers = client.ask("ps")
    if given.json:
        common.print_json(containers)
    else:
        print(common.table(HEAD, [line(container, time.time()) for container in containers]))
    return 0


def line(container: Mapping[str, Any], now: float) -> tuple[str, ...]:
    """The cells of one container. What an agent of another release does not send is shown as -."""

    def cell(key: str) -> str:
        value = container.get(key)
        return "-" if value in (None, "") else str(value)

    started = container.get("started")
    return (
        step_name(int(container.get("job", 0)), int(container.get("step", 0))),
        user_name(int(container["uid"])) if "uid" in container else "-",
        cell("state"),
        cell("network"),
        cell("ipv4") if container.get("ipv4") else cell("ipv6"),
        cell("tasks"),
        duration(now - float(started)) if started else "-",
        device_list(container.get("devices") or []),
        cell("image") + short_digest(str(container.get("digest") or "")),
    )


def short_digest(digest: str) -> str:
    """As much of an imported image's digest as tells images apart; --json has all of it."""
    return f"@{digest[:19]}" if digest else ""


def step_name(job: int, step: int) -> str:
    """A step as Slurm writes it."""
    return request.step_name(job, step) if step not in _STEP_NAMES else f"{job}.{_STEP_NAMES[step]}"


def device_list(names: Sequence[str]) -> str:
    """Devices by their kind, `acme.com/fpga=a nvidia.com/gpu=0,1`, or -."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, _, device = str(name).partition("=")
        kinds.setdefault(kind, []).append(device)
    return " ".join(f"{kind}={','.join(devices)}" for kind, devices in kinds.items()) or "-"


@lru_cache
def user_name(uid: int) -> str:
    """The name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def duration(seconds: float) -> str:
    """Elapsed time as squeue writes it: M:SS, H:MM:SS, D-HH:MM:SS."""
    whole = max(0, int(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
