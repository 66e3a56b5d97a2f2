"""What srun may refuse before anything is allocated: per option, rules that a value has to keep.

They become a table of the shim (spank/options.gen.h), which knows regcomp(3) and nothing of their meaning: so patterns
are POSIX extended expressions that mean the same in Python, without look-ahead. They answer early and protect nothing:
the agent parses each value again (request.py, mounts.py, limits.py), whatever passed here, and in linear time, which
patterns do not promise. tests/unit/test_early.py holds the two together. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Rule(Enum):
    """What a pattern says of a text; the values are the shim's (spank/checks.h)."""

    MATCH = "ENCLOS_MATCH"
    """The whole text matches."""
    AVOID = "ENCLOS_AVOID"
    """The whole text does not match."""
    ORDER = "ENCLOS_ORDER"
    """Where it matches, the number of the first group is not above that of the second."""
    ONCE = "ENCLOS_ONCE"
    """No two parts that match have the same text in the first group."""


@dataclass(frozen=True, slots=True)
class Check:
    r"""A value that does not keep the rule is refused with `words`.

    Attributes:
        pattern: of a whole text.
        words: what is wrong with the value.
        each: the value is a list, and the rule is about each part between commas that no backslash precedes.
        start: only texts that begin with it are looked at.
        longest: of a text in bytes; 0: any. The pattern is not looked at then.
    """

    pattern: str
    words: str
    each: bool = False
    start: str = ""
    rule: Rule = Rule.MATCH
    longest: int = 0

    def refuses(self, value: str) -> bool:
        """As the shim decides: for profiles, which are read before it sees them, and for tests."""
        # A character a byte, as the C library has it in srun.
        value = value.encode("utf-8", "surrogateescape").decode("latin-1")
        texts = [text for text in (split(value) if self.each else [value]) if text.startswith(self.start)]
        if self.longest:
            return any(len(text) > self.longest for text in texts)
        found = [re.fullmatch(self.pattern, text, re.DOTALL) for text in texts]
        match self.rule:
            case Rule.MATCH:
                return not all(found)
            case Rule.AVOID:
                return any(found)
            case Rule.ORDER:
                return any(match is not None and int(match[1]) > int(match[2]) for match in found)
            case Rule.ONCE:
                keys = [match[1] for match in found if match is not None]
                return len(set(keys)) < len(keys)


def split(value: str) -> Iterator[str]:
    """The parts of a list; a backslash takes away the meaning of the character behind it."""
    start, i = 0, 0
    while i < len(value):
        if value[i] == "\\":
            i += 1
        elif value[i] == ",":
            yield value[start:i]
            start = i + 1
        i += 1
    yield value[start:]


def one_of(*choices: str) -> str:
    """A pattern that matches one of the patterns."""
    return f"({'|'.join(choices)})"


def below(number: int) -> str:
    """A pattern of the decimal numbers from 0 to one less than this; zeros may be before them."""
    digits = str(number)
    rests = [len(digits) - place - 1 for place in range(len(digits))]
    smaller = [
        f"{digits[:place]}[0-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else "")
        for place, (digit, rest) in enumerate(zip(digits, rests, strict=True))
        if digit != "0"
    ]
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    return f"0*{one_of(*shorter, *smaller)}"


NAMESPACES = ("net", "ipc", "uts")
NO_PID = "pid is not possible: tasks are started by Slurm, and no process can join a pid namespace"
NAME_FLAGS = ("auto", "create", "exec", "no_exec")
NAME_BYTES = 128
PATH_BYTES = 4095

GIVEN = Check(".+", "argument required")
SHORT = Check("", f"longer than {PATH_BYTES} bytes", longest=PATH_BYTES)
PROFILE = (GIVEN, SHORT)
WORKDIR = (GIVEN, SHORT)
SAVE = (GIVEN, Check(".*[^/]", "target is a directory"), SHORT)
NAME = (
    GIVEN,
    Check("[^:].*", "empty name"),
    Check("[^/:]+(:.*)?", "a name has no slash"),
    Check("[^\x01-\x1f\x7f]*", "a name has no control character"),
    Check(f"[^:]{{1,{NAME_BYTES}}}(:.*)?", f"a name has at most {NAME_BYTES} bytes"),
    Check(f"[^:]*(:{one_of(*NAME_FLAGS)}?)?", 'flag must be "auto", "create", "exec" or "no_exec"'),
)
NETWORK = (GIVEN, Check(one_of("job", "host", "none"), "no such network (job, host or none)"))
ENV = (GIVEN, Check("[A-Za-z_][A-Za-z0-9_.-]*", "invalid format: not a list of names of variables", each=True))
DEVICE = (
    GIVEN,
    Check(
        "[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?"
        "=[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?",
        "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all",
        each=True,
    ),
)
RDMA = (
    GIVEN,
    Check(
        "[1-9][0-9]?|[A-Za-z][A-Za-z0-9._-]*(,[A-Za-z][A-Za-z0-9._-]*)*",
        "invalid format: expected auto, none, names of RDMA devices or how many (1 to 99)",
    ),
)
CGROUP = (GIVEN, Check(one_of("readonly", "delegate"), "expected readonly or delegate"))
UNSHARE = (
    GIVEN,
    Check(one_of(*NAMESPACES, "pid"), "unknown namespace (net, ipc or uts)", each=True),
    Check(one_of(*NAMESPACES), NO_PID, each=True),
)

# What a name in a registry looks like, a little wider than images/reference.py has it, which depends on the site.
_LABELS = "[A-Za-z0-9][A-Za-z0-9.-]*"
_REGISTRY = rf"({_LABELS}|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?"
_NAME = "[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*"
_TAG = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_IN_REGISTRY = f"([^/@#: ]+@)?({_REGISTRY}[/#])?{_NAME}(:{_TAG})?(@sha256:[0-9a-f]{{64}})?"
_LOCAL = one_of("oci", "oci-archive", "docker-archive", "dir")
_PATH = r"(\.?\.?/.*|\.\.?)"
IMAGE = (
    GIVEN,
    SHORT,
    Check(f"{_PATH}|docker://.*|{_LOCAL}:.*|[^:]*|[^:]*:([^/].*|/[^/].*|/)?", "unknown kind of image"),
    Check(f"{_LOCAL}:", "a path has to follow", rule=Rule.AVOID),
    Check(
        f"{_PATH}|{_LOCAL}:.*|(docker://)?{_IN_REGISTRY}",
        "neither a path (/…, ./…) nor a name in a registry (docker://REGISTRY/NAME:TAG)",
    ),
)
