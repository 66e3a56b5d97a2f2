"""`enclos rm`: remove a named container of one's own on this node; for sites that keep them beyond a job.

Runs as whoever types the command; the agent does it.
"""

from __future__ import annotations

from enclos.runtime import errors
from enclos.runtime.cli import client, common

PATIENCE_SECONDS = 60.0


def run(arguments: list[str]) -> int:
    """Ask the agent to remove them."""
    parser = common.Parser(
        prog="enclos rm",
        description="Remove named containers of yours on this node, with all that was written into them.",
    )
    parser.add_argument("name", nargs="+", help="as given with --container-name")
    given = parser.parse_args(arguments)
    for name in given.name:
        if not client.ask("rm", name=name, timeout_seconds=PATIENCE_SECONDS):
            raise errors.named_not_there(name)
    return 0
