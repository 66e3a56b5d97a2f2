"""What srun refuses of --container-limit by itself (early.py); the syntax is in limits.py. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from enclos.runtime import limits
from enclos.runtime.early import GIVEN, Check, Rule, below, one_of

_NAMES = one_of(*limits.NAMES)
_COUNT = "[0-9]{1,9}"
_END = "i?B?"
_NOTHING = f"0+[KMGTkmgt]?{_END}"
_TOO_LITTLE = one_of(f"{below(limits.LEAST_MEMORY)}{_END}", f"{below(limits.LEAST_MEMORY >> 10)}[Kk]{_END}", _NOTHING)
_CPUS = "[0-9]{1,4}(-[0-9]{1,4})?"
_ITEM = f"({_NAMES}=[^,]+|cpuset=[^,=]+(,[^,=]+)+)"
_BPS = one_of(*(key for key in limits.IO_KEYS if key.endswith("bps")))
_IOPS = one_of(*(key for key in limits.IO_KEYS if key.endswith("iops")))


def _of(name: str, *checks: tuple[str, str] | tuple[str, str, Rule]) -> Iterator[Check]:
    """Checks of the parts NAME=…: each a pattern of what is behind the =, words, and perhaps a rule."""
    for pattern, words, *rule in checks:
        yield Check(
            f"{name}={one_of(pattern)}", words, each=True, start=f"{name}=", rule=rule[0] if rule else Rule.MATCH
        )


def _repeated(keys: tuple[str, ...]) -> str:
    return one_of(*(f".*:{key}=.*:{key}=.*" for key in keys))


LIMIT = (
    GIVEN,
    # A list of processors goes on behind a comma: what has no = is a part of one.
    Check(
        f"{_NAMES}=.+|[0-9]+(-[0-9]+)?",
        f"not a limit ({', '.join(limits.NAMES[:-1])} or {limits.NAMES[-1]}, then = and a value)",
        each=True,
    ),
    *_of("memory", (limits.SIZE, limits.SIZE_WORDS)),
    *_of("memory", (_TOO_LITTLE, limits.LEAST_WORDS, Rule.AVOID)),
    *_of("swap", (limits.SIZE, limits.SIZE_WORDS)),
    *_of(
        "cpu",
        (r"[0-9]{1,5}(\.[0-9]{1,3})?", limits.CPU_WORDS),
        (r"0+(\.(0|00[0-9]?))?", limits.LEAST_CPU_WORDS, Rule.AVOID),
    ),
    Check(f"[^0-9].*|{_CPUS}", limits.CPUSET_WORDS, each=True),
    *_of("cpuset", (_CPUS, limits.CPUSET_WORDS)),
    Check("[a-z=]*([0-9]{1,4})-([0-9]{1,4})", limits.CPUSET_WORDS, each=True, rule=Rule.ORDER),
    *_of("pids", (_COUNT, "expected a whole number from 1"), ("0+", "expected a whole number from 1", Rule.AVOID)),
    *_of(
        "io",
        (f"[0-9]{{1,4}}:[0-9]{{1,7}}(:({_BPS}={limits.SIZE}|{_IOPS}={_COUNT}))+", limits.IO_WORDS),
        (f".*={_NOTHING}(:.*)?", "0 would stop every access", Rule.AVOID),
        (_repeated(limits.IO_KEYS), "given twice", Rule.AVOID),
    ),
    *_of(
        "hugetlb",
        (f"{limits.SIZE}:{limits.SIZE}", limits.HUGETLB_WORDS),
        (f"{_NOTHING}:.*", limits.HUGETLB_WORDS, Rule.AVOID),
    ),
    *_of(
        "rdma",
        (f"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,62}}(:{one_of(*limits.RDMA_KEYS)}={_COUNT})+", limits.RDMA_WORDS),
        (_repeated(limits.RDMA_KEYS), "given twice", Rule.AVOID),
    ),
    # What follows something else than processors is no list of them.
    Check(f"{_ITEM}(,{_ITEM})*", "only cpuset has a list of numbers"),
    Check(f"{one_of('memory', 'swap', 'cpu', 'cpuset', 'pids')}=.*", "given twice", each=True, rule=Rule.ONCE),
    Check("(io=[^:]+:[^:]+:[a-z]+|rdma=[^:]+:[a-z_]+)=.*", "given twice", each=True, rule=Rule.ONCE),
    Check("(hugetlb=[^:]+):.*", "given twice", each=True, rule=Rule.ONCE),
)
