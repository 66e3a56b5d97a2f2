"""OpenSM's partitions.conf with a partition for each tenant: pure, from one text of the file to the next.

What the site wrote stays as it is; ours is between two marks, a statement per tenant. A tenant's key is chosen when its
first port comes and kept until its last one is gone, so that running programs keep theirs. Who calls this holds a lock.
Source: opensm's doc/partition-config.txt, and osm_prtn_config.c for how lines are read; IBTA vol. 1, 10.9: a key has
15 bits, 0 and 0x7fff are not for us.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

BEGIN = "# enclos begin: written by 'enclos partition', do not edit"
END = "# enclos end"
DEFAULT_KEY = 0x7FFF
FIRST_KEY, LAST_KEY = 0x1000, 0x7FFE
"""The lower ones are left to the site."""

PORTS_IN_A_LINE = 64
"""OpenSM reads at most 4,094 characters as a line. None may end in a comma: an empty name is taken for ALL."""

_STATEMENT = re.compile(r"(?P<tenant>[A-Za-z0-9_.-]+)=(?P<key>0x[0-9a-f]{4}), ipoib : (?P<ports>[^;]*);\n")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
_PORT = re.compile(r"0x[0-9a-f]{16}=full")
TENANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")


class BadPartitions(ValueError):
    """The file, a tenant or a port is not as it should be; the text says how."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A tenant's key, and the GUIDs of its ports as numbers."""

    key: int
    ports: frozenset[int] = field(default_factory=frozenset)


def attach(text: str, tenant: str, ports: Iterable[int]) -> str:
    """The file with these ports in the tenant's partition, made where it has none. Again is the same.

    A port is in one tenant's partition only: it leaves the one that it was in.

    Raises:
        BadPartitions: no such name for a tenant, no key left, or our part of the file was edited.
    """
    _check(tenant)
    own, before, after = _read(text)
    wanted = frozenset(ports)
    for name, partition in list(own.items()):
        if name != tenant:
            own[name] = Partition(partition.key, partition.ports - wanted)
    present = own.get(tenant)
    key = present.key if present else _free_key(own, before + after)
    own[tenant] = Partition(key, (present.ports if present else frozenset()) | wanted)
    return _write(own, before, after)


def detach(text: str, tenant: str, ports: Iterable[int] = ()) -> str:
    """The file without these ports in the tenant's partition, or without the tenant; what is not there is fine.

    Raises:
        BadPartitions: our part of the file was edited.
    """
    _check(tenant)
    own, before, after = _read(text)
    gone = frozenset(ports)
    if tenant in own:
        own[tenant] = Partition(own[tenant].key, own[tenant].ports - gone if gone else frozenset())
    return _write(own, before, after)


def read(text: str) -> dict[str, Partition]:
    """The tenants' partitions in a file."""
    return _read(text)[0]


def parse_guid(text: str) -> int:
    """A GUID as `rdma` (5054:00ff:fe00:0000) or OpenSM (0x505400fffe000000) writes it.

    Raises:
        BadPartitions: it is none, or 0, which a virtual function has until the site gives it one.
    """
    plain = text.lower().removeprefix("0x").replace(":", "")
    if not re.fullmatch(r"[0-9a-f]{16}", plain) or not int(plain, 16):
        raise BadPartitions(f"{text!r} is no GUID of a port")
    return int(plain, 16)


def _check(tenant: str) -> None:
    if not TENANT.fullmatch(tenant):
        raise BadPartitions(f"{tenant!r} is no name for a partition")


def _free_key(own: Mapping[str, Partition], others: str) -> int:
    """The lowest that nobody has, also not as a full member's (with the highest bit)."""
    taken = {partition.key for partition in own.values()}
    taken |= _keys(others)
    key = next((key for key in range(FIRST_KEY, LAST_KEY + 1) if key not in taken), None)
    if key is None:
        raise BadPartitions("all partition keys are in use")
    return key


def _keys(text: str) -> set[int]:
    """Keys in what the site wrote: statements end in `;`, one line may have several, and numbers are as in C."""
    found: set[int] = set()
    for statement in re.sub("#.*", "", text).split(";"):
        number = statement.partition(":")[0].partition(",")[0].partition("=")[2].strip()
        if _NUMBER.fullmatch(number):
            octal = number.startswith("0") and number.isdigit()
            with suppress(ValueError):  # 08: OpenSM does not take it either.
                found.add(int(number, 8 if octal else 0) & 0x7FFF)
    return found


def _read(text: str) -> tuple[dict[str, Partition], str, str]:
    """Our partitions, and what is before and behind them."""
    if BEGIN not in text and END not in text:
        return {}, text if not text or text.endswith("\n") else f"{text}\n", ""
    if text.count(f"{BEGIN}\n") != 1 or text.count(f"{END}\n") != 1 or text.index(BEGIN) > text.index(END):
        raise BadPartitions(f"the lines {BEGIN!r} and {END!r} are not there once each, in this order")
    before, _, rest = text.partition(f"{BEGIN}\n")
    mine, _, after = rest.partition(f"{END}\n")
    own: dict[str, Partition] = {}
    place = 0
    while place < len(mine):
        match = _STATEMENT.match(mine, place)
        ports = [port.strip() for port in re.split("[,\n]", match["ports"])] if match else []
        if match is None or not all(_PORT.fullmatch(port) for port in ports):
            raise BadPartitions(f"not a line of ours between the marks: {mine[place:].partition(chr(10))[0]!r}")
        found = frozenset(int(port.removesuffix("=full"), 16) for port in ports)
        own[match["tenant"]] = Partition(int(match["key"], 16), found)
        place = match.end()
    return own, before, after


def _write(own: Mapping[str, Partition], before: str, after: str) -> str:
    rows = []
    for tenant, partition in sorted(own.items()):
        if partition.ports:
            ports = [f"0x{port:016x}=full" for port in sorted(partition.ports)]
            starts = range(0, len(ports), PORTS_IN_A_LINE)
            lines = "\n".join(", ".join(ports[start : start + PORTS_IN_A_LINE]) for start in starts)
            rows.append(f"{tenant}=0x{partition.key:04x}, ipoib : {lines};\n")
    return f"{before}{BEGIN}\n{''.join(rows)}{END}\n{after}" if rows else before + after
