"""Images on disk that are no squashfs: OCI layouts, archives of docker and podman, skopeo's directories.

No transport is needed, so skopeo has no part in it. A sandbox without network reads the small files and says where the
layers are: nothing is copied or unpacked. It cannot open what is the user's: of an archive it has the descriptor, for
the files of a directory it asks the importer, which opens them as the user. Packets to the importer:

    `open` with a name (its answer is the descriptor, or none), then `resolved` as fetch.py says it, with
    `source` with DIGEST OFFSET LENGTH NAME for each layer ("" is the archive itself), and `config`; or `error`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from enclos.runtime import errors, protocol
from enclos.runtime.images import manifest, tar
from enclos.runtime.images.blob import GZIP, ZSTD
from enclos.runtime.images.manifest import BadManifest, LayerInfo, Manifest, NoSuchPlatform
from enclos.runtime.images.reference import Reference

TAG = "org.opencontainers.image.ref.name"
HASH_BYTES = 1 << 20
MEMBER_LIMIT = 100_000
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_BLOB = re.compile("blobs/sha256/([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a layer's bytes are: a file of the directory, or with name "" the archive."""

    name: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """An image on disk. `config` is the whole configuration as it was found."""

    digest: str
    layers: tuple[tuple[LayerInfo, Source], ...]
    config: bytes


class Files(ABC):
    """The small files of an image by name; `find` raises BadManifest for one that is not there."""

    @abstractmethod
    def find(self, name: str) -> tuple[int, Source]:
        """A descriptor, open until the next one is asked for, and where in it the file is."""

    def read(self, name: str) -> bytes:
        fd, source = self.find(name)
        if source.bytes > manifest.MANIFEST_LIMIT_BYTES:
            raise BadManifest(f"{name} is too large")
        return os.pread(fd, source.bytes, source.offset)


class Directory(Files):
    """A directory of the user's: the importer opens its files."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._fd = -1

    def find(self, name: str) -> tuple[int, Source]:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        protocol.send(self._channel, [("state", "open"), ("name", name)])
        message = protocol.receive(self._channel)
        if message is None:
            raise BrokenPipeError
        if not message.fds:
            raise BadManifest(f"it has no file {name}")
        (self._fd,) = message.take_fds()
        return self._fd, Source(name, 0, os.fstat(self._fd).st_size)


class Archive(Files):
    """A tar archive, gone through once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._members: dict[str, Source] = {}
        self._links: dict[str, str] = {}
        if os.pread(fd, 4, 0).startswith((GZIP, ZSTD)):
            raise BadManifest("the archive is compressed as a whole; decompress it")
        reader = tar.Reader(lambda count: os.read(fd, count))
        for number, member in enumerate(reader):
            name = os.path.normpath(member.name.decode("utf-8", "surrogateescape"))
            if number > MEMBER_LIMIT:
                raise BadManifest("the archive has too many files")
            if member.kind == tar.FILE and member.holes is None:
                self._members[name] = Source("", reader.position, member.size)
                os.lseek(fd, member.size, os.SEEK_CUR)
                reader.skipped(member.size)
            elif member.kind in (tar.SYMLINK, tar.LINK):
                # Archives of docker name a layer that occurs twice by a link.
                target = member.target.decode("utf-8", "surrogateescape")
                base = os.path.dirname(name) if member.kind == tar.SYMLINK else ""
                self._links[name] = os.path.normpath(os.path.join(base, target))

    def find(self, name: str) -> tuple[int, Source]:
        name = os.path.normpath(name)
        source = self._members.get(self._links.get(name, name))
        if source is None:
            raise BadManifest(f"the archive has no file {name}")
        return self._fd, source


def job_read(reference: Reference, archive_fd: int, limit_bytes: int) -> Callable[[socket.socket], None]:
    """The sandbox's job: find the image. `archive_fd` is negative for a directory."""

    def run(channel: socket.socket) -> None:
        try:
            files: Files = Archive(archive_fd) if archive_fd >= 0 else Directory(channel)
            found = READERS[reference.kind](files, reference)
            if sum(layer.bytes for layer, _ in found.layers) > limit_bytes:
                raise errors.image_too_large(reference.text, "its layers", "imports.limit_bytes")
            _say(channel, found)
        except NoSuchPlatform as error:
            protocol.send(channel, errors.image_no_platform(reference.text, str(error)).fields())
        except tar.BadArchive as error:
            protocol.send(channel, errors.image_bad_manifest(reference.text, f"no tar archive: {error}").fields())
        except BadManifest as error:
            protocol.send(channel, errors.image_bad_manifest(reference.text, str(error)).fields())
        except errors.EnclosError as error:
            protocol.send(channel, error.fields())

    return run


def _say(channel: socket.socket, found: Found) -> None:
    layers = [("layer", f"{layer.digest} {layer.bytes}") for layer, _ in found.layers]
    config = ("config", f"{manifest.digest_of(found.config)} {len(found.config)}")
    head = [("state", "resolved"), ("digest", found.digest), ("private", "1"), config]
    protocol.send(channel, [*head, *layers])
    for layer, at in found.layers:
        protocol.send(channel, [("state", "source"), ("source", f"{layer.digest} {at.offset} {at.bytes} {at.name}")])
    protocol.send(channel, [("state", "config"), ("text", manifest.configuration(found.config))])


