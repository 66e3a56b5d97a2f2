"""`ps` in parts: however many containers there are, and whatever their users wrote, each reply fits into a packet."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import cast

import pytest
from enclos.runtime import protocol
from enclos.runtime.agent import Agent
from enclos.runtime.protocol import Message
from enclos.runtime.steps import Step, Surroundings

# Bytes that are no UTF-8 take six characters each in JSON.
IMAGE = "/" + b"\xff".decode(errors="surrogateescape") * 4094


@pytest.fixture
def agent() -> Agent:
    made = Agent(cast("Surroundings", SimpleNamespace(node="n1", named=SimpleNamespace())), "", "")
    for job in range(1, 51):
        for uid, step in ((1001, 0), (1002, 4294967291)):
            record = {"job": job, "step": step, "uid": uid, "image": IMAGE}
            made._steps[job, step] = Step(made.around, record, -1)
    return made


def ask(agent: Agent, uid: int, after: str = "") -> Message:
    request = Message({"version": ["1"], "verb": ["ps"], "after": [after]})
    reply = asyncio.run(agent._answer_user(request, uid))
    return Message(protocol.decode(protocol.encode(reply)))


@pytest.mark.parametrize(("uid", "count"), [(0, 100), (1001, 50), (1003, 0)])
def test_all_containers_come_once(agent: Agent, uid: int, count: int) -> None:
    reply = ask(agent, uid)
    containers = json.loads(reply.get("json"))
    while more := reply.get("more"):
        reply = ask(agent, uid, more)
        containers += json.loads(reply.get("json"))
    seen = [(container["job"], container["step"]) for container in containers]
    assert seen == sorted(set(seen))
    assert len(seen) == count
    assert {container["uid"] for container in containers} <= ({1001, 1002} if uid == 0 else {uid})


@pytest.mark.parametrize("after", ["x", "1.", ".", "1.2.3", "9" * 5000])
def test_a_mark_that_is_none_is_refused(agent: Agent, after: str) -> None:
    assert ask(agent, 1001, after).get("status") == "error"
