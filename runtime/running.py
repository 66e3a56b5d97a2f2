"""`enclos run` on the node: the process that stands where slurmstepd and its task stand in a step of Slurm's.

A fork of the zygote. As root it takes what its user wants from his command, sends it to the agent's own socket as the
plugin does (JOIN, docs/protocol.md), and gets the container's namespaces. It takes the cgroups, limits and priority of
the command, enters the container by the code of `enclos exec` (entering.py), and is the user's from then on: starts
his program, passes signals on, has the container saved. Who he is, the agent says, by the kernel's word; nothing that
he sends can be another's name. Its end is the end of the container, for this agent and those after it; it ends with its
program and with its command.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from enclos.runtime import cgroup, entering, entrypoint, errors, linux, protocol
from enclos.runtime.entering import Session, has_ended
from enclos.runtime.protocol import Message
from enclos.runtime.request import RUN_JOB

AGENT_SOCKET = "/run/enclos/agent.sock"
# What the command may say. All else of the request is the agent's.
WISHES = ("cwd", "home", "authfile", "runtime")
PATIENCE_SECONDS = 10.0
# Bash, or sh where there is none.
SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash; exec sh")
KILLED = 128 + signal.SIGKILL


class _Over(Exception):
    """The command has gone, or has said what it may not."""


def run(channel: socket.socket, request: Message) -> int:
    """The task `run`: `step`, `uid`, `gid`, `groups` and `pid` of the command, and two descriptors.

    These are a pidfd of the command, and the mount namespace in which it names paths. It answers `ready` with the end
    of a socket for the command.
    """
    linux.set_dumpable(False)
    client_fd, mounts_fd = request.take_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            protocol.send(channel, [("state", "ready")], [theirs.fileno()])
        channel.close()
        ours.settimeout(PATIENCE_SECONDS)
        with suppress(_Over, OSError):  # Nobody is there to be told.
            _Runner(ours, client_fd, request).run(mounts_fd)
    return 0


class _Runner:
    """One run, from the command's request to its program's end."""

    def __init__(self, connection: socket.socket, client_fd: int, request: Message) -> None:
        self._connection = connection
        self._client_fd = client_fd
        self._request = request
        self._node = request.get("node")
        self._save: socket.socket | None = None

    def run(self, mounts_fd: int) -> None:
        """Raises _Over or OSError: the command is not there any more."""
        wishes = self._receive_wishes()
        try:
            pid = self._request.number("pid")
            _be_like(pid)
            root_fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self._refuse(errors.run_failed(f"its place: {errors.reason(error.errno or 0)}"))
            return
        dump = entrypoint.program()
        reply = self._join(wishes, mounts_fd, root_fd)
        if reply is None:
            return
        with reply:
            entered = self._enter(reply)
            told = dict(reply.values)
        if entered:
            self._attend(told, dump)

    # --- as root ----------------------------------------------------------------------------------------------

    def _receive_wishes(self) -> list[tuple[str, str]]:
        """The command's first packet. What descriptors come with it the kernel drops."""
        try:
            packet = self._connection.recv(protocol.MAX_PACKET_BYTES + 1)
            if not packet or len(packet) > protocol.MAX_PACKET_BYTES:
                raise _Over
            values = protocol.decode(packet)
        except (protocol.ProtocolError, TimeoutError) as error:
            raise _Over from error
        for key in values:
            if key not in WISHES and not key.startswith(("option.", "env.")):
                raise _Over
        return [(key, value) for key, several in values.items() for value in several]

    def _join(self, wishes: Sequence[tuple[str, str]], mounts_fd: int, root_fd: int) -> Message | None:
        """The agent's answer, with the namespaces; None where the command has been told why there are none."""
        asked = self._request
        fields = [("version", str(protocol.VERSION)), ("verb", "join"), ("job", str(RUN_JOB)), *wishes]
        fields += [(key, asked.get(key)) for key in ("step", "uid", "gid", "groups")]
        fields += [("stepd", str(os.getpid())), ("tasks", "1"), ("task", "0")]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as agent:
            try:
                agent.connect(AGENT_SOCKET)
                # From here on this process sees the files that its user sees.
                linux.setns(mounts_fd, linux.CLONE_NEWNS)
                if not os.path.samestat(os.fstat(root_fd), os.stat("/")):
                    self._refuse(errors.run_confined("it has another root directory"))
                    return None
                protocol.send(agent, fields, [mounts_fd])
                reply = self._await_reply(agent)
            except protocol.ProtocolError:
                self._refuse(errors.exec_too_large(protocol.MAX_PACKET_BYTES))
                return None
            except OSError:
                reply = None
        os.close(mounts_fd)
        os.close(root_fd)
        if reply is None:
            self._refuse(errors.agent_restarted())
        elif reply.get("status") != "ok":
            with reply:
                self._send([("status", "error"), ("text", reply.get("text")), ("hint", reply.get("hint"))])
            return None
        return reply

    def _await_reply(self, agent: socket.socket) -> Message | None:
        """Passes on what the agent says of its progress; None when it ends meanwhile."""
        poll = select.poll()
        for fd in (agent.fileno(), self._connection.fileno(), self._client_fd):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if ready != {agent.fileno()}:
                raise _Over  # Until its program is there, the command has nothing to say.
            message = protocol.receive(agent)
            if message is None or message.get("status") != "progress":
                return message
            with message:
                self._send([("status", "progress"), ("text", message.get("text"))])

    def _enter(self, reply: Message) -> bool:
        """Become the user, in his container, with what his command has; False when the command was told why not."""
        fds = dict(zip(reply.get("fds").split(","), reply.take_fds(), strict=True))
        if (save_fd := fds.pop("save", -1)) >= 0:
            self._save = socket.socket(fileno=save_fd)
        if (fd := fds.pop("entrypoint", -1)) >= 0:  # For several tasks to agree upon.
            os.close(fd)
        asked = self._request
        groups = [int(group) for group in asked.get("groups").split(",") if group]
        try:
            entering.take_limits(asked.number("pid"))
            if has_ended(self._client_fd):
                raise _Over  # It may have been another process that was looked at.
            entering.become_task((asked.number("uid"), asked.number("gid"), groups), fds, reply)
        except OSError as error:
            what = error.filename or error.strerror or ""
            self._refuse(errors.run_failed(f"{what}: {errors.reason(error.errno or 0)}"))
            return False
        return True

    # --- as the user, in the container ------------------------------------------------------------------------

    def _attend(self, told: Mapping[str, Sequence[str]], dump: bytes) -> None:
        """The program, from its start to what is to be done at its end."""
        notices = [("notice", text) for text in told.get("notice", ())]
        self._send([("status", "ok"), *notices])
        try:
            program = entering.receive_program(self._connection, told)
        except protocol.ProtocolError as error:
            raise _Over from error
        if not program.arguments:
            program.arguments = list(told.get("command") or SHELL)
        words = told.get("entrypoint")
        if words and not self._prepare(program, words, "entrypoint_log" in told, dump):
            return
        outcome = Session(self._connection, self._client_fd).run(program)
        if outcome is None:
            return
        fields = list(outcome)
        if self._save is not None:
            fields = self._saved(fields)
        self._send(fields)
        self._await_farewell()

    def _prepare(self, program: entering.Program, words: Sequence[str], log_wanted: bool, dump: bytes) -> bool:
        """Run the entrypoint; False when it failed, and the command was told."""
        log_fd = os.dup(program.fds[2]) if log_wanted else os.memfd_create("enclos-entrypoint", os.MFD_CLOEXEC)
        first = entrypoint.First(words, dump, program.variables, log_fd)
        outcome = Session(self._connection, self._client_fd).run(first.program)
        if outcome is None:
            return False
        status = int(dict(outcome)["exit"])
        shown = b"" if log_wanted or (status == 0 and first.said()) else first.log()
        if status == 0 and first.said():
            program.variables = first.changed()
            return True
        error = errors.entrypoint_failed(status) if status else errors.entrypoint_stayed()
        with suppress(OSError):
            os.write(program.fds[2], shown)
        self._send([("exit", str(status or 1)), ("text", error.line(self._node)), ("hint", error.hint)])
        self._await_farewell()
        return False

    def _saved(self, fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Have the container saved, unless the program was killed; see spank/save.c."""
        assert self._save is not None
        status = int(dict(fields)["exit"])
        if status == KILLED:
            return fields
        reply = None
        with suppress(OSError, protocol.ProtocolError):
            protocol.send(self._save, [("version", str(protocol.VERSION)), ("verb", "ended")])
            reply = self._await_reply(self._save)
        if reply is None:
            error = errors.save_interrupted()
            told = [("text", error.line(self._node)), ("hint", error.hint)]
        elif reply.get("status") == "ok":
            texts = [reply.get("text"), *reply.all("notice")]
            return fields + [("notice", text) for text in texts if text]
        else:
            told = [("text", reply.get("text")), ("hint", reply.get("hint"))]
        return [("exit", str(status or 1)), *(field for field in fields if field[0] != "exit"), *told]

    # --- the command ------------------------------------------------------------------------------------------

    def _send(self, fields: protocol.Fields) -> None:
        protocol.send(self._connection, fields)

    def _refuse(self, error: errors.EnclosError) -> None:
        self._send([("status", "error"), ("text", error.line(self._node)), ("hint", error.hint)])

    def _await_farewell(self) -> None:
        """It may still ask the agent which limit its program met; the container is there for as long."""
        with suppress(TimeoutError):
            self._connection.recv(1)


def _be_like(pid: int) -> None:
    """Take from the command what a child of its own would have. Raises OSError, also when it has ended."""
    cgroup.follow(pid)
    _take_login(pid)
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, pid))
    Path("/proc/self/oom_score_adj").write_text(Path(f"/proc/{pid}/oom_score_adj").read_text())
    rows = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    os.umask(next(int(row.split()[1], 8) for row in rows if row.startswith("Umask:")))


def _take_login(pid: int) -> None:
    """Whose login it is that the kernel's audit writes beside all that a process does (pam_loginuid(8))."""
    own = Path("/proc/self/loginuid")
    try:
        login = Path(f"/proc/{pid}/loginuid").read_text()
    except FileNotFoundError:
        return  # A kernel without audit, or the command has ended, which is seen next.
    if login != own.read_text():
        own.write_text(login)
