"""A builder forked ahead: waits for the request of a build that nobody has asked for yet, and then is its builder.

The agent orders it when no step is being made (agent.py), so that neither the fork nor the first use of its memory is
in a step's way. Until the request comes it is root in the agent's namespaces, knows of no job, and holds nothing but
its channel. It waits in one system call, and ends with the zygote or with its channel.
"""

from __future__ import annotations

import os
import socket

from enclos.runtime import builder, linux, protocol
from enclos.runtime import operations as op

# What a plan does as root and inside, on a tmpfs that is attached nowhere: nothing of it is seen, and nothing stays.
REHEARSAL = (
    op.LookUpAccounts(),
    op.StageText("hosts", "/etc/hosts"),
    op.StageDevices("dev", ("/dev/null",)),
    op.StageFilesystem("root", "tmpfs", (("size", "2m"), ("mode", "0755")), linux.MOUNT_ATTR_NOSUID),
    op.ReadImageFacts((), entrypoint=False, workdir=False),
    op.WriteAccounts("/", remap_root=False),
    op.WriteStaged("/etc/hosts", "hosts"),
    op.WriteHostname(),
    op.MakeDirectory("/tmp", 0o1777),
)


def run(channel: socket.socket, _order: protocol.Message) -> int:
    """The task `spare`: the first packet on its channel is the request that the zygote gets for a new builder."""
    linux.set_dumpable(False)
    rehearse(channel)
    request = protocol.receive(channel)
    if request is None:
        return 0  # The agent has ended.
    linux.set_name("enclos-build")
    return builder.build(channel, request)


def rehearse(channel: socket.socket) -> None:
    """Touch the memory that every build touches: a fork shares it until then, and each page costs a copy.

    As root throughout, with root's own name: no name service is asked for anything but the files.
    """
    plan = builder.load_plan(builder.store_plan(builder.Plan(0, 0, (), REHEARSAL)))
    rehearsal = builder.Builder(channel, plan.uid, plan.gid, plan.groups)
    rehearsal.execute(plan.operations)
    with rehearsal.as_user():
        pass
    for fd in rehearsal.fds.values():
        os.close(fd)
