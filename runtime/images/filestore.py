"""A user's or the site's store: one squashfs file per image, by digest, and the names under which it was pulled.

Other than the node's cache (layout.py) it holds each image as one file: a file can be given to anybody, copied, used
as `--container-image=/PATH`, and served by one squashfuse. It may lie on a shared file system, where several nodes fill
it: whoever works on a digest holds a lock, the others wait for it in the kernel, and find the result or take over.

    STORE/
        images/HEX.sqsh      0444, complete: appears by rename
        images/HEX.json      StoredImage, written after it; without it the image is not there
        names/NAME           the digest that a name had when it was pulled; NAME is quoted. Of a name that is too long
                             for a file's it is the beginning and a checksum; the second line then has all of it
        work/HEX.lock        locked by whoever makes images/HEX
        work/                beside the locks a store of the importer's (layout.py), with what it has fetched: kept when
                             it is interrupted

Runs as whoever owns the store, or reads it as any user. Whoever owns it may write anything into it: a reader believes
nothing of it beyond its form.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from urllib.parse import quote, unquote

from enclos.runtime import errors
from enclos.runtime.images import place
from enclos.runtime.images.layout import UNFINISHED, WORK, Store, hex_of

FORMAT = 1
TEXT_LIMIT_BYTES = 1 << 20
COPY_BYTES = 1 << 20
UNFINISHED_SECONDS = 86400
# A file's name has 255 bytes; a number and `.new` come behind it while it is written (_write).
QUOTED_LIMIT = 230
BEGINNING = 160
NAME_LIMIT_BYTES = 8192
_LONG = re.compile(r".*~[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a store.

    Attributes:
        digest: `sha256:HEX` of its manifest or index; of an image that was brought as a file, of that file.
        source: the reference from which it came.
        bytes, sha256: of the squashfs file.
        created: seconds since 1970.
        config: JSON text of the image's configuration, as layout.ImageRecord has it.
    """

    digest: str
    source: str
    bytes: int
    sha256: str
    created: float
    config: str = "{}"
    names: tuple[str, ...] = field(default=(), compare=False)


