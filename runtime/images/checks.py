"""Compares files of images with their checksums: at the first use after a boot, and once however many steps ask.

A child reads the file (comparing.py). That it was intact is noted below /run, with what stat(2) said of it then: one
that was changed is read again. Runs in the agent's event loop; what becomes of a damaged file is the caller's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from enclos.runtime.images.filekey import file_key
from enclos.runtime.spawner import Spawner

SECONDS = 1800
SLOW_SECONDS = 3  # After which whoever waits is told for what.
SLOW_WORDS = "comparing the image with its checksum: it is used here for the first time since the node booted"
# A user's notes take memory of the node's. Root's are of its cache and the site's store, which may have thousands of
# files in use: one whose note had to go would be read again at its next use, and push out another's.
NOTES_OF_USER = 1024
NOTES_OF_ROOT = 32768
NOTE_BYTES = 512
# Uid, gid and supplementary groups.
Ids = tuple[int, int, tuple[int, ...]]
ROOT_IDS: Ids = (0, 0, ())


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file and the SHA-256 that it should have; `owner` is the user to whose store it belongs, 0 for root's."""

    path: str
    sha256: str
    owner: int = 0

    def key(self) -> str:
        """What stat(2) says of it, "" where it is not there. For root's files on a disk of the node."""
        try:
            return file_key(os.stat(self.path))
        except OSError:
            return ""


class Damaged(Exception):
    """A file's bytes are not what its checksum says."""


@dataclass(slots=True)
class _Comparison:
    """One under way. It ends with the last one who waits for it."""

    uid: int
    task: asyncio.Task[None]
    waiting: int = 0


class Checks:
    """All comparisons of this node. `directory` is below /run: empty after a boot."""

    def __init__(self, spawner: Spawner, directory: str) -> None:
        self._spawner = spawner
        self._directory = directory
        self._running: dict[ImageFile, _Comparison] = {}
        # What a user makes the node read, it reads one at a time: it counts as nobody's processor time.
        # A lock is kept by those who have or want it.
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def check(self, file: ImageFile, key: str, ids: Ids, progress: Callable[[str], None]) -> None:
        """Compare a file, unless it has been since the boot and is still the same.

        Args:
            key: what stat(2) says of it now (filekey.py).
            ids: with whose rights it is read.
            progress: gets a line when it takes so long that somebody who waits wants to know.

        Raises:
            Damaged.
            OSError: it cannot be read, as this user; ETIMEDOUT when that takes too long.
            ChildDied: the one that read it was killed.
        """
        if key and self._noted(file) == f"{file.sha256} {key}":
            return
        late = asyncio.get_running_loop().call_later(SLOW_SECONDS, progress, SLOW_WORDS)
        try:
            await self._compare_once(file, ids)
        finally:
            late.cancel()

    def note(self, file: ImageFile, key: str) -> None:
        """Note that it is intact as it is now. Where there is no room for a note, it is read again at its next use."""
        directory = f"{self._directory}/{file.owner}"
        with contextlib.suppress(OSError):
            os.makedirs(directory, 0o700, exist_ok=True)
            notes = list(os.scandir(directory))
            if len(notes) >= (NOTES_OF_USER if file.owner else NOTES_OF_ROOT):
                os.unlink(min(notes, key=lambda note: note.stat().st_mtime_ns))
            with open(self._note_path(file), "w") as note:
                note.write(f"{file.sha256} {key}")

    def _noted(self, file: ImageFile) -> str:
        try:
            with open(self._note_path(file)) as note:
                return note.read(NOTE_BYTES)
        except OSError:
            return ""

    def _note_path(self, file: ImageFile) -> str:
        name = hashlib.sha256(file.path.encode(errors="surrogateescape")).hexdigest()
        return f"{self._directory}/{file.owner}/{name}"

    async def _compare_once(self, file: ImageFile, ids: Ids) -> None:
        """Compare it, or wait for somebody else's comparison."""
        while True:
            running = self._running.get(file) or self._begin(file, ids)
            running.waiting += 1
            try:
                return await asyncio.shield(running.task)
            except OSError:
                if running.uid == ids[0]:
                    raise  # Else this user may have rights that the other one lacks.
            finally:
                running.waiting -= 1
                if running.waiting == 0:
                    self._end(file, running)

    def _begin(self, file: ImageFile, ids: Ids) -> _Comparison:
        task = asyncio.create_task(self._compare(file, ids))
        running = self._running[file] = _Comparison(ids[0], task)
        # With the last one who waits gone, the event loop would report the exception as lost.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        task.add_done_callback(lambda done: self._end(file, running))
        return running

    def _end(self, file: ImageFile, running: _Comparison) -> None:
        """Whoever asks from now on begins anew."""
        running.task.cancel()
        if self._running.get(file) is running:
            del self._running[file]

    async def _compare(self, file: ImageFile, ids: Ids) -> None:
        turn = self._turns.setdefault(file.owner, asyncio.Lock()) if file.owner else contextlib.nullcontext()
        try:
            async with turn, asyncio.timeout(SECONDS):
                await self._read(file, ids)
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), file.path) from None

    async def _read(self, file: ImageFile, ids: Ids) -> None:
        uid, gid, groups = ids
        fields = [("uid", str(uid)), ("gid", str(gid)), *(("group", str(group)) for group in groups)]
        child = self._spawner.spawn("compare", [*fields, ("path", file.path), ("sha256", file.sha256)])
        try:
            with await child.receive() as answer:
                match answer.get("state"):
                    case "intact":
                        self.note(file, answer.get("key"))
                    case "unreadable":
                        number = answer.number("errno")
                        raise OSError(number, os.strerror(number), file.path)
                    case _:
                        raise Damaged
        finally:
            child.kill()
            child.close()
