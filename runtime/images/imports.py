"""From a reference to an image in the node's cache: who imports, who waits, and who may have the result.

One import per digest, however many steps ask. Whoever waits takes over when it dies. Runs in the agent's event loop; an
importer (importer.py) does the work, and what comes from it is checked here for its form alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from enclos.runtime import errors
from enclos.runtime.connection import wait_readable
from enclos.runtime.images import manifest
from enclos.runtime.images.cache import Cache
from enclos.runtime.images.checks import ROOT_IDS, Checks, Damaged, ImageFile
from enclos.runtime.images.layout import ImageRecord, Part, hex_of
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Limits, Order, Packing
from enclos.runtime.images.reference import Reference
from enclos.runtime.kinds import amount
from enclos.runtime.protocol import Message, ProtocolError
from enclos.runtime.settings import Config
from enclos.runtime.spawner import Child, ChildDied, Spawner

log = logging.getLogger("enclosd")

ATTEMPTS = 3
END_SECONDS = 10
SILENT_SECONDS = 3  # After which whoever waits is told that there is no answer yet.
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Want:
    """Who wants which image, and where his credentials may be. Paths are the user's words; they are opened as him."""

    reference: Reference
    digest: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    auth_files: tuple[str, ...]
    netrc_files: tuple[str, ...]
    directory: str = "/"

    @property
    def source(self) -> str:
        """What a right to the image is a right to. An image on disk is nobody's but the user's who could read it."""
        return self.reference.source or f"local:{self.uid}"


@dataclass(slots=True)
class _Running:
    """An import under way."""

    source: str
    uid: int
    done: asyncio.Future[ImageRecord]
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    listeners: list[Progress] = field(default_factory=list)

    def tell(self, text: str) -> None:
        for listener in self.listeners:
            listener(text)


