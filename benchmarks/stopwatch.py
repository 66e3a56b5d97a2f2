"""Wall times of commands on the submit host, taken there by one process that stays.

Entering the cluster (nsenter, setpriv, an interpreter) costs more than what is measured, so it happens once; from
then on the process inside gets commands over a pipe, spawns each (vfork and exec), waits, and says how long it took.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from subprocess import PIPE
from types import TracebackType
from typing import Self

from enclos.runtime.cluster.cluster import Cluster, Running

# Runs as the user, in an interpreter that needs nothing of this checkout.
INSIDE = """\
import json, os, sys, time
actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
for line in sys.stdin:
    order = json.loads(line)
    time.sleep(order["pause"])
    said = os.memfd_create("stderr", 0)
    here = [*actions, (os.POSIX_SPAWN_DUP2, said, 2)]
    commands = order["commands"]
    begin = time.perf_counter()
    pids = [os.posix_spawnp(words[0], words, os.environ, file_actions=here) for words in commands]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    taken = time.perf_counter() - begin
    words = os.pread(said, 4096, 0).decode(errors="replace")
    os.close(said)
    print(json.dumps({"ms": taken * 1e3, "statuses": statuses, "stderr": words}), flush=True)
"""


class CommandFailed(RuntimeError):
    """A timed command did not end with 0; the text is what it said."""


@dataclass(slots=True)
class Stopwatch:
    """A process on the submit host that runs and times commands, one order after the other.

    Args:
        prefix: words before the interpreter, such as salloc's, to time steps of one job.
    """

    cluster: Cluster
    user: str
    prefix: Sequence[str] = ()
    _process: Running = field(init=False)

    def __enter__(self) -> Self:
        python = os.path.join(sys.base_prefix, "bin", "python3")
        words = [*self.prefix, python, "-I", "-c", INSIDE]
        self._process = self.cluster.popen(words, self.user, stdin=PIPE)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._process.communicate()

    def time(self, command: Sequence[str], pause_seconds: float = 0.0) -> float:
        """Milliseconds from before the spawn to the end of one command.

        Args:
            pause_seconds: to wait before, so that what the command before left behind is over.

        Raises:
            CommandFailed: it did not end with 0.
        """
        return self.run([command], pause_seconds)

    def run(self, commands: Sequence[Sequence[str]], pause_seconds: float = 0.0) -> float:
        """The same for several commands that are started at once; the time is that until the last has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"commands": [list(command) for command in commands], "pause": pause_seconds}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CommandFailed(self._process.communicate()[1].strip() or "the process on the submit host ended")
        answer = json.loads(line)
        if any(answer["statuses"]):
            raise CommandFailed(f"{' '.join(commands[0])}: {answer['statuses']}: {answer['stderr'].strip()}")
        return float(answer["ms"])