# --- the kinds -------------------------------------------------------------------------------------------------------


def _layout(files: Files, reference: Reference) -> Found:
    """An OCI layout: index.json names manifests, blobs are named by their digests."""
    entries = manifest.parse(files.read("index.json"))
    if isinstance(entries, Manifest):
        raise BadManifest("its index.json is no index")
    chosen = _by_tag(entries, reference.tag)
    data = _blob(files, chosen)
    digest = chosen
    found = manifest.parse(data)
    if isinstance(found, list):
        found = manifest.parse(_blob(files, manifest.choose(found, os.uname().machine)))
    if isinstance(found, list):
        raise BadManifest("its index names another index")
    return _found(files, digest, found, "blobs/sha256/")


def _by_tag(entries: list[dict[str, Any]], tag: str) -> str:
    tags = {_tag(entry): entry for entry in entries}
    if not tag and len(entries) == 1:
        return str(entries[0].get("digest"))
    if tag not in tags:
        known = ", ".join(sorted(name for name in tags if name)) or "none"
        raise BadManifest(f"it has no tag {tag}; its tags: {known}" if tag else f"which of its tags: {known}")
    return str(tags[tag].get("digest"))


def _tag(entry: dict[str, Any]) -> str:
    annotations = entry.get("annotations")
    return str(annotations.get(TAG, "")) if isinstance(annotations, dict) else ""


def _blob(files: Files, digest: str) -> bytes:
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or len(digits) != 64 or not digits.isalnum():
        raise BadManifest("a digest in its index is none")
    data = files.read(f"blobs/sha256/{digits}")
    if manifest.digest_of(data) != digest:
        raise BadManifest(f"its file {digits[:12]} does not match its digest")
    return data


def _directory(files: Files, reference: Reference) -> Found:
    """What `skopeo copy … dir:` writes: manifest.json, and blobs named by the digits of their digests."""
    data = files.read("manifest.json")
    found = manifest.parse(data)
    if isinstance(found, list):
        raise BadManifest("its manifest is an index")
    return _found(files, manifest.digest_of(data), found, "")


def _found(files: Files, digest: str, found: Manifest, prefix: str) -> Found:
    layers = []
    for layer in found.layers:
        _, source = files.find(prefix + layer.digest.partition(":")[2])
        layers.append((layer, source))
    config = files.read(prefix + found.config.digest.partition(":")[2])
    if manifest.digest_of(config) != found.config.digest:
        raise BadManifest("its configuration does not match its digest")
    return Found(digest, tuple(layers), config)


def _docker(files: Files, reference: Reference) -> Found:
    """What `docker save` and `podman save` write: manifest.json lists images, each with its layers as files."""
    try:
        images = json.loads(files.read("manifest.json"))
        chosen = [image for image in images if not reference.tag or _is_tagged(image["RepoTags"], reference.tag)]
        if len(chosen) != 1:
            known = ", ".join(tag for image in images for tag in image["RepoTags"] or ()) or "none"
            raise BadManifest(f"which of its images: {known}")
        config, names = files.read(chosen[0]["Config"]), [str(name) for name in chosen[0]["Layers"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BadManifest):
            raise
        raise BadManifest("its manifest.json is none of an archive of docker's") from error
    if not names or len(names) > manifest.LAYER_LIMIT:
        raise BadManifest("it has no layers, or too many")
    layers = []
    for name, diff_id in zip(names, _diff_ids(config, len(names)), strict=True):
        fd, source = files.find(name)
        layers.append((LayerInfo(_digest(fd, source, name, diff_id), source.bytes), source))
    digest = manifest.digest_of(config + b"\n".join(layer.digest.encode() for layer, _ in layers))
    return Found(digest, tuple(layers), config)


def _is_tagged(tags: list[Any] | None, wanted: str) -> bool:
    return any(isinstance(tag, str) and f"/{tag}".endswith(f"/{wanted}") for tag in tags or ())


def _diff_ids(config: bytes, count: int) -> list[str]:
    """The digests that a configuration gives the layers, unpacked; "" for each where it has not as many."""
    try:
        found = list(json.loads(config)["rootfs"]["diff_ids"])
    except (ValueError, KeyError, TypeError, RecursionError):
        found = []
    return [str(each) for each in found] if len(found) == count else [""] * count


def _digest(fd: int, source: Source, name: str, diff_id: str) -> str:
    """The digest that a layer has by the archive's own word, where it says one: it may be large, and each step asks.

    Whether that is true is seen when the layer is converted (blob.py), as with a layout's. `diff_id` is of it unpacked.
    """
    if named := _BLOB.fullmatch(name):
        return f"sha256:{named[1]}"
    if _DIGEST.fullmatch(diff_id) and not os.pread(fd, 4, source.offset).startswith((GZIP, ZSTD)):
        return diff_id
    return _hash(fd, source)


def _hash(fd: int, source: Source) -> str:
    digest = hashlib.sha256()
    at, end = source.offset, source.offset + source.bytes
    while at < end and (data := os.pread(fd, min(HASH_BYTES, end - at), at)):
        digest.update(data)
        at += len(data)
    return f"sha256:{digest.hexdigest()}"


READERS: dict[str, Callable[[Files, Reference], Found]] = {
    "oci": _layout,
    "oci-archive": _layout,
    "dir": _directory,
    "docker-archive": _docker,
}
