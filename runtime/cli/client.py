"""Ask the agent of this node, over the socket that is open to users (docs/protocol.md).

Runs as whoever types the command; the agent knows the caller by SO_PEERCRED and decides
what to show. Must not hold what verbs print.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from enclos.runtime import errors, protocol

USER_SOCKET = "/run/enclos/user.sock"
AGENT_SOCKET = "/run/enclos/agent.sock"
ANSWER_SECONDS = 5.0
# More than the agent gives the process that enters.
ENTER_SECONDS = 9.0


def ask(verb: str, path: str = "", *, timeout_seconds: float = ANSWER_SECONDS, **fields: str) -> Any:  # noqa: ANN401  # whatever JSON holds
    """Send one request and return the JSON of its answer; a list comes in as many parts as it takes.

    Root asks the agent itself, so that no user can stand in the way.

    Raises:
        EnclosError: agent_not_running, agent_silent, or the agent's own error in its words.
    """
    path = path or _socket_path()
    value, more = _page(path, timeout_seconds, {"verb": verb, **fields})
    while more:
        page, more = _page(path, timeout_seconds, {"verb": verb, **fields, "after": more})
        value += page
    return value


def enter(job: str, step: str) -> tuple[socket.socket, str]:
    """A socket to a process in a container, and the step's name; the caller closes it. Raises like `ask`."""
    return _take_socket({"verb": "exec", "job": job, "step": step})


def start() -> tuple[socket.socket, str]:
    """The same for a container that is yet to be made; the name is run.N."""
    return _take_socket({"verb": "run"})


def news(name: str) -> list[str]:
    """Which limits a run has met; none where the agent cannot be asked."""
    path = _socket_path()
    with suppress(errors.EnclosError), _exchange(path, ANSWER_SECONDS, {
        "verb": "news", "step": name.partition(".")[2]
    }) as answer:
        return answer.all("notice")
    return []


def _take_socket(fields: Mapping[str, str]) -> tuple[socket.socket, str]:
    path = _socket_path()
    with _exchange(path, ENTER_SECONDS, fields) as answer:
        _check(answer)
        if len(answer.fds) != 1:
            raise errors.bad_answer("it holds no socket")
        return socket.socket(fileno=answer.take_fds()[0]), answer.get("step")


def _socket_path() -> str:
    """Root's own, unless root is only called so, in a user namespace."""
    return AGENT_SOCKET if os.geteuid() == 0 and not _is_closed(AGENT_SOCKET) else USER_SOCKET


def _is_closed(path: str) -> bool:
    return os.path.exists(path) and not os.access(path, os.W_OK)


def _page(path: str, timeout_seconds: float, fields: Mapping[str, str]) -> tuple[Any, str]:
    """One request: the JSON of the answer, and where a list goes on, or ""."""
    with _exchange(path, timeout_seconds, fields) as answer:
        return _value(answer), answer.get("more")


def _exchange(path: str, timeout_seconds: float, fields: Mapping[str, str]) -> protocol.Message:
    """One request and its answer, which the caller closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(path)
            protocol.send(connection, [("version", str(protocol.VERSION)), *fields.items()])
            answer = protocol.receive(connection)
        except TimeoutError as error:
            raise errors.agent_silent(path, int(timeout_seconds)) from error
        except OSError as error:
            raise errors.agent_not_running(path, error.errno or 0) from error
        except protocol.ProtocolError as error:
            raise errors.bad_answer(str(error)) from error
    if answer is None:
        raise errors.bad_answer("it closed the connection without an answer")
    return answer


def _check(answer: protocol.Message) -> None:
    if answer.get("status") != "ok":
        raise errors.EnclosError("", answer.get("text") or "the agent refused", hint=answer.get("hint"))


def _value(answer: protocol.Message) -> Any:  # noqa: ANN401
    _check(answer)
    try:
        return json.loads(answer.get("json", "null"))
    except ValueError as error:
        raise errors.bad_answer("its JSON cannot be read") from error
