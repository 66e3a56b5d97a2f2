"""A shell on each node of one step, which stays and takes orders: in a guest a step of its own costs seconds.

It is the step's user who runs what is told; orders of different nodes run at the same time.
"""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from enclos.runtime.cluster.cluster import Cluster

END = "=enclos="


class Said(NamedTuple):
    """How an order ended, and what it printed (both streams)."""

    status: int
    text: str


class Shells:
    """A step with one task a node; what is told to a node is run there in the order in which it is told.

    srun gives its input to all tasks alike and labels what they print, so an order says for which it is.
    """

    def __init__(self, cluster: Cluster, user: str, nodes: Sequence[str], *options: str) -> None:
        self._cluster, self._nodes = cluster, list(nodes)
        self._heard: dict[int, deque[str]] = {place: deque() for place in range(len(nodes))}
        words = ["srun", f"-N{len(nodes)}", f"-n{len(nodes)}", "-w", ",".join(nodes), "-c1", "--label", *options, "sh"]
        self._running = cluster.popen(words, user, stdin=subprocess.PIPE)
        self.job = int(self.ok(self._nodes[0], "echo $SLURM_JOB_ID"))

    def tell(self, node: str, script: str) -> None:
        """Start a script on a node, when what was told before has ended there."""
        place = self._nodes.index(node)
        assert self._running.stdin is not None
        self._running.stdin.write(f"""\
if [ $SLURM_NODEID = {place} ]; then
    (
        {script}
    ) < /dev/null 2>&1
    printf '\\n%s %s\\n' {END} $?
fi
""")
        self._running.stdin.flush()

    def hear(self, node: str) -> Said:
        """Wait for the end of the first script whose end was not waited for yet.

        Raises:
            AssertionError: the step has ended, with what it said.
        """
        place = self._nodes.index(node)
        lines: list[str] = []
        while True:
            while not self._heard[place]:
                self._read()
            line = self._heard[place].popleft()
            if line.startswith(END):
                return Said(int(line.split()[1]), "".join(lines).removesuffix("\n"))
            lines.append(line)

    def _read(self) -> None:
        assert self._running.stdout is not None
        line = self._running.stdout.readline()
        if not line:
            raise AssertionError(f"the step has ended: {self._running.communicate()[1]}")
        label, _, text = line.partition(": ")
        self._heard[int(label)].append(text)

    def run(self, node: str, script: str) -> Said:
        """Run a script on a node to its end."""
        self.tell(node, script)
        return self.hear(node)

    def ok(self, node: str, script: str) -> str:
        """What a script prints that has to succeed."""
        said = self.run(node, script)
        assert said.status == 0, said
        return said.text

    def end(self, timeout: float = 60) -> None:
        """The shells find the end of their input, and with them the step ends; again is fine."""
        if self._running.stdin is not None and not self._running.stdin.closed:
            self._running.stdin.close()
        try:
            self._running.wait(timeout)
        except subprocess.TimeoutExpired:
            self._running.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.end()