class Imports:
    """All imports of this node."""

    def __init__(self, config: Config, spawner: Spawner, cache: Cache, checks: Checks) -> None:
        self._config = config.imports
        self._spawner = spawner
        self._checks = checks
        self.cache = cache
        self._running: dict[str, _Running] = {}
        self._slots: asyncio.Queue[int] = asyncio.Queue()
        for index in range(self._config.slots):
            self._slots.put_nowait(self._config.first_uid + index)
        self._packing = Packing(self._config.compression, self._config.level, amount(self._config.block_size))
        self._limits = Limits(self._config.limit_files, amount(self._config.limit_bytes))

    async def obtain(self, want: Want, progress: Progress) -> ImageRecord:
        """The image, imported if it is not there. It is held in the cache: the caller calls `cache.release`.

        Raises:
            EnclosError.
        """
        if self.cache.refused:
            raise errors.store_not_roots(want.reference.text, self._config.cache_directory, self.cache.refused)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                record = await self._find_or_import(want, progress)
                await self._check(record, want.reference.text, progress)
                self.cache.hold(record)
                return record
            except ChildDied:
                log.warning("image=%s importer died (attempt %d)", want.reference.text, attempt)
                await self._spawner.ready()
            except _Damaged:
                progress("the cached image is damaged, importing it again")
            except OSError as error:
                raise errors.store_failed(
                    want.reference.text, self._config.cache_directory, error.errno or 0
                ) from error
        raise errors.import_failed(want.reference.text, "the importer was killed")

    async def _find_or_import(self, want: Want, progress: Progress) -> ImageRecord:
        if want.digest:
            record = self.cache.find(want.digest)
            if record is not None and self.cache.may_have(record, want.uid):
                return record
            running = self._running.get(want.digest)
            if running is not None and (running.source, running.uid) == (want.source, want.uid):
                return await self._await(running, progress)
        while True:
            found = await self._resolve(want, progress)
            if found is not None:
                return found

    async def _resolve(self, want: Want, progress: Progress) -> ImageRecord | None:
        """Ask the registry as this user, and go on as it answers; None to ask again."""
        source = want.source
        with contextlib.ExitStack() as stack:
            slot = await self._slots.get()
            stack.callback(self._slots.put_nowait, slot)
            child = self._spawner.spawn("import", self._order(want, slot).fields())
            stack.callback(child.close)
            stack.callback(child.kill)
            resolved = await self._resolved(want, child, progress)
            record = self.cache.find(resolved.digest)
            if record is not None and self.cache.came_from(record, source):
                return self.cache.grant(record, want.uid, source, resolved.private)
            running = self._running.get(resolved.digest)
            if running is None:
                # Child and slot are the import's until it ends, whoever waits for it by then.
                running = self._import(want, child, resolved, stack.pop_all())
                return await self._await(running, progress)
        return await self._await_other(running, want, resolved, progress)

    async def _resolved(self, want: Want, child: Child, progress: Progress) -> _Resolved:
        who = "waiting for what the registry says of" if want.reference.is_registry else "looking into"
        text = f"{who} {want.reference.text}"
        late = asyncio.get_running_loop().call_later(SILENT_SECONDS, progress, text)
        try:
            async with asyncio.timeout(self._config.deadline_seconds):
                with await child.receive() as message:
                    _raise_error(message)
                    return _Resolved(message)
        except TimeoutError:
            raise errors.import_timed_out(want.reference.text, self._config.deadline_seconds) from None
        finally:
            late.cancel()

    async def _await_other(
        self, running: _Running, want: Want, resolved: _Resolved, progress: Progress
    ) -> ImageRecord | None:
        """Another user's import of the same image, which this one may have: wait for it; None to take over."""
        try:
            record = await self._await(running, progress)
        except ChildDied:
            return None
        except errors.EnclosError as error:
            if error.transient or running.source != want.source:
                return None
            raise
        if running.source != want.source:
            return None
        return self.cache.grant(record, want.uid, want.source, resolved.private)

    def _import(self, want: Want, child: Child, resolved: _Resolved, owned: contextlib.ExitStack) -> _Running:
        running = _Running(want.source, want.uid, asyncio.get_running_loop().create_future())
        self._running[resolved.digest] = running
        # Without a reader the event loop would report the exception as lost.
        running.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        running.task = asyncio.create_task(self._run(running, want, child, resolved, owned))
        return running

    async def _await(self, running: _Running, progress: Progress) -> ImageRecord:
        """Wait for an import; the last one who gives up waiting ends it."""
        running.waiting += 1
        running.listeners.append(progress)
        try:
            return await asyncio.shield(running.done)
        finally:
            running.waiting -= 1
            running.listeners.remove(progress)
            if running.waiting == 0 and running.task is not None and not running.done.done():
                running.task.cancel()

    async def _run(
        self, running: _Running, want: Want, child: Child, resolved: _Resolved, owned: contextlib.ExitStack
    ) -> None:
        """Drive the importer to its end, and tell everybody who waits."""
        made: list[Part] = []
        try:
            async with asyncio.timeout(self._config.deadline_seconds):
                running.done.set_result(await self._drive(running, want, child, resolved, made))
        except TimeoutError:
            seconds = self._config.deadline_seconds
            await self._give_up(running, child, errors.import_timed_out(want.reference.text, seconds))
        except asyncio.CancelledError:
            await self._give_up(running, child, ChildDied())
        except Exception as error:
            await self._give_up(running, child, error)
        finally:
            owned.close()
            del self._running[resolved.digest]
            self.cache.drop_parts(part.key for part in made)
            if running.done.exception() is not None:
                with contextlib.suppress(OSError):
                    self.cache.remove_unnamed()
                    self.cache.remove_old_work(self._running)

    async def _give_up(self, running: _Running, child: Child, error: Exception) -> None:
        """Let the importer end what it has started, then tell whoever waits: he may begin anew in the same directory.

        It sees by the end of its channel that nobody wants the image, and what it stands for has ended when it has.
        """
        running.task = None  # From here on nobody who gives up waiting ends this.
        child.channel.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await wait_readable(child.pidfd)
        finally:
            running.done.set_exception(error)

    async def _drive(
        self, running: _Running, want: Want, child: Child, resolved: _Resolved, made: list[Part]
    ) -> ImageRecord:
        begin = time.monotonic()
        source = want.source
        known = {part.key: part for record in self.cache.records() for part in record.parts}
        groups = manifest.group(resolved.layers)
        keys = self._keys(groups)
        whole = self._keys([resolved.layers])
        reuse = self.cache.reusable(want.uid, source).intersection(keys)
        size = sum(layer.bytes for layer in resolved.layers)
        count = f"{len(resolved.layers)} layer{'s' * (len(resolved.layers) != 1)}"
        running.tell(f"importing {want.reference.text} ({count}, {size / 1e6:.0f} MB)")
        self.cache.keep_parts(reuse)
        made += [known[key] for key in reuse]
        if want.reference.is_registry:
            missing = [layer for key, group in zip(keys, groups, strict=True) if key not in reuse for layer in group]
            self._make_room(want, resolved, sum(layer.bytes for layer in missing))
        else:
            self.cache.make_room(self._running)
        child.send([("state", "build"), *(("part", key) for key in reuse)])
        while True:
            with await child.receive() as message:
                _raise_error(message)
                match message.get("state"):
                    case "progress":
                        running.tell(f"importing {want.reference.text}: {message.get('text')}")
                    case "whole":
                        keys = whole
                    case "part":
                        part = _part(message)
                        self.cache.keep_parts([part.key])
                        made.append(part)
                    case "done":
                        config = message.get("config")
                        break
                    case state:
                        raise ProtocolError(f"unexpected state {state[:32]!r} of an importer")
        parts = {part.key: part for part in made}
        if not all(key in parts for key in keys):
            raise errors.import_failed(want.reference.text, "the importer did not make all parts")
        record = ImageRecord(resolved.digest, tuple(parts[key] for key in keys), config)
        record = self.cache.grant(record, want.uid, source, resolved.private)
        # Those that were there have still to be compared: nobody may have looked at them since the node booted.
        for file in (self._file(part) for part in record.parts if part.key not in reuse):
            self._checks.note(file, file.key())
        self.cache.hold(record)
        try:
            self.cache.make_room(self._running)
        finally:
            self.cache.release(record)
        seconds = time.monotonic() - begin
        running.tell(f"imported {want.reference.text} in {seconds:.1f} s")
        log.info("image=%s digest=%s uid=%d layers=%d parts=%d new=%d bytes=%d imported in %.2f s",
                 errors.printable(want.reference.text), record.digest, want.uid, len(resolved.layers), len(keys),
                 len(set(keys) - reuse), size, seconds)  # fmt: skip
        return record

    def _make_room(self, want: Want, resolved: _Resolved, missing: int) -> None:
        """Before a layer is fetched: is there, or can there be, room for all that are missing?

        What the files of the image take is known when they are made, and bounded then (Order.room). Compressed as
        layers of registries are, they take about as much.

        Args:
            missing: bytes of the layers that no file of the cache holds.

        Raises:
            EnclosError: image_too_large, store_full.
        """
        size, limit = sum(layer.bytes for layer in resolved.layers), amount(self._config.cache_size)
        if size > limit:
            detail = f"{size} bytes in its layers, {limit} in the node's cache"
            raise errors.image_too_large(want.reference.text, detail, "imports.cache_size")
        self.cache.remove_old_work(self._running)
        coming = missing - self.cache.fetched_bytes(resolved.digest, want.uid)
        self.cache.make_room(self._running, coming)
        if coming > self.cache.free_bytes():
            raise errors.store_full(want.reference.text)

    def _keys(self, groups: list[tuple[LayerInfo, ...]]) -> list[str]:
        return [
            manifest.part_key([layer.digest for layer in group], index == 0, self._packing)
            for index, group in enumerate(groups)
        ]

    # --- the check on use -------------------------------------------------------------------------------------

    async def _check(self, record: ImageRecord, name: str, progress: Progress) -> None:
        """Compare bytes and checksums once after a boot; raises _Damaged when the image had to be thrown away."""
        if self._config.verify == "never":
            return
        damaged = []
        self.cache.hold(record)
        try:
            for part in record.parts:
                file = self._file(part)
                try:
                    await self._checks.check(file, file.key(), ROOT_IDS, progress)
                except TimeoutError as error:
                    raise errors.import_failed(name, "the check of the cached image took too long") from error
                except (Damaged, OSError):
                    damaged.append(part.key)
        finally:
            self.cache.release(record)
        if damaged:
            log.error("image=%s is damaged in the cache, removed", record.digest)
            self.cache.remove_damaged(damaged)
            raise _Damaged

    def _file(self, part: Part) -> ImageFile:
        return ImageFile(self.cache.store.part_path(part.key), part.sha256)

    # --- the importer -----------------------------------------------------------------------------------------

    def _order(self, want: Want, slot: int) -> Order:
        return Order(
            image=want.reference.text,
            default_registry=self._config.default_registry,
            digest=want.digest,
            uid=want.uid,
            gid=want.gid,
            groups=want.groups,
            slot=slot,
            store=self._config.cache_directory,
            auth_files=want.auth_files,
            netrc_files=want.netrc_files,
            limits=self._limits,
            memory=amount(self._config.memory),
            packing=self._packing,
            directory=want.directory,
            room=amount(self._config.cache_size),
        )


