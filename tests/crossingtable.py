"""What comes of each attempt of crossings.py, in each mode: the one table behind the tests and docs/security.md.

Pure. A word that begins with "yes" says that the attempt succeeds; the tests of the modes assert exactly these.
"""

from __future__ import annotations

from dataclasses import dataclass

NAME, ADDRESSES, COUNTERS = "see its name", "read its addresses", "read its counters"
PAIRS, KEYS = "see who uses it, and its queue pairs", "read its keys"
INSIDE, OUTSIDE = "open it in a container", "open it outside of containers"
INDEX, OTHER_INDEX = "use its address index", "use the address index of an interface elsewhere"
CONNECT, PACKETS = "connect to it", "send packets to it"
# By netlink, as tests/vm/netadmin.c calls them.
CHANGES = frozenset(
    ("rename", "count", "divide", "add", "mode", "qkeys", "raw", "move", "interface", "remove", "enter")
)
# What has to work for its owner, at the same moment and by the same programs.
OWN_CONNECTION, OWN_PACKETS = "its owner connects to it", "its owner sends packets to it"
MODES = ("exclusive", "soft", "shared")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of docs/security.md: in words, the attempts that it stands for, and what comes of them in each of MODES."""

    words: str
    attempts: frozenset[str]
    results: tuple[str, str, str]


def _row(words: str, attempts: str | frozenset[str], *results: str) -> Row:
    exclusive, soft, shared = results
    return Row(words, attempts if isinstance(attempts, frozenset) else frozenset([attempts]), (exclusive, soft, shared))


BY_VLAN = "no, by the hook's VLAN"
ROWS = (
    _row(
        "see its name, read its addresses, read its counters",
        frozenset([NAME, ADDRESSES, COUNTERS]),
        *("no", "yes", "yes"),
    ),
    _row(
        "see which processes use it, the numbers of its queue pairs and of their next packets",
        PAIRS,
        *("no", "yes", "yes"),
    ),
    _row("read the keys of its memory", KEYS, "no", "no", "no"),
    _row(
        "open it in a container of one's own, also with the node's /dev/infiniband mounted there",
        INSIDE,
        *("no", "no", "no"),
    ),
    _row("open its node with a shell on the node", OUTSIDE, "no", "no", "yes"),
    _row("use its address index: be it", INDEX, "no", "no", "yes"),
    _row(
        "use an address index that is not of an interface in one's own network, on a device of one's own",
        OTHER_INDEX,
        *("no", "no", "yes"),
    ),
    _row("connect to it by rdma_cm", CONNECT, BY_VLAN, "no", "no: on a job's network nobody can"),
    _row("send it packets, even with its owner's help", PACKETS, BY_VLAN, "no", "yes"),
    _row(
        "rename, divide, move or remove it, take its interface, bind its counters, read its raw state, enter its "
        "namespace, add a device, change the mode or who may use privileged keys: as a user, as root in a container, "
        "and with all capabilities in a user namespace of one's own, in a container and outside",
        CHANGES,
        *("no", "no", "no"),
    ),
)
# What an owner can do, so that a "no" is more than a program that does not run. In shared mode rdma_cm finds no device:
# their interfaces are in the node's namespace.
OWNERS = {
    "exclusive": frozenset([OWN_CONNECTION, OWN_PACKETS]),
    "soft": frozenset([OWN_CONNECTION, OWN_PACKETS]),
    "shared": frozenset([OWN_PACKETS]),
}
ATTEMPTS = frozenset[str]().union(*(row.attempts for row in ROWS)) | {OWN_CONNECTION, OWN_PACKETS}


def expected(mode: str) -> set[str]:
    """Which attempts succeed in a mode, its owner's own among them."""
    place = MODES.index(mode)
    rows = (row.attempts for row in ROWS if row.results[place].startswith("yes"))
    return set(OWNERS[mode]).union(*rows)


def markdown() -> list[str]:
    """The lines of the table in docs/security.md."""
    head = ["| Attempt | `exclusive` | `soft` | `shared` |", "|---|---|---|---|"]
    return [*head, *(f"| {row.words} | {' | '.join(row.results)} |" for row in ROWS)]
