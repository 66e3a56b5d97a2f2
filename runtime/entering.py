"""A program in a container, for `enclos exec`: a fork of the zygote that enters it and starts the program.

It gives up what it is in the order of a task's (spank/join.c): as root the limits, cgroup and network, then the user's
ids, then the namespaces and capabilities. Only then does it make the socket over which the user's command passes its
descriptors: nobody but this process, the user's own by now, ever holds or closes them. It outlives the agent, ends with
its program, and is ended as the program is, with the step. What `enclos run` has in common with it is here as well
(running.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from enclos.runtime import cgroup, errors, linux, protocol
from enclos.runtime.operations.assembly import forbid_imports
from enclos.runtime.protocol import Message

NAMESPACES = {
    "net": linux.CLONE_NEWNET,
    "user": linux.CLONE_NEWUSER,
    "mnt": linux.CLONE_NEWNS,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
# Between the agent's answer and the command's first packet.
PATIENCE_SECONDS = 10.0
# Between SIGHUP and SIGKILL, when the command has gone.
GRACE_SECONDS = 2.0
FILTER_BYTES = 4096 * 8
STANDARD = 3
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_FOUND, NOT_RUN = 127, 126
LIMIT_NAME_BYTES = 26
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(slots=True)
class Program:
    """What the command asks for."""

    arguments: list[str]
    variables: dict[str, str]
    fds: list[int]
    controls_terminal: bool
    # Further descriptors, by the numbers that they get.
    places: dict[int, int] = field(default_factory=dict)


def run(channel: socket.socket, request: Message) -> int:
    """The task `enter`: `uid`, `gid`, each `group`, `stepd`, `cgroup`, `keep_caps`, `workdir`, and the environment.

    Its descriptors are named by `fds`: a pidfd of slurmstepd, namespaces, perhaps a system call filter. It answers
    `ready` with the end of a socket for the command (docs/protocol.md), or `error` with its `cause`.
    """
    fds = dict(zip(request.get("fds").split(","), request.take_fds(), strict=True))
    stepd_fd = fds.pop("stepd")
    try:
        _enter(request, fds)
    except OSError as error:
        what = error.filename or error.strerror or ""
        protocol.send(channel, [("state", "error"), ("cause", f"{what}: {errors.reason(error.errno or 0)}")])
        return 1
    if has_ended(stepd_fd):
        return 1  # Perhaps the container was swept before this process was in it.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            protocol.send(channel, [("state", "ready")], [theirs.fileno()])
        channel.close()
        ours.settimeout(PATIENCE_SECONDS)
        try:
            program = receive_program(ours, request.values)
        except (OSError, protocol.ProtocolError):
            return 1
        if not program.arguments:
            return 1
        outcome = Session(ours, stepd_fd).run(program)
        if outcome:
            with suppress(OSError):
                protocol.send(ours, outcome)
    return 0


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


# ---------------------------------------------------------------- becoming what a task is


def _enter(request: Message, fds: dict[str, int]) -> None:
    """Raises OSError where the kernel refuses anything of it."""
    stepd_pid = request.number("stepd")
    take_limits(stepd_pid)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    if request.get("follow"):
        cgroup.follow(stepd_pid)
    elif directory := request.get("cgroup"):
        cgroup.enter(directory, os.getpid())
    groups = [int(group) for group in request.all("group")]
    become_task((request.number("uid"), request.number("gid"), groups), fds, request)


def become_task(ids: tuple[int, int, Sequence[int]], fds: dict[str, int], told: Message) -> None:
    """Enter a container and give up, for good, what its user must not have; root does it, in the order of a task's.

    Args:
        ids: uid, gid and supplementary groups.
        fds: the container's namespaces by their names, and perhaps `seccomp`; all of them are closed.
        told: `keep_caps` and `workdir`, as the agent says them to a task.

    Raises:
        OSError: the kernel refuses anything of it; `filename` or `strerror` says what.
    """
    filter_fd = fds.pop("seccomp", -1)
    program = os.pread(filter_fd, FILTER_BYTES, 0) if filter_fd >= 0 else b""
    if "net" in fds:
        linux.setns(fds["net"], linux.CLONE_NEWNET)
    linux.new_session_keyring()
    linux.keep_capabilities_and_become(*ids, 0)
    linux.set_dumpable(False)
    forbid_imports()
    for name, kind in NAMESPACES.items():
        if name != "net":
            linux.setns(fds[name], kind)
    # No kernel without cgroups is meant, but one without their namespaces.
    _unshare_cgroup()
    for fd in (*fds.values(), filter_fd):
        if fd >= 0:
            os.close(fd)
    _confine(int(told.get("keep_caps") or "0", 16), told.get("workdir") or "/", program)


def _unshare_cgroup() -> None:
    try:
        linux.unshare(linux.CLONE_NEWCGROUP)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _confine(keep: int, workdir: str, program: bytes) -> None:
    """The same as join_confine() in spank/join.c. The working directory is entered with the user's own rights."""
    linux.drop_bounding_set(keep)
    linux.set_capabilities(keep, keep)
    # A change of capabilities may have made this process dumpable, for its user to read and change.
    linux.set_dumpable(False)
    linux.set_no_new_privileges()
    os.chdir(workdir)
    if program:
        linux.install_seccomp_filter(program)


