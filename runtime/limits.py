"""Limits of a container: the syntax of --container-limit and of enclos.yaml's, and which of several holds.

    memory=8G,swap=0,cpu=2.5,cpuset=0-3,8,pids=512,io=8:0:rbps=100M:wiops=50,hugetlb=2M:1G,rdma=mlx5_0:hca_handle=4

Pure. What the node's kernel and Slurm allow is looked at in cgroup.py. Imported by both sides of the privilege line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CPU_PERIOD_US = 100_000
LIMIT_COUNT = 64
# Below that, no program starts: the kernel would kill the task before it could say anything.
LEAST_MEMORY = 1 << 20
LEAST_CPU_US = 1_000  # kernel/sched/core.c, min_cfs_quota_period

IO_KEYS = ("rbps", "wbps", "riops", "wiops")
RDMA_KEYS = ("hca_handle", "hca_object")
SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
# So many digits that no size exceeds 2^61.
SIZE = "([0-9]{1,18}|[0-9]{1,15}[Kk]|[0-9]{1,12}[Mm]|[0-9]{1,9}[Gg]|[0-9]{1,6}[Tt])i?B?"

SYNTAX = "memory=SIZE, swap=SIZE, cpu=N, cpuset=LIST, pids=N, io=MAJ:MIN:KEY=N, hugetlb=PAGE:SIZE or rdma=DEVICE:KEY=N"

SIZE_WORDS = "expected a size such as 512M or 8G"
LEAST_WORDS = "less than 1M"
CPU_WORDS = "expected a number of processors such as 2 or 0.5"
LEAST_CPU_WORDS = "less than 0.01 of a processor"
CPUSET_WORDS = "expected processors such as 0-3,8"
IO_WORDS = "expected MAJ:MIN:KEY=N, such as 8:0:rbps=100M"
HUGETLB_WORDS = "expected PAGESIZE:SIZE, such as 2M:1G"
RDMA_WORDS = "expected DEVICE:KEY=N, such as mlx5_0:hca_handle=4"


class BadLimit(ValueError):
    """A text that is no limit; `text` is the part that is wrong."""

    def __init__(self, text: str, detail: str) -> None:
        super().__init__(f"{text}: {detail}")
        self.text, self.detail = text, detail


@dataclass(frozen=True, slots=True)
class Limit:
    """One number in one file of a cgroup.

    Attributes:
        file: such as memory.max; its part before the dot is the controller.
        field: which of the file's values, such as "8:0 rbps"; empty where it holds only one.
        value: in the file's unit; for cpu.max microseconds a period. Unused for cpuset.cpus.
        text: as a person writes it, for messages.
        cpus: of cpuset.cpus, else empty.
    """

    file: str
    field: str
    value: int
    text: str
    cpus: frozenset[int] = frozenset()

    @property
    def controller(self) -> str:
        return self.file.partition(".")[0]

    @property
    def device(self) -> str:
        """8:0, mlx5_0, or empty."""
        return self.field.partition(" ")[0]

    @property
    def place(self) -> tuple[str, str]:
        """Two limits with the same place are about the same thing."""
        return self.file, self.field

    def within(self, other: Limit) -> bool:
        """Whether this one allows no more than the other, which is about the same thing."""
        return self.cpus <= other.cpus if self.cpus or other.cpus else self.value <= other.value


Limits = tuple[Limit, ...]


def parse(text: str) -> Limits:
    """Read a list of limits.

    Raises:
        BadLimit: something in it is none, or is there twice.
    """
    found: dict[tuple[str, str], Limit] = {}
    for part in _parts(text):
        for limit in _parse_one(part):
            if limit.place in found:
                raise BadLimit(part, "given twice")
            found[limit.place] = limit
    if not found:
        raise BadLimit(text, f"expected {SYNTAX}")
    if len(found) > LIMIT_COUNT:
        raise BadLimit("…", f"more than {LIMIT_COUNT} limits")
    return tuple(found.values())


def _parts(text: str) -> Iterator[str]:
    """Split at commas, but not within the list of a cpuset: what has no "=" there belongs to what is before it."""
    current = ""
    for piece in text.split(","):
        if current.startswith("cpuset=") and "=" not in piece:
            current += f",{piece}"
            continue
        if current:
            yield current
        current = piece
        if not piece:
            raise BadLimit(text[:64], "an empty limit")
    if current:
        yield current


def _parse_one(part: str) -> Iterator[Limit]:
    name, equals, value = part.partition("=")
    if not equals or not value or name not in _READERS:
        detail = f"expected {SYNTAX}"
        raise BadLimit(part[:64], detail if name in _READERS or not equals else f"unknown limit {name[:32]}, {detail}")
    yield from _READERS[name](value, part)


def size(text: str, part: str, least: int = 0) -> int:
    """Bytes, with a suffix K, M, G or T (powers of 1024)."""
    if re.fullmatch(SIZE, text) is None:
        raise BadLimit(part[:64], SIZE_WORDS)
    digits, unit = text.rstrip("iB"), ""
    if not digits[-1].isdigit():
        digits, unit = digits[:-1], digits[-1].upper()
    found = int(digits) << SUFFIXES[unit]
    if found < least:
        raise BadLimit(part[:64], LEAST_WORDS)
    return found


def _count(text: str, part: str, least: int = 0) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) < least:
        raise BadLimit(part[:64], f"expected a whole number from {least}")
    return int(text)


def _memory(value: str, part: str) -> Iterator[Limit]:
    yield Limit("memory.max", "", size(value, part, LEAST_MEMORY), part)


def _swap(value: str, part: str) -> Iterator[Limit]:
    yield Limit("memory.swap.max", "", size(value, part), part)


def _cpu(value: str, part: str) -> Iterator[Limit]:
    if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", value) is None:
        raise BadLimit(part[:64], CPU_WORDS)
    quota = round(float(value) * CPU_PERIOD_US)
    if quota < LEAST_CPU_US:
        raise BadLimit(part[:64], LEAST_CPU_WORDS)
    yield Limit("cpu.max", "", quota, part)


def _cpuset(value: str, part: str) -> Iterator[Limit]:
    try:
        cpus = cpu_list(value)
    except ValueError:
        raise BadLimit(part[:64], CPUSET_WORDS) from None
    yield Limit("cpuset.cpus", "", 0, part, cpus)


def cpu_list(text: str) -> frozenset[int]:
    """The processors of a list as the kernel writes it; raises ValueError."""
    cpus: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", piece)
        if match is None:
            raise ValueError(piece)
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ValueError(piece)
        cpus.update(range(low, high + 1))
    return frozenset(cpus)


def _pids(value: str, part: str) -> Iterator[Limit]:
    yield Limit("pids.max", "", _count(value, part, 1), part)


def _io(value: str, part: str) -> Iterator[Limit]:
    match = re.fullmatch(r"([0-9]{1,4}:[0-9]{1,7}):(.+)", value)
    if match is None:
        raise BadLimit(part[:64], IO_WORDS)
    for key, number in _pairs(match[2], IO_KEYS, part):
        amount = size(number, part) if key.endswith("bps") else _count(number, part)
        if amount == 0:
            raise BadLimit(part[:64], f"{key}=0 would stop every access")
        yield Limit("io.max", f"{match[1]} {key}", amount, f"io={match[1]}:{key}={number}")


def _hugetlb(value: str, part: str) -> Iterator[Limit]:
    page, colon, amount = value.partition(":")
    if not colon:
        raise BadLimit(part[:64], HUGETLB_WORDS)
    yield Limit(f"hugetlb.{_page_name(size(page, part), part)}.max", "", size(amount, part), part)


def _page_name(page_bytes: int, part: str) -> str:
    """As the kernel names a page size in its files (mm/hugetlb_cgroup.c, mem_fmt)."""
    for shift, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if page_bytes >= 1 << shift and page_bytes % (1 << shift) == 0:
            return f"{page_bytes >> shift}{unit}"
    raise BadLimit(part[:64], "expected a size of huge pages such as 2M or 1G")


def _rdma(value: str, part: str) -> Iterator[Limit]:
    match = re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,62}):(.+)", value)
    if match is None:
        raise BadLimit(part[:64], RDMA_WORDS)
    for key, number in _pairs(match[2], RDMA_KEYS, part):
        yield Limit("rdma.max", f"{match[1]} {key}", _count(number, part), f"rdma={match[1]}:{key}={number}")


def _pairs(text: str, keys: tuple[str, ...], part: str) -> Iterator[tuple[str, str]]:
    for pair in text.split(":"):
        key, _, number = pair.partition("=")
        if key not in keys:
            raise BadLimit(part[:64], f"expected {', '.join(keys[:-1])} or {keys[-1]}")
        yield key, number


_READERS = {
    "memory": _memory,
    "swap": _swap,
    "cpu": _cpu,
    "cpuset": _cpuset,
    "pids": _pids,
    "io": _io,
    "hugetlb": _hugetlb,
    "rdma": _rdma,
}
NAMES = tuple(_READERS)

# ---------------------------------------------------------------- what the site says


@dataclass(frozen=True, slots=True)
class SiteLimits:
    """One entry of limits.default or limits.maximum: `LIMITS`, `partition:NAME LIMITS` or `account:NAME LIMITS`."""

    kind: str
    name: str
    limits: Limits

    def applies(self, partition: str, account: str) -> bool:
        return self.name == {"partition": partition, "account": account}.get(self.kind, "")


# The later one is the narrower one: it wins where an entry gives a default.
_KINDS = ("", "partition", "account")


def parse_site(text: str) -> SiteLimits:
    """Read one entry.

    Raises:
        BadLimit: it is none.
    """
    who, space, rest = text.strip().partition(" ")
    if not space:
        return SiteLimits("", "", parse(who))
    kind, colon, name = who.partition(":")
    if not colon or not name or kind not in ("partition", "account"):
        raise BadLimit(who[:64], 'expected "LIMITS", "partition:NAME LIMITS" or "account:NAME LIMITS"')
    return SiteLimits(kind, name, parse(rest.strip()))


@dataclass(frozen=True, slots=True)
class Exceeded(Exception):
    """The user asks for more than the site gives."""

    wanted: Limit
    maximum: Limit


def combine(
    wanted: Limits, defaults: Iterable[SiteLimits], maxima: Iterable[SiteLimits], partition: str, account: str
) -> tuple[Limits, Limits]:
    """What holds for a step: the user's limits, and those that the site adds.

    A default holds where the user says nothing, the account's before the partition's before everybody's. Of the
    maxima that apply the smallest holds; who says nothing gets no more either.

    Raises:
        Exceeded: a wish is above a maximum.
    """
    asked = {limit.place: limit for limit in wanted}
    defaults = sorted(defaults, key=lambda entry: _KINDS.index(entry.kind))
    given = {
        limit.place: limit
        for entry in defaults
        if entry.applies(partition, account)
        for limit in entry.limits
        if limit.place not in asked
    }
    for limit in (limit for entry in maxima if entry.applies(partition, account) for limit in entry.limits):
        place = limit.place
        if place in asked:
            if not asked[place].within(limit):
                raise Exceeded(asked[place], limit)
        elif place not in given or not given[place].within(limit):
            given[place] = limit
    return tuple(asked.values()), tuple(given.values())
