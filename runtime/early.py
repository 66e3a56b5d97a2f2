"""What srun may refuse before anything is allocated: per option, patterns that a value has to match.

They become a table of the shim (spank/options.gen.h), which knows regcomp(3) and nothing of their meaning: so they are
POSIX extended expressions that mean the same in Python, whole values, without look-ahead. They answer early and protect
nothing: the agent parses each value again (request.py, mounts.py), whatever passed here. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from enclos.runtime import mounts


@dataclass(frozen=True, slots=True)
class Check:
    """A value that does not match the whole `pattern` is refused with `words`.

    With `each`, the value is a list, and each part between commas has to match. A value with a backslash in it, which
    may stand before a comma that separates nothing, is left to the agent then.
    """

    pattern: str
    words: str
    each: bool = False

    def refuses(self, value: str) -> bool:
        """As the shim decides; for tests, and for commands that have no shim."""
        if self.each and "\\" in value:
            return False
        parts = value.split(",") if self.each else [value]
        return not all(re.fullmatch(self.pattern, part) for part in parts)


def one_of(*choices: str) -> str:
    return f"({'|'.join(choices)})"


NAMESPACES = ("net", "ipc", "uts")
NO_PID = "pid is not possible: tasks are started by Slurm, and no process can join a pid namespace"
SYNTAX = "(expected SRC:DST[:FLAGS])"

# A part of a mount, and its flags: each is followed by a plus or by the end.
_PART = "[^:]+"
_FLAG = one_of(
    *(flag.replace("+", r"\+") for flag in mounts.ALL_FLAGS), *(f"{name}=[^:+]+" for name in mounts.TMPFS_VALUES)
)

GIVEN = Check(".+", "argument required")
IMAGE = (GIVEN,)
WORKDIR = (GIVEN,)
PROFILE = (GIVEN,)
NAME_FLAGS = ("auto", "create", "exec", "no_exec")
NAME = (
    GIVEN,
    Check("[^:].*", "empty name"),
    Check("[^/:]+(:.*)?", "a name has no slash"),
    Check(f"[^:]*(:{one_of(*NAME_FLAGS)}?)?", 'flag must be "auto", "create", "exec" or "no_exec"'),
)
SAVE = (GIVEN, Check(".*[^/]", "target is a directory"))
NETWORK = (GIVEN, Check(one_of("job", "host", "none"), "no such network (job, host or none)"))
ENV = (GIVEN, Check("[A-Za-z_][A-Za-z0-9_.-]*", "invalid format: not a list of names of variables", each=True))
DEVICE = (
    GIVEN,
    Check(
        "[A-Za-z][A-Za-z0-9._-]*/[A-Za-z][A-Za-z0-9._-]*=[A-Za-z0-9][A-Za-z0-9._:-]*",
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
UNSHARE = (
    GIVEN,
    Check(one_of(*NAMESPACES, "pid"), "unknown namespace (net, ipc or uts)", each=True),
    Check(one_of(*NAMESPACES), NO_PID, each=True),
)
# A list of processors goes on behind a comma: what has no = is a part of one.
LIMIT = (
    GIVEN,
    Check(
        "(memory|swap|cpu|cpuset|pids|io|hugetlb|rdma)=[^,]+|[0-9]+(-[0-9]+)?",
        "not a limit (memory, swap, cpu, cpuset, pids, io, hugetlb or rdma, then = and a value)",
        each=True,
    ),
)
MOUNTS = (
    GIVEN,
    Check(f"{_PART}(:.*)?", f"invalid format: mount without a source {SYNTAX}", each=True),
    Check(f"{_PART}(:{_PART}(:.*)?)?", f"invalid format: mount without a target {SYNTAX}", each=True),
    Check(one_of(r"\.?\.?/[^:]*", r"\.\.?", *mounts.WORDS) + "(:.*)?", mounts.SOURCE_WORDS, each=True),
    Check(r"[^:]+(:([^.:][^:]*|\.([^.:][^:]*)?)(:.*)?)?", mounts.ESCAPE_WORDS, each=True),
    Check(r"[^:]+(:(\.?/[^:]*|\.)(:.*)?)?", mounts.TARGET_WORDS, each=True),
    Check("[^:]*(:[^:]*){0,2}", f"invalid format: too many colons {SYNTAX}", each=True),
    Check(rf"[^:]+(:[^:]+(:({_FLAG}(\+|$))*)?)?", "unknown flag of a mount", each=True),
)