class FileStore:
    """The files below one directory. Raises OSError."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make(self) -> None:
        """Make the directories that are missing. Raises EnclosError for a store that is somebody else's, too."""
        for name in ("images", "names", WORK):
            os.makedirs(f"{self.directory}/{name}", 0o755, exist_ok=True)
        for name in ("", "/images", "/names", f"/{WORK}"):
            if words := place.stranger(f"{self.directory}{name}", os.geteuid()):
                raise errors.store_unusable(self.directory, 0, words)
        self.work.make()

    def image_path(self, digest: str) -> str:
        return f"{self.directory}/images/{hex_of(digest)}.sqsh"

    def record_path(self, digest: str) -> str:
        return f"{self.directory}/images/{hex_of(digest)}.json"

    @property
    def work(self) -> Store:
        """Where the importer works."""
        return Store(f"{self.directory}/{WORK}")

    def lock_path(self, digest: str) -> str:
        return f"{self.directory}/{WORK}/{hex_of(digest)}.lock"

    # --- reading ----------------------------------------------------------------------------------------------

    def find(self, digest: str) -> StoredImage | None:
        """The image of that digest, if it is whole."""
        try:
            with open(self.record_path(digest), "rb") as file:
                raw = json.loads(file.read(TEXT_LIMIT_BYTES))
            image = StoredImage(
                str(raw["digest"]), str(raw["source"]), int(raw["bytes"]), str(raw["sha256"]), float(raw["created"]),
                str(raw["config"]),
            )  # fmt: skip
            if image.digest == digest and os.stat(self.image_path(digest)).st_size == image.bytes:
                return image
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def digest_of(self, name: str) -> str:
        """The digest that a name has here, or "". A name is a reference in its canonical form."""
        try:
            with open(f"{self.directory}/names/{_file_name(name)}", "rb") as file:
                digest = file.read(256).decode(errors="replace").partition("\n")[0]
            hex_of(digest)
            return digest
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return ""

    def images(self) -> list[StoredImage]:
        """All images that are whole, with their names, the newest first."""
        names: dict[str, list[str]] = {}
        for name in self._names():
            names.setdefault(self.digest_of(name), []).append(name)
        found = []
        for entry in _list(f"{self.directory}/images"):
            stem, dot, kind = entry.rpartition(".")
            if dot and kind == "json" and (image := self._find_hex(stem)) is not None:
                fields = asdict(image) | {"names": tuple(sorted(names.get(image.digest, ())))}
                found.append(StoredImage(**fields))
        return sorted(found, key=lambda image: -image.created)

    def names_of(self, digest: str) -> tuple[str, ...]:
        """The names that an image has here."""
        return tuple(sorted(name for name in self._names() if self.digest_of(name) == digest))

    def _find_hex(self, stem: str) -> StoredImage | None:
        try:
            return self.find(f"sha256:{stem}")
        except ValueError:
            return None

    def _names(self) -> Iterator[str]:
        for entry in _list(f"{self.directory}/names"):
            if _LONG.fullmatch(entry) is None:
                yield unquote(entry)
                continue
            with contextlib.suppress(OSError), open(f"{self.directory}/names/{entry}", "rb") as file:
                _, _, name = file.read(NAME_LIMIT_BYTES).decode(errors="replace").rstrip("\n").partition("\n")
                if _file_name(name) == entry:
                    yield name

    # --- writing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self, digest: str, wait: Callable[[], None]) -> Iterator[None]:
        """Be the only one who makes this image, on all nodes that see the store.

        Args:
            wait: called once if another has the lock; then the kernel waits. It gives it up when its holder dies.
        """
        fd = os.open(self.lock_path(digest), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def add(self, digest: str, source: str, path: str, config: str, sha256: str = "") -> StoredImage:
        """Take a finished squashfs file, which lies in this store's work directory, as the image of a digest."""
        os.chmod(path, 0o444)
        size = os.stat(path).st_size
        image = StoredImage(digest, source, size, sha256 or checksum(path), time.time(), config)
        _sync(path)
        os.rename(path, self.image_path(digest))
        fields = {key: value for key, value in asdict(image).items() if key != "names"}
        try:
            self._write(self.record_path(digest), json.dumps({"format": FORMAT, **fields}))
        except OSError:
            os.unlink(self.image_path(digest))
            raise
        _sync(f"{self.directory}/images")
        return image

    def name(self, name: str, digest: str) -> None:
        """Give a name to an image, or another image to a name."""
        entry = _file_name(name)
        rest = f"{name}\n" if _LONG.fullmatch(entry) else ""
        self._write(f"{self.directory}/names/{entry}", f"{digest}\n{rest}")

    def remove_name(self, name: str) -> None:
        _remove(f"{self.directory}/names/{_file_name(name)}")

    def remove(self, digest: str) -> None:
        """Forget an image and its names; steps that have its file open go on."""
        for name in list(self._names()):
            if self.digest_of(name) == digest:
                self.remove_name(name)
        for path in (self.record_path(digest), self.image_path(digest)):
            _remove(path)

    def collect(self, older_than: float) -> list[str]:
        """Remove images without a name, those not used for so many seconds, and what interrupted pulls left.

        Nothing that another works on at this moment: its lock says so. Returns what was removed, in words.
        """
        removed = []
        now = time.time()
        for image in self.images():
            used = max(image.created, os.stat(self.image_path(image.digest)).st_atime)
            if (not image.names or now - used > older_than >= 0) and self._discard(image):
                removed.append(image.names[0] if image.names else image.digest)
        for entry in _list(f"{self.directory}/images"):
            if self._discard_half(entry):
                removed.append(f"images/{entry}")
        for entry in _list(f"{self.directory}/{WORK}"):
            if entry.endswith(".lock") and self._discard_work(entry.removesuffix(".lock")):
                removed.append(f"work/{entry.removesuffix('.lock')}")
        self._discard_unfinished(now)
        return removed

    def _discard(self, image: StoredImage) -> bool:
        with self._alone(hex_of(image.digest)) as alone:
            # A pull may have given it a name meanwhile.
            if alone and (image.names or image.digest not in map(self.digest_of, self._names())):
                self.remove(image.digest)
                return True
        return False

    def _discard_half(self, entry: str) -> bool:
        """A file of no image: what a killed pull or a power cut left, not what a pull has just put there."""
        stem = entry.rpartition(".")[0]
        with self._alone(stem) as alone:
            if not alone or self._find_hex(stem) is not None:
                return False
            _remove(f"{self.directory}/images/{entry}")
            return True

    def _discard_unfinished(self, now: float) -> None:
        """What killed pulls left on the way to its place. Nobody has a lock on it: old ones."""
        for directory in ("work/parts", "images", "names"):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.listdir(f"{self.directory}/{directory}"):
                    path = f"{self.directory}/{directory}/{entry}"
                    unfinished = entry.endswith(UNFINISHED) or directory == "work/parts"
                    if unfinished and now - os.stat(path).st_mtime > UNFINISHED_SECONDS:
                        _remove(path)

    def _discard_work(self, digits: str) -> bool:
        """Remove what an interrupted pull has fetched, unless somebody is at it. The lock stays: others may wait."""
        import shutil  # Not above: lookup.py is in the zygote, which should stay small.

        path = self.work.work_path(f"sha256:{digits}")
        if not os.path.isdir(path):
            return False
        with self._alone(digits) as alone:
            if alone:
                shutil.rmtree(path)
            return alone

    @contextlib.contextmanager
    def _alone(self, digits: str) -> Iterator[bool]:
        """Whether nobody works on an image, and then nobody until the end; true of a name that no image has."""
        try:
            path = self.lock_path(f"sha256:{digits}")
        except ValueError:
            yield True
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(fd)

    def _write(self, path: str, text: str) -> None:
        temporary = f"{path}.{os.getpid()}.new"
        with contextlib.ExitStack() as undo:
            undo.callback(_remove, temporary)
            with open(temporary, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
            undo.pop_all()


def checksum(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(COPY_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _file_name(name: str) -> str:
    """A name as one file name; where it is too long for one, its beginning and a checksum."""
    quoted = quote(name, safe="")
    if len(quoted) <= QUOTED_LIMIT:
        return quoted
    import hashlib

    return f"{quoted[:BEGINNING]}~{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()}"


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _list(directory: str) -> list[str]:
    try:
        return sorted(entry for entry in os.listdir(directory) if not entry.endswith(".new"))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
