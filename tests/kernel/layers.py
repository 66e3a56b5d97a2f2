"""Layers and images for the tests of imports: made entry by entry, stored as OCI layouts, unpacked by umoci."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Listing = dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class Entry:
    """A member: `kind` is one of file, dir, symlink, link, fifo, char."""

    name: str
    kind: str = "file"
    data: bytes = b""
    target: str = ""
    mode: int = 0o644
    mtime: int = 1_000_000_000
    xattrs: dict[str, str] = field(default_factory=dict)
    uid: int = 0


KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "char": tarfile.CHRTYPE,
}


def layer(entries: Sequence[Entry], *, cut: bool = False) -> bytes:
    """The tar archive of some entries; `cut` leaves out its end, as umoci does."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.mode, info.mtime = KINDS[entry.kind], entry.mode, entry.mtime
            info.linkname, info.size = entry.target, len(entry.data)
            info.uid = info.gid = entry.uid
            info.devmajor, info.devminor = (1, 3) if entry.kind == "char" else (0, 0)
            info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in entry.xattrs.items()}
            archive.addfile(info, io.BytesIO(entry.data))
        end = archive.offset
    return buffer.getvalue()[:end] if cut else buffer.getvalue()


def compressed(data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if kind == "zstd":
        return subprocess.run(["zstd", "-q1", "-c"], input=data, capture_output=True, check=True).stdout
    return data


MEDIA_TYPES = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "": "application/vnd.oci.image.layer.v1.tar",
}


def write_layout(
    directory: Path, layers: Sequence[bytes], *, tag: str = "t", compression: str = "gzip", config: object = None
) -> str:
    """An OCI layout with one image of these layers; returns the digest of its manifest."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def store(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    stored = [store(compressed(data, compression), MEDIA_TYPES[compression]) for data in layers]
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
    }
    described = store(json.dumps(image).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described,
        "layers": stored,
    }
    entry = store(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    index = directory / "index.json"
    others = json.loads(index.read_text())["manifests"] if index.exists() else []
    manifests = [*others, entry | {"annotations": {"org.opencontainers.image.ref.name": tag}}]
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(entry["digest"])


def umoci_unpack(layout: Path, bundle: Path, tag: str = "t") -> Path:
    """The root file system that umoci makes; CalledProcessError where it refuses."""
    command = ["umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return bundle / "rootfs"


def listing(root: Path) -> Listing:
    """All files below a directory: kind, permissions, content or target, and which names are one file.

    Device nodes are left out, and setuid bits: no import keeps them.
    """
    found: Listing = {}
    inodes: dict[tuple[int, int], str] = {}
    for directory, names, files in os.walk(root):
        names.sort()  # The order in which they are entered: the first name of a file stands for it.
        for name in sorted([*names, *files]):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            inside = os.path.relpath(path, root)
            kind = stat.S_IFMT(status.st_mode)
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                continue
            row: tuple[object, ...] = (kind,) if kind == stat.S_IFLNK else (kind, status.st_mode & 0o1777)
            if kind == stat.S_IFLNK:
                row += (os.readlink(path),)
            elif kind == stat.S_IFREG:
                row += (Path(path).read_bytes(), status.st_mtime)
                row += (inodes.setdefault((status.st_dev, status.st_ino), inside),)
            found[inside] = row
    return found
