"""Stop the product's processes at a chosen system call, from outside: strace injects SIGSTOP, the test does the rest.

What stands still can be looked at, killed or left to its deadline. Nothing in the product knows of this.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster.cluster import Cluster, ClusterError
from patience import PATIENCE

# What the operations of a plan, and the talk between builder and agent, are made of. Not recvmsg: the zygote itself
# would stop there. The signal comes when the call returns, so after sendmsg it meets a builder that waits.
CALLS = (
    *("open_tree", "mount_setattr", "move_mount", "fsopen", "fsconfig", "fsmount", "openat2", "ioctl"),
    *("unshare", "setns", "setresuid", "setgroups", "setfsuid", "capset", "pivot_root", "umount2", "fchdir"),
    *("mknodat", "mkdirat", "sendmsg"),
)
STOPPED = re.compile(r"^(?:\[pid +)?(\d+)\]? --- stopped by SIGSTOP ---")
CALLED = re.compile(r"^(\d+) +(\w+)\(")


@dataclass(frozen=True, slots=True)
class Point:
    """The `number`th time that a builder makes a system call."""

    call: str
    number: int


def zygote(cluster: Cluster, node: str) -> int:
    """Pid of the zygote of a node's agent, once there is one."""
    return child(cluster.agent_pid(node), "enclos-zygote")


def child(parent: int, name: str, timeout: float = 5) -> int:
    """Pid of a child of that name; TimeoutError when none shows up."""
    deadline = time.monotonic() + timeout * PATIENCE
    while time.monotonic() < deadline:
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    return int(pid)
        time.sleep(0.005)
    raise TimeoutError(f"{parent} has no child {name}")


def spare(cluster: Cluster, node: str, timeout: float = 5) -> int:
    """Pid of the builder forked ahead on a node, when it waits; TimeoutError when there is none."""
    deadline = time.monotonic() + timeout * PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # One of them is just ending.
            pid = child(zygote(cluster, node), "enclos-spare", timeout)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S":
                return pid
        time.sleep(0.002)
    raise TimeoutError("no spare builder waits")


def await_spares(cluster: Cluster) -> None:
    """Wait until each agent that keeps a spare builder has one: it is ordered when a step has ended."""
    for node in cluster.nodes:
        settings = (cluster.layout.node_etc(node) / "enclos.yaml").read_text()
        with contextlib.suppress(ClusterError):  # No agent runs there.
            if cluster.agent_pid(node) and "spare_builder: false" not in settings:
                spare(cluster, node)


def processes(cluster: Cluster, node: str, name: str) -> list[int]:
    """Pids of a node's processes of that name, zombies left out."""
    found = []
    for pid in cluster.processes(node):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
    return found


def points(cluster: Cluster, pids: Sequence[int], run: list[str]) -> list[Point]:
    """Every system call of CALLS that the builder of a step makes, as found by watching one; `run` makes the step.

    Args:
        pids: the processes of which the builder is one, or a child.
    """
    with _watching(pids) as calls:
        done = cluster.run(run, user="usera", timeout=60)
        assert done.returncode == 0, done.stderr
    return _counted(calls, next(pid for pid, call in calls if call == "unshare"))


def rehearsal_points(cluster: Cluster, node: str, order: Callable[[], object]) -> list[Point]:
    """The same of a spare builder up to where it waits; `order` has one forked by a step that needs none."""
    kill(spare(cluster, node))
    with _watching([zygote(cluster, node)]) as calls:
        order()
        waiting = spare(cluster, node)
    return _counted(calls, waiting)


@contextlib.contextmanager
def _watching(pids: Sequence[int]) -> Iterator[list[tuple[int, str]]]:
    """The system calls of CALLS that these processes and their children make meanwhile, with pids; full at the end."""
    calls: list[tuple[int, str]] = []
    with tempfile.NamedTemporaryFile("r", prefix="enclos-trace-") as output:
        tracer = _attach(["strace", "-f", "-qq", "-o", output.name, "-e", f"trace={','.join(CALLS)}"], pids)
        try:
            yield calls
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(10)
        calls += [(int(match[1]), match[2]) for line in output if (match := CALLED.match(line))]


def _counted(calls: Sequence[tuple[int, str]], builder: int) -> list[Point]:
    counted = Counter(call for pid, call in calls if pid == builder)
    return [Point(call, number) for call, times in counted.items() for number in range(1, times + 1)]


def _attach(command: list[str], pids: Sequence[int]) -> subprocess.Popen[str]:
    options = [word for pid in pids for word in ("-p", str(pid))]
    tracer = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 10
    while any(f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        assert tracer.poll() is None, tracer.communicate()[1]
        assert time.monotonic() < deadline, "strace does not attach"
        time.sleep(0.002)
    return tracer


class Stopper:
    """Stops each of the processes, and each new child of theirs, at a point, while it lasts."""

    def __init__(self, pids: Sequence[int], point: Point) -> None:
        inject = f"inject={point.call}:signal=STOP:when={point.number}"
        self._tracer = _attach(["strace", "-f", "-qq", "-e", f"trace={point.call}", "-e", inject], pids)
        self._unread = self._seen = b""

    def stopped(self, timeout: float = 20) -> int:
        """Pid of the next child that stands still at the point; TimeoutError when none does."""
        assert self._tracer.stderr is not None
        output = self._tracer.stderr.fileno()
        deadline = time.monotonic() + timeout * PATIENCE
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                if match := STOPPED.match(line.decode(errors="replace")):
                    return int(match[1])
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0] or not (more := os.read(output, 4096)):
                raise TimeoutError(f"nothing stopped; strace: {self._tracer.poll()} {self._seen!r}")
            self._unread += more
            self._seen += more

    def let_go(self) -> None:
        """Stop nobody any more; who stands still stands on."""
        self._tracer.kill()
        self._tracer.wait(10)
        assert self._tracer.stderr is not None
        self._tracer.stderr.close()


@contextlib.contextmanager
def stopping(pids: Sequence[int], point: Point) -> Iterator[Stopper]:
    """A Stopper for these processes and their children."""
    stopper = Stopper(pids, point)
    try:
        yield stopper
    finally:
        stopper.let_go()


@contextlib.contextmanager
def _injecting(pids: Sequence[int], point: Point, fault: str) -> Iterator[None]:
    inject = f"inject={point.call}:{fault}:when={point.number}"
    tracer = _attach(["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject], pids)
    try:
        yield
    finally:
        tracer.kill()
        tracer.communicate(timeout=10)


def killing(pids: Sequence[int], point: Point) -> contextlib.AbstractContextManager[None]:
    """Kill these processes and their new children at the point. (Whoever kills a stopped one may take strace along.)"""
    return _injecting(pids, point, "signal=KILL")


def delaying(pid: int, point: Point, seconds: float) -> contextlib.AbstractContextManager[None]:
    """Hold up each descendant of this process for a moment when it returns from the call."""
    return _injecting([pid], point, f"delay_exit={int(seconds * 1e6)}")


def kill(pid: int) -> None:
    """SIGKILL and wait for the end; a process that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert select.select([pidfd], [], [], 10)[0], f"{pid} does not end"
        finally:
            os.close(pidfd)
