"""The image of one step: where it has to be found in a store, or got from a registry or archive, and who shows how far.

A step whose image is a path of the node's has none of this: its builder opens that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from enclos.runtime import errors, plan, policy, stored
from enclos.runtime.images.imports import want_of
from enclos.runtime.images.layout import ImageRecord
from enclos.runtime.images.reference import BadReference, NoRegistry
from enclos.runtime.images.reference import parse as parse_reference
from enclos.runtime.request import StepRequest
from enclos.runtime.steps import Surroundings

# Of what a user wrote, which comes back to him in one packet with everything else.
NOTICE_CHARACTERS = 1000


class StepImage:
    """Gets the image and holds it in the node's cache. `release` has to be called."""

    def __init__(self, around: Surroundings, record: dict[str, Any], mark: Callable[[str], None]) -> None:
        """`record` is the step's, which gets the digest; `mark` is told when the image is there."""
        self._around = around
        self._step_record = record
        self._mark = mark
        self._importing: asyncio.Task[plan.CachedImage] | None = None
        self._held: ImageRecord | None = None
        # Where progress of an import is shown: at the first task.
        self._show: Callable[[str], None] | None = None
        self._last_words = ""

    @property
    def begun(self) -> bool:
        return self._importing is not None

    def begin(self, wanted: StepRequest, kept: str = "") -> None:
        """Start to get it; errors wait for `get`.

        Args:
            kept: the digest that a named container was created from.
        """
        self._importing = asyncio.create_task(self._import(wanted, kept))
        self._importing.add_done_callback(retrieve)

    async def get(self) -> plan.CachedImage:
        """The image when it is there, without the deadline of a build; plan.NO_IMAGE where none was begun."""
        if self._importing is None:
            return plan.NO_IMAGE
        return await asyncio.shield(self._importing)

    def show_progress(self, show: Callable[[str], None]) -> None:
        """Tell how far an import is, from now on, and what was last said of it."""
        self._show = show
        if self._last_words:
            show(self._last_words)

    def forget(self) -> None:
        """What was begun is not the image after all."""
        self._let_go()
        self._importing = None

    async def release(self) -> None:
        """Stop waiting, and let the cache have it back."""
        if self._importing is not None and not self._importing.done():
            self._importing.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._importing
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._around.imports.cache.release(self._held)
            self._held = None

    async def _import(self, wanted: StepRequest, kept: str) -> plan.CachedImage:
        """Find an image of a registry in a store, or get it into the node's cache."""
        config = self._around.config
        policy.decide(wanted, config)
        try:
            reference = parse_reference(wanted.image, config.imports.default_registry)
        except NoRegistry as error:
            raise errors.image_not_found(wanted.image) from error
        except BadReference as error:
            raise errors.bad_image_reference(wanted.image, str(error)) from error
        digest = kept or reference.digest or wanted.image_digest()
        ids = (wanted.uid, wanted.gid, wanted.groups)
        found = None
        if reference.is_registry:
            found = await stored.find(self._around, ids, reference, digest, self._tell)
        if found is not None:
            self._step_record["digest"] = found.digest
            self._mark("stored")
            return plan.CachedImage((), found.config, found.path)
        want = want_of(reference, digest, ids, wanted.home, wanted.auth_file, wanted.runtime_directory, wanted.cwd)
        record = await self._around.imports.obtain(want, self._tell)
        self._held = record
        self._step_record["digest"] = record.digest
        self._mark("image")
        store = self._around.imports.cache.store
        return plan.CachedImage(tuple(store.part_path(part.key) for part in record.parts), record.config)

    def _tell(self, text: str) -> None:
        self._last_words = errors.printable(text[:NOTICE_CHARACTERS])
        if self._show is not None:
            self._show(self._last_words)


def retrieve(task: asyncio.Task[Any]) -> None:
    """Without a reader the event loop would report a task's exception as lost; the joins are told."""
    if not task.cancelled():
        task.exception()
