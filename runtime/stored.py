"""Asks whether the site's or a user's store has an image, before a registry is asked. Runs in the agent's event loop.

A child looks (images/lookup.py), as the user: a shared file system that hangs must not hold up the agent.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from enclos.runtime.images.layout import hex_of
from enclos.runtime.settings import Config
from enclos.runtime.spawner import ChildDied, Spawner

log = logging.getLogger("enclosd")

LOOKUP_SECONDS = 10
# Uid, gid and supplementary groups.
Ids = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stored:
    """An image that a store has, in the words of the store's owner: the builder opens it as the user."""

    digest: str
    path: str
    config: str


async def find(spawner: Spawner, config: Config, ids: Ids, name: str, digest: str) -> Stored | None:
    """The image of that name, or of that digest if it is given, as its user finds it."""
    uid, gid, groups = ids
    site, template = config.images.site_store, config.images.user_store
    if not site and not template:
        return None
    fields = [("uid", str(uid)), ("gid", str(gid)), ("site", site), ("template", template)]
    fields += [*(("group", str(group)) for group in groups), ("name", name), ("digest", digest)]
    try:
        child = spawner.spawn("lookup", fields)
    except ChildDied:
        return None
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            with await child.receive() as answer:
                if answer.get("state") != "found":
                    return None
                hex_of(answer.get("digest"))
                return Stored(answer.get("digest"), answer.get("path"), answer.get("config"))
    except (ChildDied, TimeoutError, ValueError):
        # Its user may have killed it; then the registry is asked.
        log.warning("uid=%d image=%s stores do not answer, ignoring", uid, name)
        return None
    finally:
        child.kill()
        child.close()
