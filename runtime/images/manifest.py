"""What manifests say: which image of an index fits this node, its layers, and how they are grouped into parts.

Reads JSON that a registry or an archive gave: in the importer, never as root. `group` and `part_key` work on digests
alone; the agent uses them, too. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enclos.runtime.images import layout
from enclos.runtime.images.order import Packing

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_LIMIT_BYTES = 4 << 20
LAYER_LIMIT = 1000
CONFIG_LIMIT_BYTES = 64 << 10
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
# A part is closed when its layers have this many compressed bytes; twice as many after each sixteen parts.
PART_BYTES = 24 << 20
PARTS_BEFORE_DOUBLING = 16


class BadManifest(ValueError):
    """Not the manifest of an image that can be run; the message says why."""


class NoSuchPlatform(ValueError):
    """The index has no image for this node; the message lists what it has."""


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer as its manifest names it: `sha256:HEX` of the blob, and its size in bytes."""

    digest: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image's manifest: the layers, lowest first, and the blob with its configuration."""

    config: LayerInfo
    layers: tuple[LayerInfo, ...]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse(data: bytes) -> Manifest | list[dict[str, Any]]:
    """A manifest, or the entries of an index. Raises BadManifest."""
    raw = _object(data)
    entries = raw.get("manifests")
    if raw.get("mediaType") in INDEXES or isinstance(entries, list):
        if not isinstance(entries, list):
            raise BadManifest("its index has no list of manifests")
        return [entry for entry in entries if isinstance(entry, dict)]
    if raw.get("schemaVersion") != 2 or not isinstance(raw.get("layers"), list):
        raise BadManifest("its manifest is of a kind that is not supported (Docker schema 1, or no image)")
    layers = tuple(_described(entry) for entry in raw["layers"])
    if not layers:
        raise BadManifest("it has no layers")
    if len(layers) > LAYER_LIMIT:
        raise BadManifest(f"it has more than {LAYER_LIMIT} layers")
    return Manifest(_described(raw.get("config")), layers)


def choose(entries: Sequence[dict[str, Any]], machine: str) -> str:
    """The digest of the image of an index for Linux on this machine (uname -m). Raises NoSuchPlatform."""
    architecture = ARCHITECTURES.get(machine, machine)
    platforms = []
    for entry in entries:
        platform = entry.get("platform")
        if not isinstance(platform, dict):
            continue
        name = f"{platform.get('os')}/{platform.get('architecture')}"
        if name == f"linux/{architecture}":
            return _described(entry).digest
        platforms.append(name)
    if len(entries) == 1 and not platforms:
        return _described(entries[0]).digest
    known = sorted({name for name in platforms if name != "unknown/unknown"})[:8]
    raise NoSuchPlatform(f"no image for linux/{architecture}, only for {', '.join(known) or 'nothing'}")


def configuration(data: bytes) -> str:
    """The part of an image configuration that is kept with the image, as JSON text (layout.ImageRecord.config)."""
    config = _object(data).get("config")
    if not isinstance(config, dict):
        return "{}"
    kept: dict[str, Any] = {key: config[key] for key in ("WorkingDir", "User") if isinstance(config.get(key), str)}
    for key in ("Env", "Entrypoint", "Cmd"):
        value = config.get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            kept[key] = value
    labels = config.get("Labels")
    if isinstance(labels, dict):
        kept["Labels"] = {key: value for key, value in labels.items() if isinstance(value, str)}
    text = json.dumps(kept)
    if len(text) > CONFIG_LIMIT_BYTES:
        kept.pop("Labels", None)
        text = json.dumps(kept)
    if len(text) > CONFIG_LIMIT_BYTES:
        raise BadManifest(f"its configuration is larger than {CONFIG_LIMIT_BYTES} bytes")
    return text


def group(layers: Sequence[LayerInfo]) -> list[tuple[LayerInfo, ...]]:
    """Adjacent layers that become one part, lowest first.

    Where a part ends depends on the layers below its end alone: images with the same lower layers have the same
    lower parts, and a changed top layer costs its own part and no other.

    A group that comes again above is left out: it would be the same file, which an overlay takes but once, and what it
    brings and deletes, the upper one brings and deletes again. Not the lowest, whose file is another.
    """
    groups: list[tuple[LayerInfo, ...]] = []
    current: list[LayerInfo] = []
    for layer in layers:
        current.append(layer)
        if sum(each.bytes for each in current) >= PART_BYTES << len(groups) // PARTS_BEFORE_DOUBLING:
            groups.append(tuple(current))
            current = []
    if current:
        groups.append(tuple(current))
    last = {_digests(each): index for index, each in enumerate(groups)}
    return [each for index, each in enumerate(groups) if index in (0, last[_digests(each)])]


def _digests(layers: Sequence[LayerInfo]) -> tuple[str, ...]:
    return tuple(layer.digest for layer in layers)


def part_key(digests: Sequence[str], lowest: bool, packing: Packing) -> str:
    """The name of the squashfs file that these layers make."""
    way = [layout.FORMAT, lowest, packing.compression, packing.level, packing.block_bytes]
    return hashlib.sha256(json.dumps([*way, *digests]).encode()).hexdigest()


def _object(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadManifest("what should be JSON is none") from error
    if not isinstance(raw, dict):
        raise BadManifest("what should be JSON of a manifest is something else")
    return raw


def _described(entry: object) -> LayerInfo:
    """A descriptor: digest and size. Only sha256, and no layers that lie elsewhere."""
    if not isinstance(entry, dict):
        raise BadManifest("a descriptor is missing in its manifest")
    digest, size = entry.get("digest"), entry.get("size")
    if not isinstance(digest, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BadManifest("a descriptor in its manifest has no digest or size")
    try:
        layout.hex_of(digest)
    except ValueError as error:
        raise BadManifest(f"a digest in its manifest is none ({digest[:80]})") from error
    if "foreign" in str(entry.get("mediaType")) or "nondistributable" in str(entry.get("mediaType")):
        raise BadManifest("it has layers that its registry does not have (foreign layers)")
    return LayerInfo(digest, size)
