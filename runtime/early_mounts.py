r"""What srun refuses of --container-mounts by itself (early.py); the syntax is in mounts.py.

A part between colons is of characters that are neither colon nor backslash, and of escaped ones. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from enclos.runtime import mounts
from enclos.runtime.early import GIVEN, Check, Rule, one_of

SYNTAX = "(expected SRC:DST[:FLAGS])"

_C = r"([^:\\]|\\[,:\\])"
_SLASH = rf"\.?\.?/{_C}*"
_UP = r"\.\.?"
_WORDS = one_of(*mounts.WORDS)

# Each list of flags: the alternatives exclude each other.
_FLAG = one_of(*mounts.ALL_FLAGS)
_VALUE = one_of(*(f"{name}={one_of(pattern)}" for name, pattern in mounts.TMPFS_VALUES.items()))
_ANY = "([^+:]+[+])*"

# What normpath(3) makes a single slash of, but for names that `..` takes back later than at once.
_DOTS = r"(/(\.|\.\.)?)*"
_ROOT = rf"{_DOTS}(/([^/:\\]|\\[,:\\])+(/\.?)*/\.\.{_DOTS})*"


def _together() -> Iterator[Check]:
    """One check per family of flags of which a mount takes only one."""
    for family in mounts.FAMILIES:
        pairs = [f"{one}[+]{_ANY}{one_of(*(o for o in family if o != one))}" for one in family]
        yield Check(
            f"{_C}+:{_C}+:{_ANY}{one_of(*pairs)}([+].*)?",
            f"invalid format: {', '.join(family[:-1])} and {family[-1]} exclude each other",
            each=True,
            rule=Rule.AVOID,
        )
    for name in mounts.TMPFS_VALUES:
        words = f"invalid format: {name} given twice"
        yield Check(f"{_C}+:{_C}+:{_ANY}{name}=.*[+]{name}=.*", words, each=True, rule=Rule.AVOID)


MOUNTS = (
    GIVEN,
    Check(r"([^\\]|\\[,:\\])*", f"invalid format: {mounts.BACKSLASH_WORDS}"),
    Check(f"{_C}+(:.*)?", f"invalid format: mount without a source {SYNTAX}", each=True),
    Check(f"{_C}+(:{_C}+(:.*)?)?", f"invalid format: mount without a target {SYNTAX}", each=True),
    Check(_WORDS, f"invalid format: mount without a target {SYNTAX}", each=True, rule=Rule.AVOID),
    Check(one_of(_SLASH, _UP, _WORDS) + "(:.*)?", mounts.SOURCE_WORDS, each=True),
    Check(rf"{_C}+:\.\..*", mounts.ESCAPE_WORDS, each=True, rule=Rule.AVOID),
    Check(rf"{_C}+(:(\.?/{_C}*|\.)(:.*)?)?", mounts.TARGET_WORDS, each=True),
    Check(f"{_C}*(:{_C}*){{0,2}}", f"invalid format: too many colons {SYNTAX}", each=True),
    Check(rf"{_C}+:\.?{_ROOT}(:.*)?|{_ROOT}", "the container's root cannot be a target", each=True, rule=Rule.AVOID),
    Check(f"tmpfs:.*|{_C}+(:{_C}+(:({_FLAG}([+]{_FLAG})*)?)?)?", "unknown flag of a mount", each=True),
    Check(
        f"tmpfs:{_C}+(:(({_FLAG}|{_VALUE})([+]({_FLAG}|{_VALUE}))*)?)?",
        "unknown flag of a mount, or no value for it",
        each=True,
        start="tmpfs:",
    ),
    *_together(),
)
