"""What a hostile review of the privileged code found: each test is one attempt, and was a success once."""

from __future__ import annotations

import signal

from conftest import Run
from enclos.runtime.cluster.cluster import Cluster

HOLD_LOCK = """
import fcntl, os, signal
fd = os.open("/run/enclos", os.O_RDONLY | os.O_DIRECTORY)
fcntl.flock(fd, fcntl.LOCK_EX)
print("locked", flush=True)
signal.pause()
"""


def test_a_user_cannot_keep_the_agent_from_starting(idle: Cluster) -> None:
    """A lock that any user can take is no lock of the agent's."""
    node = idle.nodes[-1]
    holder = idle.popen(["python3", "-c", HOLD_LOCK], user="usera", node=node)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        idle.restart_agent(node)
        assert idle.agent_pid(node) > 0
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        idle.start_agent(node)


def test_no_socket_of_the_node_reaches_the_program(usera: Run, image: str) -> None:
    """Slurm's PMIx plugin leaves a listening socket of the node's network to the tasks."""
    listing = ["sh", "-c", "for fd in /proc/self/fd/*; do readlink $fd; done; true"]
    bare = usera(["srun", "-N1", "--mpi=pmix", *listing])
    inside = usera(["srun", "-N1", "--mpi=pmix", f"--container-image={image}", "--container-network=job", *listing])
    assert "socket:" in bare.stdout, "this Slurm leaves none; the test shows nothing"
    assert inside.returncode == 0
    assert "socket:" not in inside.stdout
