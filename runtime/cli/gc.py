"""`enclos gc`: undo what ended jobs left on this node. For root; the agent does it.

It does so by itself when it starts and at each job's epilog; this is for an administrator who wants to be sure.
Without an agent there is nothing to call: starting one does the same.
"""

from __future__ import annotations

from enclos.runtime.cli import client, common


def run(arguments: list[str]) -> int:
    """Ask the agent to compare its jobs with slurmctld's."""
    parser = common.Parser(
        prog="enclos gc",
        description="Undo what jobs left on this node whose epilog the agent missed. Running jobs are left alone. "
        "Root only; the agent does the same when it starts.",
    )
    common.add_json(parser)
    given = parser.parse_args(arguments)
    ended = client.ask("gc", timeout_seconds=30.0)
    if given.json:
        common.print_json(ended)
    elif ended:
        print("cleaned up after jobs: " + ", ".join(str(job) for job in ended))
    else:
        print("nothing to clean up")
    return 0
