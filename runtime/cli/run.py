"""`enclos run`: a container without Slurm, with the options of srun.

Runs as whoever types the command, who alone passes descriptors to the process in the container (running.py), and none
of his terminal's: see terminal.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence

from enclos.runtime import errors, protocol
from enclos.runtime.cli import client, common, options, terminal
from enclos.runtime.cli.exec import finish
from enclos.runtime.options import INTERFACE_VARIABLES, VISIBLE_VARIABLES

# With one of these the words are the command alone, as srun's are.
NAMING = ("container-image", "container-name", "container-profile")


def run(arguments: list[str]) -> int:
    """Make a container, and run a command in it."""
    parser = common.Parser(
        prog="enclos run",
        usage="enclos run [OPTION...] [IMAGE] [COMMAND...]",
        allow_abbrev=False,
        description="Run a command in a container on this machine, without Slurm: the same container as srun makes, "
        "and the same options. IMAGE is what --container-image takes. Where --container-image, --container-name or "
        "--container-profile is given there is no IMAGE, and all words are the command's, as with srun. Without a "
        "command it is the image's own, or a shell. The exit status is the command's, 128+N after signal N, 127 if it "
        "is not there, 126 if it cannot be run.",
    )
    options.add(parser)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="image, as --container-image takes it")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="what to run, with its arguments")
    own, words = options.split(arguments)
    given = parser.parse_args(own)
    if words and not any(getattr(given, name) for name in NAMING):
        setattr(given, "container-image", words[:1])
        words = words[2:] if words[1:2] == ["--"] else words[1:]
    environment = common.environment()
    chosen, variables = options.choose(given, environment)
    if "container-image" not in chosen and "container-name" not in chosen:
        parser.error("an image is required")
    fields = options.fields(chosen)
    if variables:
        fields.append(("option.env", ",".join(variables)))
    return execute(fields, words, {**environment, **variables})


def execute(fields: Sequence[tuple[str, str]], command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Have the container made and the command run; returns its exit status."""
    told = _about_me(variables)
    connection, name = client.start()
    with connection:
        _ask(connection, [*fields, *told])
        _await_container(connection, name)
        with terminal.Attachment(connection) as attached:
            attached.send(command, variables)
            answer = attached.relay()
        if answer is None:
            raise errors.exec_ended(name)
        notices = answer.all("notice")
        if answer.number("exit"):
            notices += client.news(name)
    for text in notices:
        _show(text)
    if answer.get("text"):
        common.report(errors.EnclosError("", answer.get("text"), hint=answer.get("hint")))
    return finish(answer, command[0] if command else "the image's command")


def _about_me(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """What the plugin would say of the step, as far as it is its user's word."""
    named = {"home": "HOME", "authfile": "REGISTRY_AUTH_FILE", "runtime": "XDG_RUNTIME_DIR"}
    try:
        here = os.getcwd()
    except OSError as error:
        raise errors.run_nowhere(error.errno or 0) from error
    told = [("cwd", here), *((key, variables.get(name, "")) for key, name in named.items())]
    sent = [name for name in (*INTERFACE_VARIABLES, *VISIBLE_VARIABLES) if name in variables]
    return told + [(f"env.{name}", variables[name]) for name in sent]


def _ask(connection: socket.socket, fields: Sequence[tuple[str, str]]) -> None:
    try:
        protocol.send(connection, fields)
    except protocol.ProtocolError as error:
        raise errors.exec_too_large(protocol.MAX_PACKET_BYTES) from error
    except OSError:
        pass  # It has ended: the answer that does not come says so.


def _await_container(connection: socket.socket, name: str) -> None:
    """Until the program may start. An interrupt ends this process, and with it what is being made."""
    while True:
        try:
            message = protocol.receive(connection)
        except (OSError, protocol.ProtocolError):
            message = None
        if message is None:
            raise errors.exec_ended(name)
        if message.get("status") == "progress":
            _show(message.get("text"))
            continue
        if message.get("status") != "ok":
            raise errors.EnclosError("", message.get("text"), hint=message.get("hint"))
        for text in message.all("notice"):
            _show(text)
        return


def _show(text: str) -> None:
    print(f"enclos: {errors.printable(text)}", file=sys.stderr)
