"""Slurm's hostlist notation: `n[001-003,7],gpu1` to the names it stands for.

Pure and without libslurm: the agent reads node lists while a job starts, and a fork of
`scontrol` would cost more than everything else. tests/unit/test_hostlist.py compares with
`scontrol show hostnames`. The number of names is limited before any is made.
"""

from __future__ import annotations

import re
from itertools import product
from math import prod

LIMIT = 100_000
NAME_LIMIT = 255  # bytes of a host name, DNS and HOST_NAME_MAX alike allow no more
_DIGITS_LIMIT = 18

_PART = re.compile(r"[^\[\],\s]+|\[[^\[\]]*\]")
_RANGE = re.compile(rf"([0-9]{{1,{_DIGITS_LIMIT}}})(?:-([0-9]{{1,{_DIGITS_LIMIT}}}))?")


class BadHostlist(ValueError):
    """The text is no hostlist, or stands for too many names."""


def expand(text: str, limit: int = LIMIT) -> list[str]:
    """The names in the order of the text; a name that is listed twice comes twice.

    Raises:
        BadHostlist: unbalanced brackets, an empty or reversed range, or more names than the limit.
    """
    names: list[str] = []
    for entry in _entries(text):
        pieces = [_piece(part, limit) for part in _parts(entry)]
        count = len(names) + prod(len(piece) for piece in pieces)
        if count > limit:
            raise BadHostlist(f"more than {limit} names")
        names.extend("".join(choice) for choice in product(*pieces))
        if names and len(names[-1]) > NAME_LIMIT:
            raise BadHostlist(f"name longer than {NAME_LIMIT}")
    return names


def _entries(text: str) -> list[str]:
    """Split at the commas that stand outside brackets; empty entries are dropped, as Slurm does."""
    entries, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        elif char == "," and depth == 0:
            entries.append(text[start:i])
            start = i + 1
        if depth not in (0, 1):
            raise BadHostlist(f"unbalanced brackets at character {i + 1}")
    if depth:
        raise BadHostlist("unbalanced brackets at the end")
    entries.append(text[start:])
    return [entry for entry in entries if entry]


def _parts(entry: str) -> list[str]:
    parts = _PART.findall(entry)
    if "".join(parts) != entry:
        raise BadHostlist(f"bad character in {entry[:64]!r}")
    return parts


def _piece(part: str, limit: int) -> list[str]:
    """What a literal or a bracket stands for."""
    if not part.startswith("["):
        return [part]
    found: list[str] = []
    for item in part[1:-1].split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise BadHostlist(f"bad range {item[:64]!r}")
        low, high = match[1], match[2] or match[1]
        count = int(high) - int(low) + 1
        if count < 1:
            raise BadHostlist(f"reversed range {item!r}")
        if len(found) + count > limit:
            raise BadHostlist(f"more than {limit} names")
        found.extend(f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1))
    return found
