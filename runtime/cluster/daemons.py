"""Start and stop the daemons of a cluster: munged, slurmctld, slurmd and the agent.

Each runs in the foreground on its machine, as an orphan of that machine's first process, with its output in a log
file. Knows their command lines and when each is ready; the files they read are slurm.py's. Runs as root.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster.layout import SUBMIT, Layout, agent_command, programs_path
from enclos.runtime.cluster.nodes import enter_command
from enclos.runtime.cluster.processes import Process

# An emulated machine is ten times slower than a real one.
READY_DEADLINE_S = float(os.environ.get("ENCLOS_CLUSTER_DEADLINE", "30"))
SERVICES = f"{cgroups.MOUNT_POINT}/{cgroups.SLICE}"
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DaemonFailed(RuntimeError):
    """A daemon did not start; the text has the end of its log."""


def root_environment(slurm: str = "") -> dict[str, str]:
    """The environment of root on a machine of the cluster: nothing of the caller's but the terminal and language."""
    kept = {name: os.environ[name] for name in ("TERM", "LANG", "LC_ALL", "COLORTERM") if name in os.environ}
    return {**kept, "PATH": f"{programs_path(slurm)}:{SBIN}", "HOME": "/root", "USER": "root", "LOGNAME": "root"}


def start(machine: Process, command: Sequence[str], log: Path, extra: Mapping[str, str] | None = None) -> Process:
    """Start a daemon on a machine and return at once.

    Returns:
        The process, as the pid namespace of the caller sees it.

    Raises:
        DaemonFailed: it could not even be started.
    """
    reader, writer = os.pipe()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    # The shell in the background tells its pid as the host sees it, then becomes the daemon. dash has told it
    # to ignore SIGINT and SIGQUIT, as for any background job; a daemon wants them back.
    daemon = shlex.join(["setsid", "env", "--default-signal=INT,QUIT", *command])
    told = f'read -r stat < /proc/self/fd/{proc}/self/stat; echo "$stat" >&{writer}'
    log_word = shlex.quote(str(log))
    service = shlex.quote(f"{SERVICES}/{Path(command[0]).name}.service")
    placed = f"if [ -d {SERVICES} ]; then mkdir -p {service}; echo 0 > {service}/cgroup.procs; fi"
    script = f"({told}; {placed}; exec {writer}>&- {proc}<&- < /dev/null >> {log_word} 2>&1; exec {daemon}) &"
    environment = {**root_environment(), **(extra or {})}
    command_line = [*enter_command(machine), "bash", "-c", script]
    done = subprocess.run(
        command_line, pass_fds=(writer, proc), env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    os.close(writer)
    os.close(proc)
    with os.fdopen(reader) as told_by:
        stat = told_by.readline()
    if not stat:
        raise DaemonFailed(f"{command[0]}: {done.stderr.strip()}")
    return Process.parse_stat(stat)


def start_munged(layout: Layout, control: Process) -> Process:
    """Start the one munged of the cluster; all machines reach its socket in the state directory."""
    key = layout.munge / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    command = [
        "munged", "--foreground", f"--key-file={key}", f"--socket={layout.munge}/socket",
        f"--pid-file={layout.munge}/pid", f"--seed-file={layout.munge}/seed", "--num-threads=4",
        f"--log-file={layout.log(SUBMIT, 'munged')}",
    ]  # fmt: skip
    return start(control, command, layout.log(SUBMIT, "munged.err"))


def start_slurmctld(layout: Layout, control: Process) -> Process:
    """Start slurmctld on the submit host."""
    return start(control, ["slurmctld", "-D"], layout.log(SUBMIT, "slurmctld.err"))


def start_slurmd(layout: Layout, name: str, node: Process) -> Process:
    """Start slurmd; it takes its node's name from the UTS namespace."""
    Path(f"/proc/{node.pid}/root/run/slurmd").mkdir(exist_ok=True)
    return start(node, ["slurmd", "-D"], layout.log(name, "slurmd.err"))


def start_agent(layout: Layout, name: str, node: Process, slurm: str = "") -> Process | None:
    """Start the agent; None where there is none to start yet."""
    command = agent_command(slurm)
    if command is None:
        return None
    return start(node, command, layout.log(name, "enclosd"), {"PYTHONUNBUFFERED": "1"})


def await_ready(ready: Callable[[], bool], daemon: Process, log: Path, what: str) -> None:
    """Wait until a daemon can serve.

    Asks again every few milliseconds: munged, slurmctld and slurmd tell nobody when they are ready.

    Raises:
        DaemonFailed: it ended, or the deadline passed.
    """
    deadline = time.monotonic() + READY_DEADLINE_S
    while not ready():
        if not daemon.is_alive():
            raise DaemonFailed(f"{what} ended while starting: {log_tail(log)}")
        if time.monotonic() > deadline:
            raise DaemonFailed(f"{what} is not ready after {READY_DEADLINE_S:g} s: {log_tail(log)}")
        time.sleep(0.01)


def accepts(path: Path) -> bool:
    """True when a unix stream or packet socket at this path has a listener."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                continue
            return True
    return False


def log_tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log, or of the one beside it that holds what was printed before logging began."""
    texts = []
    for path in (log, log.with_name(f"{log.stem}.err.log")):
        if path.is_file():
            texts += path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(texts) or f"nothing in {log}"
