"""The two tasks of the zygote that deal with the network: carrying PMIx into a job's namespace, and asking DNS.

Both run in the node's network namespace with no more rights than an ordinary user of the node.
"""

from __future__ import annotations

import os
import socket

from enclos.netns import facts, relay, underlay
from enclos.runtime import linux
from enclos.runtime.protocol import Message, send


def run(channel: socket.socket, request: Message) -> int:
    """The task `relay`: `uid`; a pidfd of slurmstepd, then the listeners that the agent made in the job's namespace.

    Each listener's own address is also the target, in the namespace that this process stands in. It serves
    until slurmstepd ends, whatever becomes of the agent.
    """
    uid = request.number("uid")
    stepd_pidfd, *listener_fds = request.take_fds()
    listeners = [socket.socket(fileno=fd) for fd in listener_fds]
    targets = [_address(listener) for listener in listeners]
    drop_privileges(uid)
    send(channel, [("state", "serving")])
    channel.close()
    relay.serve(listeners, targets, stepd_pidfd)


def resolve(channel: socket.socket, request: Message) -> int:
    """The task `resolve`: names and pattern to underlay addresses; a slow name server holds up only this process."""
    try:
        addresses = underlay.resolve(request.all("name"), request.get("pattern"), request.number("family"))
    except facts.NameUnknown as error:
        send(channel, [("state", "error"), ("name", error.name)])
        return 1
    send(channel, [("state", "done"), *(("address", address) for address in addresses)])
    return 0


def _address(listener: socket.socket) -> tuple[str, int]:
    address, port, *_ = listener.getsockname()
    return address, port


def drop_privileges(uid: int) -> None:
    """Become a user who owns nothing, for good."""
    linux.drop_bounding_set(0)
    linux.keep_capabilities_and_become(uid, uid, (), 0)
    linux.set_no_new_privileges()
    os.chdir("/")