def take_limits(pid: int) -> None:
    """Another process' resource limits instead of the agent's, which are far above a user's.

    slurmstepd's own are the bounds of what its tasks may have. The agent's shelter from the OOM killer is not among
    them: /proc/self/oom_score_adj.

    Read from a file: prlimit(2) wants a capability for another user's process that root in a container may lack.
    """
    with open(f"/proc/{pid}/limits") as file:
        rows = file.read().splitlines()[1:]
    # In the order of their numbers (fs/proc/base.c, lnames).
    for number, row in enumerate(rows):
        soft, hard = (-1 if word == "unlimited" else int(word) for word in row[LIMIT_NAME_BYTES:].split()[:2])
        resource.setrlimit(number, (soft, hard))


# ---------------------------------------------------------------- the program


def receive_program(connection: socket.socket, changes: Mapping[str, Sequence[str]]) -> Program:
    """The command's packet; raises ProtocolError or OSError, also when none comes in time.

    Args:
        changes: `set`, `default` and `unset` of the container's variables, as the agent says them to a task.
    """
    message = protocol.receive(connection)
    if message is None:
        raise protocol.ProtocolError("the command has gone")
    arguments, fds = message.all("arg"), message.take_fds()
    if len(fds) != STANDARD:
        raise protocol.ProtocolError("no program")
    # One without a name cannot be passed on.
    variables = dict(entry.split("=", 1) for entry in message.all("env") if "=" in entry[1:])
    for key, values in changes.items():
        for text in values:
            name, _, value = text.partition("=")
            if key == "set":
                variables[name] = value
            elif key == "default":
                variables.setdefault(name, value)
            elif key == "unset":
                variables.pop(name, None)
    return Program(arguments, variables, fds, message.get("terminal") == "1")


class Session:
    """One program and the command that waits for it."""

    def __init__(self, connection: socket.socket, stepd_fd: int) -> None:
        self._connection = connection
        self._stepd_fd = stepd_fd

    def run(self, program: Program) -> protocol.Fields | None:
        """Start it, pass the command's signals on, and return how it ended; None when it went with its step."""
        try:
            refused_fd, refuses_fd = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
        except OSError as error:  # A limit of its user's is reached.
            return [("exit", str(NOT_RUN)), ("errno", str(error.errno))]
        if pid == 0:
            _start(program, refuses_fd)
        for fd in (refuses_fd, *program.fds, *program.places.values()):
            os.close(fd)
        with open(refused_fd, "rb") as refused:
            number = refused.read(16)
        pidfd = os.pidfd_open(pid)
        if not number:
            self._attend(pid, pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        if has_ended(self._stepd_fd):
            return None  # Of a program that was swept away with its step, its own status says nothing.
        fields = [("exit", str(exit_status(status)))]
        if number:
            fields.append(("errno", number.decode()))
        return fields

    def _attend(self, pid: int, pidfd: int) -> None:
        """Until the program has ended. It is not reaped meanwhile: its number stays its own."""
        poll = select.poll()
        for fd in (pidfd, self._stepd_fd, self._connection.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if pidfd in ready:
                return
            if self._stepd_fd in ready:
                os.killpg(pid, signal.SIGKILL)
                poll.unregister(self._stepd_fd)
            elif not self._forward(pid):
                poll.unregister(self._connection)
                _end(pid, pidfd)

    def _forward(self, pid: int) -> bool:
        """One signal of the command; False when the command has gone, or says something else."""
        try:
            message = protocol.receive(self._connection)
            if message is None:
                return False
            with message:
                number = message.number("signal")
        except (OSError, protocol.ProtocolError):
            return False
        if number in FORWARDED:
            os.killpg(pid, number)
        return number in FORWARDED


def _end(pid: int, pidfd: int) -> None:
    """As a terminal that hangs up does; who ignores that is killed."""
    os.killpg(pid, signal.SIGHUP)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(GRACE_SECONDS * 1000)
    os.killpg(pid, signal.SIGKILL)


def _start(program: Program, refuses_fd: int) -> NoReturn:
    """In the fork: become the program."""
    number = errno.EINVAL
    try:
        # With it dies the program, should its user kill the process that waits for it.
        linux.set_parent_death_signal(signal.SIGKILL)
        os.setsid()
        for place, fd in (*enumerate(program.fds), *program.places.items()):
            os.dup2(fd, place)
        if program.controls_terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError):
                signal.signal(each, signal.SIG_DFL)
        number = _exec(program)
    except OSError as error:
        number = error.errno or number
    finally:
        os.write(refuses_fd, str(number).encode())
        os._exit(NOT_FOUND if number in (errno.ENOENT, errno.ENOTDIR) else NOT_RUN)


def _exec(program: Program) -> int:
    """Look for the program along PATH, as execvp(3) does; returns the errno of why it does not run."""
    name = program.arguments[0]
    if not name:
        return errno.ENOENT
    path = program.variables.get("PATH") or DEFAULT_PATH
    directories: Sequence[str] = [""] if "/" in name else path.split(":")
    number = errno.ENOENT
    for directory in directories:
        try:
            os.execve(os.path.join(directory, name), program.arguments, program.variables)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                number = error.errno or errno.EINVAL
    return number


def exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
