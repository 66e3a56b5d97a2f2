"""The agent: answers the shim and the users, and keeps the steps of this node.

Holds the dispatch of verbs, and which steps there are. What happens to a step is in building.py and steps.py, to a job
in jobs.py; sockets and signals are daemon.py's. One thread, event-driven: an idle agent does not wake up.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import time
from typing import Any

from enclos.runtime import errors, protocol, request, runs, sessions, stepd
from enclos.runtime.building import NodeStep
from enclos.runtime.connection import Connection
from enclos.runtime.controller import JobFacts
from enclos.runtime.prefetch import Prefetch
from enclos.runtime.spawner import RESTART_PAUSE_SECONDS, Child, ChildDied
from enclos.runtime.steps import JoinReply, Step, Surroundings
from enclos.runtime.visitors import PREFIX

import enclos

log = logging.getLogger("enclosd")

# A page of `ps` ends with the entry that exceeds this. An entry has a path of at most 4,095 bytes, six times that in
# JSON: a page fits into a packet.
PAGE_BYTES = 65536

# As much of an error as the shim shows: with an option of 100 KB in it, it would not fit into a packet.
TEXT_CHARACTERS = 2000

# With so many objects that stay, Python's collector would hardly ever look at those that come and go: its free lists
# would grow by 2 kB a step up to their limits.
COLLECT_STEPS = 32

# The next builder is forked ahead when a step has ended, or this long after the last one began: its tasks have started.
SPARE_SECONDS = 1.0

# Less than a visitor may be silent (visitors.py).
REMOVAL_SECONDS = 8.0

# Parts of the reply to JOIN, in the order in which the shim needs them.
DESCRIPTOR_ORDER = ("net", "user", "mnt", "ipc", "uts", "seccomp", "entrypoint", "save", "cgroup")


class Agent:
    """Everything that the node's daemon knows."""

    def __init__(self, around: Surroundings, config_path: str, slurm: str) -> None:
        """`slurm` is what shows that this machine is a node of Slurm's, or ""."""
        self.around = around
        self._config_path = config_path
        self._started = time.time()
        self._ended = 0
        self._steps: dict[tuple[int, int], Step] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._spare_order: asyncio.TimerHandle | None = None
        self._prefetch = Prefetch(around)
        self._sessions = sessions.Sessions(around)
        self._runs = runs.Runs(around, self._steps, slurm)
        around.named.find_step = lambda job, step: self._steps.get((job, step))

    # --- the shim ---------------------------------------------------------------------------------------------

    async def serve_shim(self, connection: Connection) -> None:
        """Serve one connection of the shim until it closes."""
        _, uid, _ = connection.peer()
        if uid != 0:
            # The socket's mode forbids this already; it is checked again because everything hangs on it.
            log.error("uid=%d reached the agent's socket, refused", uid)
            return
        while (message := await connection.receive()) is not None:
            with message:
                reply, fds = await self._answer_shim(message, connection)
            if reply:
                # One request a connection (docs/protocol.md): the shim has its answer and closes.
                connection.send([("version", str(protocol.VERSION)), *reply], fds)
                return

    async def _answer_shim(
        self, message: protocol.Message, connection: Connection
    ) -> tuple[list[tuple[str, str]], list[int]]:
        """The reply to one request; an error is a reply too."""
        try:
            _check_version(message)
            match message.get("verb"):
                case "job":
                    await self._learn(message)
                case "end":
                    self._prefetch.end(message.number("job"))
                    await self.around.jobs.end(message.number("job"))
                case "prepare":
                    self._prepare(message, _stepd_pid(message, connection, is_task=False))
                    return [], []
                case "join":
                    return _joined(await self._join(message, connection))
                case "exit":
                    return [("status", "ok"), *await self._task_exited(message, connection)], []
                case "ps" | "status" | "gc" | "rm" | "news":
                    return await self._answer_user(message, 0), []
                case "exec" | "run" as verb:
                    caller = _caller(connection) if verb == "run" else None
                    reply, fds = await self._enter(message, 0, caller)
                    if fds:
                        # The reply is sent before the event loop does anything else.
                        asyncio.get_running_loop().call_soon(os.close, fds[0])
                    return reply, fds
                case verb:
                    raise errors.bad_request(f"verb={verb[:32]}")
        except errors.EnclosError as error:
            if message.get("verb") == "prepare":
                return [], []  # The join says it.
            return self._refusal(error), []
        except (protocol.ProtocolError, ValueError) as error:
            return self._refusal(errors.bad_request(str(error))), []
        except Exception:
            log.exception("%s failed", message.get("verb")[:32])
            return self._refusal(errors.build_failed("(see the agent's log)", 0)), []
        return [("status", "ok")], []

    def _refusal(self, error: errors.EnclosError) -> list[tuple[str, str]]:
        fields = [("status", "error"), ("text", error.line(self.around.node)[:TEXT_CHARACTERS])]
        return fields + ([("hint", errors.printable(error.hint))] if error.hint else [])

    async def _learn(self, message: protocol.Message) -> None:
        leader = message.get("leader")
        self._runs.slurm = self._runs.slurm or "a job's prolog"
        job = JobFacts(
            message.number("job"),
            message.number("uid"),
            message.get("nodelist"),
            message.get("account"),
            message.get("partition"),
            int(leader) if leader.isdigit() else 0,
        )
        await self.around.jobs.announce(job)
        if image := message.get("image"):
            self._prefetch.begin(job, image)

    def _prepare(self, message: protocol.Message, stepd_pid: int) -> None:
        """Begin to build the container of a step."""
        step = self._step(_wanted(message, stepd_pid))
        step.prepare()

    async def _task_exited(self, message: protocol.Message, connection: Connection) -> list[tuple[str, str]]:
        """Which limit may have ended a task: told once per step, to the first task that ended badly."""
        stepd_pid = _stepd_pid(message, connection, is_task=False)
        step = self._steps.get((message.number("job"), message.number("step")))
        if step is None or step.record["stepd"] != stepd_pid:
            return []
        notices = [("notice", error.line(self.around.node)) for error in step.limit_news()]
        if message.get("pid"):
            await step.task_ended(message.number("pid"))
        return notices

    async def _join(self, message: protocol.Message, connection: Connection) -> JoinReply:
        """Wait for the container, then put the task where the step's limits are."""
        step, reply = await self._joined_step(message, connection)
        step.admit(connection.peer()[0])
        return reply

    async def _joined_step(self, message: protocol.Message, connection: Connection) -> tuple[Step, JoinReply]:
        """A step whose PREPARE went to an agent before this one is made now."""
        stepd_pid = _stepd_pid(message, connection, is_task=True)
        if message.number("job") == request.RUN_JOB and stepd_pid != connection.peer()[0]:
            raise errors.bad_request(f"stepd={stepd_pid} is another process")
        step = self._steps.get((message.number("job"), message.number("step")))
        if step is not None and step.joined and step.record["stepd"] == stepd_pid:
            # Of up to hundreds of tasks, only the first one's request is read.
            return step, _for_one_task(step, await step.answer(), connection.peer()[0])
        wanted = _wanted(message, stepd_pid)
        if step is None or step.record["stepd"] != stepd_pid:
            # A requeued job has the same ids again.
            step = self._step(wanted)
        if message.get("task") == "0":
            step.show_progress(lambda text: _send_progress(connection, text))
        if message.fds:
            step.take_mounts(message.fds[0], connection.peer()[0], wanted)
        return step, _for_one_task(step, await step.join(wanted), connection.peer()[0])

    def _step(self, wanted: request.StepRequest) -> Step:
        """Register a step, its life tied to its slurmstepd.

        Raises:
            EnclosError: bad_request, when the pid is not that of a slurmstepd of root's; agent_restarted, for a run
                that an agent before this one began.
        """
        if wanted.is_run:
            if not self._runs.expects(wanted.step, wanted.stepd):
                raise errors.agent_restarted()
            stepd_pidfd = stepd.open_runner(wanted.stepd)
        else:
            stepd_pidfd = stepd.open_stepd(wanted.stepd)
        try:
            step = NodeStep(self.around, wanted, stepd_pidfd)
        except OSError as error:  # It has ended since.
            os.close(stepd_pidfd)
            raise errors.bad_request(f"stepd={wanted.stepd}: {errors.reason(error.errno or 0)}") from error
        self.watch(step)
        if self._spare_order is not None:
            self._spare_order.cancel()
        self._spare_order = asyncio.get_running_loop().call_later(SPARE_SECONDS, self._order_spare)
        return step

    def _order_spare(self) -> None:
        """Have the next step's builder forked, off the way of any step."""
        if self._spare_order is not None:
            self._spare_order.cancel()
            self._spare_order = None
        self.around.spawner.order_spare()

    def watch(self, step: Step) -> None:
        """Tie the step's end to that of its slurmstepd."""
        self._steps[step.key] = step
        watcher = asyncio.create_task(self._watch(step))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watched)

    async def _watch(self, step: Step) -> None:
        await step.watch(self._forget)
        await self.around.jobs.step_ended(step.key[0], self._busy())
        if not any(other.record["state"] == "building" for other in self._steps.values()):
            self._order_spare()

    def _watched(self, watcher: asyncio.Task[None]) -> None:
        self._watchers.discard(watcher)
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            log.error("the end of a step failed", exc_info=error)

    def _forget(self, step: Step) -> None:
        self._ended += 1
        if self._ended % COLLECT_STEPS == 0:
            gc.collect()
        if self._steps.get(step.key) is step:
            del self._steps[step.key]

    # --- users ------------------------------------------------------------------------------------------------

    async def serve_visitors(self, listener: socket.socket) -> None:
        """Keep a process (visitors.py) that serves the users' socket, and answer what it passes on."""
        spawner = self.around.spawner
        while True:
            await spawner.ready()
            try:
                uid = self.around.config.network.relay_uid
                desk = spawner.spawn("visitors", [("uid", str(uid))], [listener.fileno()])
            except ChildDied:
                continue
            try:
                await self._answer_visitors(desk)
            except ChildDied:
                log.warning("the process that serves users ended, starting another")
            except Exception:
                log.exception("a request of a user failed, starting another process to serve them")
            finally:
                desk.close()
            await asyncio.sleep(RESTART_PAUSE_SECONDS)

    async def _answer_visitors(self, desk: Child) -> None:
        """Raises ChildDied when that process has ended."""
        turn = asyncio.Lock()
        entering: set[asyncio.Task[bool]] = set()

        async def reply(ident: str, fields: list[tuple[str, str]], fds: list[int]) -> bool:
            async with turn:
                named = [("id", ident), ("version", str(protocol.VERSION)), *fields]
                return await desk.channel.deliver(named, fds)

        async def enter(ident: str, asked: protocol.Message, uid: int, caller: runs.Caller | None) -> bool:
            fields, fds = await self._enter(asked, uid, caller)
            try:
                return await reply(ident, fields, fds)
            finally:
                for fd in fds:
                    os.close(fd)

        try:
            while True:
                with await desk.receive() as message:
                    fields = message.values.items()
                    ident, uid = message.get("id"), message.number("uid")
                    caller = _visitor(message, uid)
                    asked = {key[len(PREFIX) :]: values for key, values in fields if key.startswith(PREFIX)}
                question = protocol.Message(asked)
                if question.get("verb") in ("exec", "run"):
                    # The user may make it last (he can stop the process that enters): nobody else waits.
                    task = asyncio.create_task(enter(ident, question, uid, caller))
                    entering.add(task)
                    task.add_done_callback(entering.discard)
                elif not await reply(ident, await self._answer_user(question, uid), []):
                    raise ChildDied
                # Steps come first, however fast users ask.
                await asyncio.sleep(0)
        finally:
            for task in entering:
                task.cancel()

    async def _enter(
        self, message: protocol.Message, uid: int, caller: runs.Caller | None
    ) -> tuple[list[tuple[str, str]], list[int]]:
        """A process in a container of the user's (of anybody's for root): its socket, which the caller closes.

        With `caller`, in one that is made now.
        """
        try:
            _check_version(message)
            if caller is not None:
                number, fd = await self._runs.start(caller)
                return [("status", "ok"), ("step", request.step_name(request.RUN_JOB, number))], [fd]
            step = sessions.find(self._steps, uid, message)
            return [("status", "ok"), ("step", step.name)], [await self._sessions.enter(step, uid)]
        except errors.EnclosError as error:
            return self._refusal(error), []
        except (protocol.ProtocolError, ValueError) as error:
            return self._refusal(errors.bad_request(str(error))), []
        except Exception:
            log.exception("%s failed", message.get("verb"))
            return self._refusal(errors.build_failed("(see the agent's log)", 0)), []
        finally:
            if caller is not None:
                caller.close()

    async def _answer_user(self, message: protocol.Message, uid: int) -> list[tuple[str, str]]:
        try:
            _check_version(message)
            match message.get("verb"):
                case "ps":
                    return [("status", "ok"), *self._page(uid, message.get("after"))]
                case "news":
                    return [("status", "ok"), *self._news(uid, message.number("step"))]
                case "status":
                    return [("status", "ok"), ("json", json.dumps(self._describe()))]
                case "gc" if uid == 0:
                    return [("status", "ok"), ("json", json.dumps(await self.reconcile() or []))]
                case "rm":
                    return [("status", "ok"), ("json", str(await self._remove_named(uid, message.get("name"))))]
                case "gc":
                    raise errors.only_root("gc")
                case verb:
                    raise errors.bad_request(f"verb={verb[:32]}")
        except errors.EnclosError as error:
            return self._refusal(error)
        except (protocol.ProtocolError, ValueError) as error:
            return self._refusal(errors.bad_request(str(error)))

    def _news(self, uid: int, number: int) -> list[tuple[str, str]]:
        """Which limits a run of the user's has met: told once, as to the tasks of a step."""
        step = self._steps.get((request.RUN_JOB, number))
        if step is None or step.uid != uid:
            return []
        return [("notice", error.line(self.around.node)) for error in step.limit_news()]

    async def _remove_named(self, uid: int, name: str) -> int:
        """In the time that a visitor is given: what takes longer goes on, and he may ask again."""
        removing = asyncio.ensure_future(self.around.named.remove(uid, name))
        return await asyncio.wait_for(asyncio.shield(removing), REMOVAL_SECONDS)

    def _page(self, uid: int, after: str) -> list[tuple[str, str]]:
        """The containers that this user may know of, his own or for root all: as many as fit into a packet.

        Args:
            after: JOB.STEP of the last one he has; "" to begin.
        """
        job, _, number = after.partition(".")
        last = (int(job), int(number)) if after else (-1, -1)
        found: list[str] = []
        room, more = PAGE_BYTES, ""
        for key in sorted(key for key, step in self._steps.items() if key > last and uid in (0, step.uid)):
            if room < 0:
                return [("json", f"[{', '.join(found)}]"), ("more", more)]
            found.append(json.dumps(self._steps[key].describe()))
            room -= len(found[-1])
            more = f"{key[0]}.{key[1]}"
        return [("json", f"[{', '.join(found)}]")]

    def records(self) -> list[str]:
        """The names of the records of all steps."""
        return [step.record_name for step in self._steps.values()]

    async def reconcile(self) -> list[int] | None:
        """Undo what jobs left whose epilog this agent missed; returns their ids, None without slurmctld."""
        await self.around.devices.holdings.reclaim()
        return await self.around.jobs.reconcile(self._busy)

    def _busy(self) -> set[int]:
        return {job for job, _ in self._steps}

    def _describe(self) -> dict[str, Any]:
        return {
            "version": enclos.__version__,
            "node": self.around.node,
            "pid": os.getpid(),
            "started": self._started,
            "config": self._config_path,
            "steps": len(self._steps),
            "slurm": self._runs.slurm,
            "run": self._runs.allowed,
            "gpus": self.around.devices.gpu_files,
        }


