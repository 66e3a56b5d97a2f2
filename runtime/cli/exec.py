"""`enclos exec` and the program of `enclos shell`: join a running container of one's own.

Runs as whoever types the command, who alone passes descriptors to the process in the container (entering.py), and none
of his terminal's: see terminal.py.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Sequence

from enclos.runtime import errors, protocol
from enclos.runtime.cli import client, common, terminal
from enclos.runtime.request import BATCH_STEP, INTERACTIVE_STEP, RUN, RUN_JOB

SPECIAL = {"batch": str(BATCH_STEP), "interactive": str(INTERACTIVE_STEP)}
ROOTS_VARIABLES = ("PATH", "TERM", "LANG", "LC_ALL")
EXIT_NOT_FOUND, EXIT_NOT_RUN = 127, 126
STEP_HELP = "job or step, as 'enclos ps' shows it; a job's only container here, or your only run, needs no step"


def run(arguments: list[str]) -> int:
    """Run a command in a container."""
    parser = common.Parser(
        prog="enclos exec",
        description="Run a command in a running container of yours on this node, with the rights, limits and network "
        "of its step, and the variables of your shell and of the image. It ends with the step. Exit status: the "
        "command's, 128+N after signal N, 127 if it is not there, 126 if it cannot be run.",
    )
    parser.add_argument("step", metavar="JOB[.STEP]", help=STEP_HELP)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run, with its arguments")
    given = parser.parse_args(arguments)
    if not given.command:
        parser.error("a command is required")
    return execute(parser, given.step, given.command)


def execute(parser: common.Parser, name: str, command: Sequence[str]) -> int:
    """Run a command in the container of that name; returns its exit status."""
    job, _, step = name.partition(".")
    job = str(RUN_JOB) if job == RUN else job
    step = SPECIAL.get(step, step)
    if not all(part.isascii() and part.isdigit() for part in (job, step or "0")) or name.endswith("."):
        parser.error(f"{name} is no JOB or JOB.STEP")
    connection, found = client.enter(job, step)
    with connection, terminal.Attachment(connection) as attached:
        attached.send(command, _variables())
        answer = attached.relay()
    if answer is None:
        raise errors.exec_ended(found)
    return finish(answer, command[0])


def finish(answer: protocol.Message, command: str) -> int:
    """Say why the command did not run, if it did not; returns the exit status."""
    number = int(answer.get("errno") or 0)
    if number in (errno.ENOENT, errno.ENOTDIR):
        common.report(errors.exec_not_found(command))
        return EXIT_NOT_FOUND
    if number:
        common.report(errors.exec_not_run(command, number))
        return EXIT_NOT_RUN
    return answer.number("exit")


def _variables() -> dict[str, str]:
    """Of root's only what tells nothing: the program is the user's, who may read them."""
    variables = common.environment()
    if os.geteuid() != 0:
        return variables
    return {name: value for name, value in variables.items() if name in ROOTS_VARIABLES}
