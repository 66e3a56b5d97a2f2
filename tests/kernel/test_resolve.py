"""Names of a job's nodes that /etc/hosts does not have: asked by a real child of a real zygote."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from enclos.netns.guard import Guard
from enclos.netns.underlay import Underlay
from enclos.runtime import errors
from enclos.runtime.jobs import Jobs
from enclos.runtime.journal import Journal
from enclos.runtime.named import NamedContainers
from enclos.runtime.settings import Config
from enclos.runtime.spawner import Spawner

pytestmark = pytest.mark.kernel


def resolve(names: list[str], pattern: str, directory: Path) -> list[str]:
    async def ask() -> list[str]:
        spawner = Spawner()
        await spawner.start()
        found = Underlay(1, "lo", "192.0.2.1", 1500)
        with Guard(4789, "lo") as gate:
            named = NamedContainers(Config().named, Journal(str(directory)), str(directory), -1, spawner)
            jobs = Jobs("n1", Config(), Journal(str(directory)), spawner, gate, found, named)
            try:
                return await jobs._resolve(names, pattern)
            finally:
                await spawner.stop()

    return asyncio.run(ask())


def test_more_names_than_a_packet_holds(tmp_path: Path) -> None:
    """Numbers need no name server, and 10,000 of them no packet of 128 KiB."""
    names = [f"198.18.{number >> 8}.{number & 255}" for number in range(10000)]
    assert resolve(names, "{node}", tmp_path) == names


def test_unknown_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.EnclosError, match=r"no-such-node\.invalid"):
        resolve(["no-such-node"], "{node}.invalid", tmp_path)
