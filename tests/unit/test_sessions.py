"""How many programs a user may start in containers from outside at the same moment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from enclos.runtime.errors import EnclosError
from enclos.runtime.sessions import OPENING_PER_USER, Sessions

UID = 61001


class Spawner:
    """None is there; while `waits` is set, nobody knows it yet."""

    def __init__(self) -> None:
        self.waits = asyncio.Event()

    async def ready(self) -> None:
        await self.waits.wait()
        raise OSError


def test_those_that_failed_leave_no_more_room_than_there_was() -> None:
    """A user who lets some fail could take all places that the users' socket has."""

    async def run() -> int:
        spawner: Any = Spawner()
        around: Any = SimpleNamespace(spawner=spawner)
        step: Any = SimpleNamespace(name="7.0")
        sessions = Sessions(around)
        spawner.waits.set()
        for _ in range(3):
            with pytest.raises(EnclosError, match="killed"):
                await sessions.enter(step, UID)
        spawner.waits.clear()
        tasks = [asyncio.create_task(sessions.enter(step, UID)) for _ in range(OPENING_PER_USER + 3)]
        await asyncio.sleep(0)
        waiting = sum(not task.done() for task in tasks)
        spawner.waits.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return waiting

    assert asyncio.run(run()) == OPENING_PER_USER
