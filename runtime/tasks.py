"""What the zygote can be asked to become: one row per task. Imported by the zygote only."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

# operations: a plan is made of them, and a builder that had to import them would spend 20 ms on it.
from enclos.runtime import builder, entering, operations, relays, running, spare, sweep, visitors
from enclos.runtime.images import comparing, importing, lookup, packing, server
from enclos.runtime.operations import kept
from enclos.runtime.protocol import Message


@dataclass(frozen=True, slots=True)
class Task:
    """`run` gets its channel to the agent and the request (it owns both) and returns an exit status.

    A task that a running step needs must not die with the zygote, which dies with the agent.
    """

    name: str
    run: Callable[[socket.socket, Message], int]
    dies_with_zygote: bool


PRELOADED = (operations,)

TASKS = {
    task.name: task
    for task in (
        Task("build", builder.build, True),
        Task("spare", spare.run, True),
        Task("relay", relays.run, False),
        Task("serve", server.run, False),
        Task("enter", entering.run, False),
        Task("run", running.run, False),
        Task("lookup", lookup.run, True),
        Task("person", lookup.person, True),
        Task("compare", comparing.run, True),
        Task("sweep", sweep.run, True),
        Task("save", packing.run, True),
        Task("discard", kept.discard, True),
        Task("resolve", relays.resolve, True),
        Task("visitors", visitors.run, True),
        Task("import", importing.run, True),
    )
}
