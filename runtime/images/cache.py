"""The node's cache: a store with a size limit, and the rule of who may have what is in it.

Holds which images are there, in use, and whose; makes no import (imports.py). Root's, in the agent.

Grants are kept with an image, one text each:

    public SOURCE     somebody without credentials got it from there: everybody may have it
    source SOURCE     somebody got it from there with credentials: whoever that registry lets have it may, too
    user UID          this user brought all of it, or was let have it by such a registry

SOURCE is REGISTRY/NAME. That a registry which a user chose confirms a digest proves nothing: only the one from which
the image came knows who may have it. So whoever asks by way of another brings all of its layers himself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from enclos.runtime.images import place
from enclos.runtime.images.layout import UNFINISHED, WORK, ImageRecord, Store

log = logging.getLogger("enclosd")

LOOP_DEVICES = "/sys/block"
WORK_SECONDS = 86400


class Cache:
    """The images of this node."""

    def __init__(self, directory: str, limit_bytes: int) -> None:
        self.store = Store(directory)
        self._limit = limit_bytes
        self._held: Counter[str] = Counter()
        # Why nothing may be put there or taken from it: others than root could have put it there.
        self.refused = ""

    def open(self) -> None:
        """Make the directories, and remove what imports before this agent left. Raises OSError.

        Layers that they had fetched stay for a day: whoever asks again goes on with them.
        """
        self.store.make()
        if words := place.stranger(self.store.directory, os.geteuid()):
            self.refused = words
            raise PermissionError(errno.EPERM, words, self.store.directory)
        self.remove_unnamed()
        self.remove_old_work()
        for name in os.listdir(f"{self.store.directory}/parts"):
            if name.endswith(UNFINISHED):
                os.unlink(f"{self.store.directory}/parts/{name}")

    # --- who may have what ------------------------------------------------------------------------------------

    def find(self, digest: str) -> ImageRecord | None:
        return self.store.find(digest)

    def may_have(self, record: ImageRecord, uid: int) -> bool:
        """Whether this user gets the image without a word of its registry."""
        return f"user {uid}" in record.grants or any(grant.startswith("public ") for grant in record.grants)

    def came_from(self, record: ImageRecord, source: str) -> bool:
        """Whether this source's registry is one that knows who may have the image."""
        return f"source {source}" in record.grants or f"public {source}" in record.grants

    def grant(self, record: ImageRecord, uid: int, source: str, private: bool) -> ImageRecord:
        """Note that the registry let this user have it."""
        added = [f"user {uid}", f"source {source}"] if private else [f"public {source}"]
        grants = tuple(dict.fromkeys([*record.grants, *added]))
        if grants == record.grants:
            return record
        changed = replace(record, grants=grants)
        self.store.add(changed)
        return changed

    def reusable(self, uid: int, source: str) -> set[str]:
        """Keys of parts that an import by this user from this source need not make again."""
        keys: set[str] = set()
        for record in self.records():
            if self.may_have(record, uid) or self.came_from(record, source):
                keys.update(part.key for part in record.parts)
        return keys

    def records(self) -> list[ImageRecord]:
        """All images that are whole."""
        names = os.listdir(f"{self.store.directory}/images")
        found = (self.find(f"sha256:{name.removesuffix('.json')}") for name in names if name.endswith(".json"))
        return [record for record in found if record is not None]

    # --- use and eviction -------------------------------------------------------------------------------------

    def hold(self, record: ImageRecord) -> None:
        """Keep its parts from eviction, until `release`; and count this as its last use."""
        self._held.update(part.key for part in record.parts)
        with contextlib.suppress(OSError):
            os.utime(self.store.record_path(record.digest))

    def release(self, record: ImageRecord) -> None:
        self._held.subtract(part.key for part in record.parts)
        self._held += Counter()

    def make_room(self, working: Iterable[str] = (), coming: int = 0) -> None:
        """Remove images until there is room: those whose last use is longest ago, none in use.

        Args:
            working: digests of imports under way; the blobs of others are what interrupted ones left, and go first.
            coming: bytes that will be written next. Without these the limit alone counts, with them the disk, too.
        """
        if self._has_room(coming):
            return
        self._remove_work(set(working))
        in_use = set(self._held) | self._mounted()
        for record in sorted(self.records(), key=self._last_use):
            if self._has_room(coming):
                return
            if any(part.key in in_use for part in record.parts):
                continue
            log.info("image=%s removed from the cache, to make room", record.digest)
            self.store.remove(record.digest)
            self.remove_unnamed()

    def _has_room(self, coming: int) -> bool:
        return self.used_bytes() + coming <= self._limit and coming <= self.free_bytes()

    def free_bytes(self) -> int:
        """What is left of the disk."""
        status = os.statvfs(self.store.directory)
        return status.f_bavail * status.f_frsize

    def remove_damaged(self, keys: Iterable[str]) -> None:
        """Remove parts that are not what they were, with all images that have them. What is mounted stays mounted."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.store.part_path(key))
        self.remove_unnamed()

    def used_bytes(self) -> int:
        """What the files of the cache take on disk."""
        return _bytes_below(self.store.directory)

    def fetched_bytes(self, digest: str, uid: int) -> int:
        """What an import that was interrupted has on disk already."""
        return _bytes_below(self.store.work_path(digest, uid))

    def _last_use(self, record: ImageRecord) -> float:
        try:
            return os.stat(self.store.record_path(record.digest)).st_mtime
        except FileNotFoundError:
            return 0.0

    def _mounted(self) -> set[str]:
        """Keys of the parts that the kernel has mounted, for steps of this agent or one before it."""
        found: set[str] = set()
        for device in os.listdir(LOOP_DEVICES):
            with contextlib.suppress(OSError), open(f"{LOOP_DEVICES}/{device}/loop/backing_file") as file:
                found.add(os.path.basename(file.read().strip()).removesuffix(".sqsh"))
        return found

    def remove_unnamed(self) -> None:
        """Parts that no record names, records without their parts, and halves of records."""
        named = {part.key for record in self.records() for part in record.parts}
        for name in os.listdir(f"{self.store.directory}/parts"):
            key = name.removesuffix(".sqsh")
            if key not in named and key not in self._held and not name.endswith(UNFINISHED):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.store.directory}/parts/{name}")
        for name in os.listdir(f"{self.store.directory}/images"):
            if not name.endswith(".json") or self.find(f"sha256:{name.removesuffix('.json')}") is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.store.directory}/images/{name}")

    def remove_old_work(self, working: Iterable[str] = ()) -> None:
        """Remove what interrupted imports left: blobs that nobody has taken up again for a day, and what has none."""
        self._remove_work(set(working), time.time() - WORK_SECONDS)

    def _remove_work(self, working: set[str], before: float = math.inf) -> None:
        for name in os.listdir(f"{self.store.directory}/{WORK}"):
            path = f"{self.store.directory}/{WORK}/{name}"
            if f"sha256:{name.partition('.')[0]}" not in working and _last_change(path) < before:
                shutil.rmtree(path, ignore_errors=True)

    def keep_parts(self, keys: Iterable[str]) -> None:
        """Hold parts that an import has made and no record names yet."""
        self._held.update(keys)

    def drop_parts(self, keys: Iterable[str]) -> None:
        self._held.subtract(keys)
        self._held += Counter()


def _bytes_below(path: str) -> int:
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(f"{directory}/{name}").st_blocks * 512
    return total


def _last_change(work: str) -> float:
    """When a work directory got its last blob; 0 for one that has none: empty files stand for others' (importer.py)."""
    blobs = f"{work}/blobs/sha256"
    with contextlib.suppress(OSError), os.scandir(blobs) as entries:
        if any(_is_blob(entry) for entry in entries):
            return max(os.lstat(path).st_mtime for path in (work, blobs))
    return 0.0


def _is_blob(entry: os.DirEntry[str]) -> bool:
    status = entry.stat(follow_symlinks=False)
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