def _caller(connection: Connection) -> runs.Caller:
    """Root, who asks the agent itself."""
    pid, uid, gid = connection.peer()
    return runs.Caller(pid, uid, gid, connection.peer_groups(), connection.peer_pidfd())


def _visitor(message: protocol.Message, uid: int) -> runs.Caller | None:
    """A user who asks for a run, as the process that serves users knows him."""
    if not message.get("pid"):
        return None
    groups = tuple(int(group) for group in message.get("groups").split(",") if group)
    pidfd = message.take_fds()[0] if message.fds else -1
    return runs.Caller(message.number("pid"), uid, message.number("gid"), groups, pidfd)


def _send_progress(connection: Connection, text: str) -> None:
    """A line for the terminal; one that does not get through is no loss."""
    connection.send([("version", str(protocol.VERSION)), ("status", "progress"), ("text", text)])


def _check_version(message: protocol.Message) -> None:
    """Both sides must have a version in common (docs/protocol.md)."""
    newest = message.number("version")
    oldest = message.number("oldest") if message.get("oldest") else newest
    if newest < protocol.OLDEST_VERSION or oldest > protocol.VERSION:
        raise errors.bad_request(f"version={newest}")


def _stepd_pid(message: protocol.Message, connection: Connection, *, is_task: bool) -> int:
    return stepd.of_request(message.number("stepd"), connection.peer()[0], is_task=is_task)


def _wanted(message: protocol.Message, stepd_pid: int) -> request.StepRequest:
    """The request of a step, with slurmstepd's pid as it is here."""
    return request.parse({**message.values, "stepd": [str(stepd_pid)]})


def _for_one_task(step: Step, reply: JoinReply, task_pid: int) -> JoinReply:
    """With sockets of the task's own, where it has to tell of its end, or asks for a cgroup."""
    channels = {"save": step.save_channel(), "cgroup": step.cgroup_channel(task_pid)}
    fds = {name: fd for name, fd in channels.items() if fd >= 0}
    for fd in fds.values():
        # The reply is sent before the event loop does anything else.
        asyncio.get_running_loop().call_soon(os.close, fd)
    return JoinReply(reply.fields, {**reply.fds, **fds}) if fds else reply


def _joined(reply: JoinReply) -> tuple[list[tuple[str, str]], list[int]]:
    names = [name for name in DESCRIPTOR_ORDER if name in reply.fds]
    return [*reply.fields, ("fds", ",".join(names))], [reply.fds[name] for name in names]
