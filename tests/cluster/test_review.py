"""What a hostile review of the privileged code found: each test is one attempt, and was a success once."""

from __future__ import annotations

import re
import signal
import subprocess

from conftest import Run
from enclos.runtime.cluster.cluster import Cluster

HOLD_LOCK = """
import fcntl, os, signal
fd = os.open("/run/enclos", os.O_RDONLY | os.O_DIRECTORY)
fcntl.flock(fd, fcntl.LOCK_EX)
print("locked", flush=True)
signal.pause()
"""

TELL_AGENT = """
import socket, sys
agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
agent.connect("/run/enclos/agent.sock")
fields = ["version=1", "oldest=1", *sys.argv[1].split()]
agent.send(b"".join(field.encode() + b"\\0" for field in fields))
print(agent.recv(131072).replace(b"\\0", b"\\n").decode())
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


def test_a_job_id_given_again_brings_no_network_along(idle: Cluster, image: str) -> None:
    """Where slurmctld lost its state and the epilog was missed, a new user's job may have the id of an old one's."""
    node = idle.nodes[0]
    options = [f"--container-image={image}", "--container-network=job"]
    script = "echo $SLURM_JOB_ID; read line; ls /sys/class/net"
    words = ["srun", "-w", node, *options, "sh", "-c", script]
    old = idle.popen(words, user="usera", stdin=subprocess.PIPE)
    assert old.stdout is not None
    job = old.stdout.readline().strip()
    told = idle.run(["python3", "-c", TELL_AGENT, f"verb=job job={job} uid=61002 nodelist={node}"], node=node)
    devices, _ = old.communicate("go on\n", timeout=30)
    assert "status=ok" in told.stdout
    assert devices.split() == ["lo"], "the old network is still there for the new user's steps"


def test_an_error_about_a_huge_option_arrives(idle: Cluster, image: str) -> None:
    """Escaped, the option is larger than a packet; the user was told that the agent had ended.

    srun refuses it itself, so a user has to write it where srun's options travel.
    """
    huge = "\x01" * 60000 + ":/x"
    words = ["srun", "-w", "n1", f"--container-image={image}"]
    failed = idle.run([*words, f"--container-mounts={huge}", "true"], "usera")
    assert failed.returncode != 0
    assert re.search(r"^srun: error: enclos: --container-mounts=\?{200,255}…: \S", failed.stderr, re.MULTILINE)
    smuggled = {"_SLURM_SPANK_OPTION_enclos_container_mounts": huge}
    failed = idle.run([*words, "true"], "usera", env=smuggled)
    assert failed.returncode != 0
    assert r"enclos: --container-mounts=\x01\x01" in failed.stderr


def test_deep_paths_are_made(usera: Run, image: str) -> None:
    deep = "/a" * 2000
    made = usera(["srun", f"--container-image={image}", f"--container-mounts=tmpfs:{deep}", "echo", "inside"])
    assert (made.returncode, made.stdout) == (0, "inside\n")
