"""A store of images on disk: where its files are, and how a finished image is described.

The node cache has this form (cache.py adds its limit and who may have what); a site or user store can have it too.
Who calls what: imports.py asks `Store.find` whether an image is there; the importer (importer.py) writes parts through
`Store.part_file` and is done when imports.py has called `Store.add`; the builder mounts `Store.part_path` of each part
of `ImageRecord.parts`, the first one lowest, and reads `ImageRecord.config`.

    STORE/                       0700, root's (a user's store: the user's)
        images/HEX.json          one ImageRecord, by the digest that was asked for (a manifest's or an index's)
        parts/KEY.sqsh           0444: adjacent layers as one squashfs; parts are shared by images
        work/HEX.UID/            blobs of a user's import under way, kept after an interrupted one so that it resumes
        work/HEX/                the same of root's, and in a user's store

Every file appears by link or rename when it is complete and on disk; whatever is not named by a record may be removed.
A part holds whiteouts as 0/0 character devices and opaque directories as `user.overlay.opaque`, for an overlay that is
mounted with `userxattr`; a directory with whiteouts has an empty `user.overlay.origin` (flatten.py). The lowest part
has none of these. All files belong to 0:0; there are no devices, setuid bits or file capabilities.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from dataclasses import asdict, dataclass

FORMAT = 2
RECORD_LIMIT_BYTES = 1 << 20
WORK = "work"  # The folder of a store in which imports keep their blobs.
UNFINISHED = ".new"
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Part:
    """One squashfs file of an image.

    Attributes:
        key: 64 hexadecimal digits, made of the digests of its layers and the way they were packed.
        bytes: size of the file.
        sha256: of the file's bytes, for the check on use.
    """

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A finished image.

    Attributes:
        digest: `sha256:HEX` of the manifest or index that names it.
        parts: lowest first; at least one.
        config: JSON text of the OCI image configuration's `config` object as far as Enclos uses it (Env, WorkingDir,
            Entrypoint, Cmd, User, Labels), written by the importer. It is the image maker's word: root hands it on
            and does not parse it.
        grants: who may have it without asking its registry; see cache.py.
    """

    digest: str
    parts: tuple[Part, ...]
    config: str = "{}"
    grants: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ImageRecord:
        """Raises ValueError for anything but a record of this format."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError("not a record of this format")
        try:
            parts = tuple(Part(str(part["key"]), int(part["bytes"]), str(part["sha256"])) for part in raw["parts"])
            record = cls(str(raw["digest"]), parts, str(raw["config"]), tuple(map(str, raw["grants"])))
        except (KeyError, TypeError) as error:
            raise ValueError("a record without all fields") from error
        if not parts or not all(_HEX.fullmatch(part.key) and _HEX.fullmatch(part.sha256) for part in parts):
            raise ValueError("a record with a part that has no name")
        return record


def hex_of(digest: str) -> str:
    """The 64 digits of `sha256:HEX`; they are a file name, so nothing else may pass. Raises ValueError."""
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or _HEX.fullmatch(digits) is None:
        raise ValueError(f"not a digest: {digest[:80]!r}")
    return digits


class Store:
    """The files below one directory. Makes no decision; raises OSError."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make(self, mode: int = 0o700) -> None:
        """Make the directories that are missing."""
        os.makedirs(self.directory, mode, exist_ok=True)
        for name in ("images", "parts", WORK):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{self.directory}/{name}", 0o711 if name == WORK else 0o700)

    def part_path(self, key: str) -> str:
        return f"{self.directory}/parts/{key}.sqsh"

    def work_path(self, digest: str, uid: int = 0) -> str:
        """Each user's own: what one has fetched of a private image would be another's otherwise."""
        return f"{self.directory}/{WORK}/{hex_of(digest)}" + (f".{uid}" if uid else "")

    def record_path(self, digest: str) -> str:
        return f"{self.directory}/images/{hex_of(digest)}.json"

    def find(self, digest: str) -> ImageRecord | None:
        """The image of that digest, if its record and all of its parts are there."""
        try:
            with open(self.record_path(digest), "rb") as file:
                record = ImageRecord.from_json(file.read(RECORD_LIMIT_BYTES).decode())
        except (FileNotFoundError, ValueError):
            return None
        for part in record.parts:
            try:
                if os.stat(self.part_path(part.key)).st_size != part.bytes:
                    return None
            except FileNotFoundError:
                return None
        return record

    def part_file(self) -> int:
        """A new file without a name for a part; nothing is left of it unless `keep_part` names it.

        Where the file system has no such files (NFS), it has a name that ends with UNFINISHED.
        """
        parts = f"{self.directory}/parts"
        try:
            return os.open(parts, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        path = f"{parts}/{os.urandom(16).hex()}{UNFINISHED}"
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def drop_part(self, fd: int) -> None:
        """Remove the name of a part that was not finished, where it has one; its descriptor stays the caller's."""
        if os.fstat(fd).st_nlink:
            os.unlink(os.readlink(f"/proc/self/fd/{fd}"))

    def keep_part(self, fd: int, key: str) -> None:
        """Give a finished file its name, on disk; one that is there already stays (it has the same content)."""
        os.fsync(fd)
        directory_fd = os.open(f"{self.directory}/parts", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_nlink:
                os.rename(os.readlink(f"/proc/self/fd/{fd}"), f"{key}.sqsh", dst_dir_fd=directory_fd)
            else:
                with contextlib.suppress(FileExistsError):
                    # With a directory's descriptor this is linkat(2), which follows the magic link (see open(2)).
                    os.link(f"/proc/self/fd/{fd}", f"{key}.sqsh", dst_dir_fd=directory_fd, follow_symlinks=True)
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)

    def add(self, record: ImageRecord) -> None:
        """Write a record; from here on the image is there."""
        path = self.record_path(record.digest)
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            file.write(record.to_json())
            file.flush()
            os.fsync(fd)
        os.rename(f"{path}.new", path)
        self._sync("images")

    def remove(self, digest: str) -> None:
        """Forget an image; its parts go when no other record names them (cache.py). Missing is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.record_path(digest))

    def _sync(self, name: str) -> None:
        fd = os.open(f"{self.directory}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
