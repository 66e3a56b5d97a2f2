"""The zygote: a small process that forks builders, relays and sweepers, so that the agent never forks.

The agent starts it as a fresh interpreter before anything else, over one socket. It holds no secret and imports
only what its children need, so a fork is cheap and shows a user nothing. Runs as root in the agent's mount
namespace and the node's network namespace; knows nothing of Slurm, images or networks.

A spawn request is one packet: `task=NAME` and the child's end of a channel, then the task's own descriptors.
The child's first packet on its channel is `started` with its pid and pidfd.
"""

from __future__ import annotations

import grp
import os
import pwd
import select
import signal
import socket
import sys
from contextlib import suppress

from enclos.runtime import linux, protocol
from enclos.runtime.tasks import TASKS, Task

REPORT_LINES = 64


def main() -> None:
    """Serve spawn requests on the descriptor that argv names, until the agent closes its end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    linux.set_name("enclos-zygote")
    # Nobody waits for the children: each is watched through its pidfd, so the kernel may reap it at once.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The C library loads its name service modules now and not in every builder.
    pwd.getpwuid(0), grp.getgrgid(0)
    protocol.send(control, [("state", "ready")])
    with suppress(ConnectionResetError):  # The agent has ended without having read all that it was told.
        while (message := protocol.receive(control)) is not None:
            with message:
                _spawn(control, message)


def _spawn(control: socket.socket, message: protocol.Message) -> None:
    """Fork the child for one request."""
    task = TASKS[message.get("task")]
    channel_fd, *fds = message.take_fds()
    message.fds = fds
    zygote_pid = os.getpid()
    try:
        if os.fork() == 0:
            _child(control, task, channel_fd, message, zygote_pid)
    except OSError as error:
        # No more processes or memory: the agent sees the closed channel; other children live on.
        sys.stderr.write(f"enclos-zygote: cannot fork: {error.strerror}\n")
    finally:
        os.close(channel_fd)


def _announce(channel: socket.socket) -> None:
    """The first packet on the channel: the agent needs the pidfd before anything that the task asks of it."""
    pid = os.getpid()
    pidfd = os.pidfd_open(pid)
    protocol.send(channel, [("state", "started"), ("pid", str(pid))], [pidfd])
    os.close(pidfd)


def _child(control: socket.socket, task: Task, channel_fd: int, request: protocol.Message, zygote_pid: int) -> None:
    """Run one task in the fork and end without returning, whatever happens."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if task.dies_with_zygote:
            linux.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != zygote_pid:
                return  # The zygote died before the signal was set.
        linux.close_other_descriptors([0, 1, 2, channel_fd, *request.fds])
        control.detach()
        linux.set_name(f"enclos-{task.name}")
        with socket.socket(fileno=channel_fd) as channel:
            try:
                _announce(channel)
                status = task.run(channel, request)
            except OSError:
                if not _is_abandoned(channel):
                    raise
    except BaseException as error:
        _report(task, error)
    finally:
        os._exit(status)


def _is_abandoned(channel: socket.socket) -> bool:
    """Whether the agent has ended, and with it the reason for this child: that is no error of the child's."""
    poll = select.poll()
    poll.register(channel, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def _report(task: Task, error: BaseException) -> None:
    """An unexpected error means a bug of ours; it goes to the agent's log.

    Without the module `traceback`, which would be looked for, as the source lines would, where this process stands:
    that may be a user's image by now.
    """
    lines = [f"enclos-{task.name}: unexpected {error!r}"]
    place = error.__traceback__
    while place is not None and len(lines) < REPORT_LINES:
        code = place.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{place.tb_lineno} in {code.co_name}")
        place = place.tb_next
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