class _Damaged(Exception):
    """A cached image was not what its checksum says, and is gone."""


class _Resolved:
    """The importer's first answer, checked: it comes from a process that talks to strangers."""

    def __init__(self, message: Message) -> None:
        if message.get("state") != "resolved":
            raise ProtocolError(f"unexpected state {message.get('state')[:32]!r} of an importer")
        try:
            self.digest = message.get("digest")
            hex_of(self.digest)
            self.layers = tuple(_layer(text) for text in message.all("layer"))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if not 0 < len(self.layers) <= manifest.LAYER_LIMIT:
            raise ProtocolError("an image without layers")
        self.private = message.get("private") != "0"


def _layer(text: str) -> LayerInfo:
    digest, _, size = text.partition(" ")
    hex_of(digest)
    return LayerInfo(digest, int(size))


def _part(message: Message) -> Part:
    return Part(message.get("key"), message.number("bytes"), message.get("sha256"))


def _raise_error(message: Message) -> None:
    if message.get("state") == "error":
        parts = (message.get(part) for part in ("subject", "what", "cause", "hint"))
        raise errors.EnclosError(*parts, transient=message.get("transient") == "1")


def want_of(
    reference: Reference,
    digest: str,
    ids: tuple[int, int, tuple[int, ...]],
    home: str,
    auth_file: str,
    runtime: str,
    directory: str = "/",
) -> Want:
    """Where a user's credentials may be, in the order in which skopeo looks; enroot's after them."""
    uid, gid, groups = ids
    files = [auth_file] if auth_file else []
    if not auth_file:
        files += [f"{runtime}/containers/auth.json"] if runtime else []
        files += [f"{home}/.config/containers/auth.json", f"{home}/.docker/config.json"] if home else []
    netrc = (f"{home}/.config/enroot/.credentials",) if home else ()
    return Want(reference, digest, uid, gid, groups, tuple(files), netrc, directory)
