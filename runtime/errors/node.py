"""Errors: what is wrong with the node, Slurm or the agent."""

from __future__ import annotations

import os

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, namespace_limit, reason


def agent_not_running(socket: str, number: int) -> EnclosError:
    """Nobody answers at the socket."""
    return AdminError("", "agent is not running", f"{socket}: {reason(number)}", ADMIN + "systemctl status enclosd")


def agent_silent(socket: str, seconds: int) -> EnclosError:
    """It accepts the connection and does not answer."""
    return AdminError(
        "", "agent does not answer", f"{socket}: nothing for {seconds} s", ADMIN + "journalctl -u enclosd"
    )


def bad_answer(detail: str) -> EnclosError:
    """The agent's answer is not of the protocol."""
    return AdminError(
        "agent",
        "its answer cannot be understood",
        detail,
        ADMIN + "are enclos and enclosd of the same release?",
    )


def agent_restarted() -> EnclosError:
    """The agent ended while it made the container."""
    return AdminError(
        "agent",
        "it ended while the container was being made",
        hint="run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def disabled() -> EnclosError:
    """The kill switch."""
    return UserError(
        "--container-image",
        "containers are switched off by the administrator",
        hint="run without a container, or ask the administrator (enabled in enclos.yaml)",
    )


def root_step() -> EnclosError:
    """Root asked for a container."""
    return UserError(
        "--container-image",
        "steps of root are refused",
        hint="run as an ordinary user (srun --uid); " + ADMIN + "step.allow_root in enclos.yaml",
    )


def userns_forbidden(cause: str = "") -> EnclosError:
    """No user namespaces on this node. A sysctl that forbids them, read back, goes before `cause`."""
    return AdminError(
        "",
        "cannot create a user namespace",
        namespace_limit() or cause,
        ADMIN + "raise it; 'enclos check' tests all requirements",
    )


def build_failed(operation: str, number: int) -> EnclosError:
    """An operation of the plan failed."""
    return AdminError(
        "container",
        f"cannot be made: {operation}",
        reason(number),
        ADMIN + "journalctl -u enclosd; 'enclos check' tests all requirements",
    )


def journal_failed(directory: str, number: int) -> EnclosError:
    """A record cannot be written, and nothing is made that could not be undone."""
    return AdminError(
        directory,
        "the agent cannot write its records",
        os.strerror(number).lower(),
        ADMIN + "df -h /run; is it full or read-only?",
    )


def builder_ended(operation: str, status: str) -> EnclosError:
    """The builder was killed or ended by itself."""
    return AdminError(
        "container",
        f"its builder ended during: {operation}" if operation else "its builder ended",
        status,
        "run the step again; " + ADMIN + "journalctl -u enclosd",
    )


def build_timed_out(seconds: int, operation: str = "") -> EnclosError:
    """The deadline passed."""
    return AdminError(
        "container",
        f"not ready after {seconds} s",
        f"during: {operation}" if operation else "",
        "run the step again; is a file system slow or hanging? " + ADMIN + "step.build_deadline_seconds in enclos.yaml",
    )


def only_root(verb: str) -> EnclosError:
    """A verb of the administrator's."""
    return UserError(verb, "only root may do this", hint="run it as root on the compute node")
