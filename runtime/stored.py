"""Asks whether the site's or a user's store has an image, before a registry is asked. Runs in the agent's event loop.

A child looks (images/lookup.py), as the user: a shared file system that hangs must not hold up the agent. The file that
it finds is compared with its checksum (images/checks.py), unless the site does not want it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass

from enclos.runtime import errors
from enclos.runtime.images.checks import Damaged, Ids, ImageFile
from enclos.runtime.images.layout import hex_of
from enclos.runtime.images.reference import Reference
from enclos.runtime.protocol import Message
from enclos.runtime.spawner import ChildDied
from enclos.runtime.steps import Surroundings

log = logging.getLogger("enclosd")

LOOKUP_SECONDS = 10
ATTEMPTS = 2
# The builder opens the file with the same rights, and has the words for these.
NOT_FOR_THE_USER = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Stored:
    """An image that a store has, in the words of the store's owner: the builder opens it as the user.

    Attributes:
        kind: whose store it is: `site` or `user`.
        sha256: of the file's bytes, when it was put there.
        key: what stat(2) says of the file now (images/filekey.py).
    """

    digest: str
    path: str
    config: str
    kind: str
    sha256: str
    key: str

    @classmethod
    def read(cls, answer: Message) -> Stored:
        """Raises ValueError for a digest that is none."""
        hex_of(answer.get("digest"))
        return cls(*(answer.get(name) for name in ("digest", "path", "config", "kind", "sha256", "key")))


async def find(
    around: Surroundings, ids: Ids, reference: Reference, digest: str, progress: Callable[[str], None]
) -> Stored | None:
    """The image of that name, or of that digest if it is given, as its user finds it.

    Args:
        progress: gets lines for whoever waits, when it takes long.

    Raises:
        EnclosError: its file is damaged, or cannot be read.
    """
    stored = await _look(around, ids, reference, digest, progress)
    if stored is not None:
        await _check(around, ids, reference, stored, progress)
    return stored


async def _look(
    around: Surroundings, ids: Ids, reference: Reference, digest: str, progress: Callable[[str], None]
) -> Stored | None:
    uid, gid, groups = ids
    site, template = around.config.images.site_store, around.config.images.user_store
    if not site and not template:
        return None
    fields = [("uid", str(uid)), ("gid", str(gid)), ("site", site), ("template", template)]
    fields += [*(("group", str(group)) for group in groups), ("name", reference.canonical()), ("digest", digest)]
    try:
        child = around.spawner.spawn("lookup", fields)
    except ChildDied:
        return None
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            with await child.receive() as answer:
                if answer.get("state") == "found":
                    return Stored.read(answer)
                if trouble := answer.get("trouble"):
                    progress(f"a store of images cannot be read ({trouble}), asking the registry")
                return None
    except (ChildDied, TimeoutError, ValueError):
        # Its user may have killed it; then the registry is asked.
        log.warning("uid=%d image=%s stores do not answer, ignoring", uid, errors.printable(reference.text))
        progress("the stores of images do not answer, asking the registry")
        return None
    finally:
        child.kill()
        child.close()


async def _check(
    around: Surroundings, ids: Ids, reference: Reference, stored: Stored, progress: Callable[[str], None]
) -> None:
    images, of_site = around.config.images, stored.kind == "site"
    if (images.site_verify if of_site else images.user_verify) == "never":
        return
    file = ImageFile(stored.path, stored.sha256, 0 if of_site else ids[0])
    for _ in range(ATTEMPTS):
        try:
            await around.checks.check(file, stored.key, ids, progress)
            return
        except ChildDied:
            await around.spawner.ready()
        except Damaged:
            log.error("image=%s the file %s is damaged", stored.digest, errors.printable(stored.path))
            raise errors.image_not_as_pulled(reference.text, stored.path, stored.digest, stored.kind) from None
        except OSError as error:
            if error.errno in NOT_FOR_THE_USER:
                return
            raise errors.image_unreadable(reference.text, stored.path, error.errno or 0) from error
    raise errors.image_unreadable(reference.text, stored.path, errno.EINTR)
