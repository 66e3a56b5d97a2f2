"""`enclos shell`: bash, or sh where there is none, in a running container of one's own. Runs as whoever types it."""

from __future__ import annotations

from enclos.runtime.cli import common
from enclos.runtime.cli.exec import STEP_HELP, execute

FIND_SHELL = "command -v bash >/dev/null 2>&1 && exec bash; exec sh"


def run(arguments: list[str]) -> int:
    """Open a shell."""
    parser = common.Parser(
        prog="enclos shell",
        description="Open a shell in a running container of yours on this node: bash, or sh where there is none. It "
        "has what 'enclos exec' gives a command, and a terminal of its own.",
    )
    parser.add_argument("step", metavar="JOB[.STEP]", help=STEP_HELP)
    given = parser.parse_args(arguments)
    return execute(parser, given.step, ["/bin/sh", "-c", FIND_SHELL])
