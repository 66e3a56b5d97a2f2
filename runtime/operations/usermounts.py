"""From a mount as it was asked for to the operations that make it: its source, then its place.

Pure: plan.py uses it for what users and the site ask for, image.py for what an image's own fstab does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from enclos.runtime import mounts
from enclos.runtime.linux import (
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
    MS_PRIVATE,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
)
from enclos.runtime.mounts import Mount
from enclos.runtime.operations.assembly import Attach, MountInside, Unmount
from enclos.runtime.operations.namespaces import CloneSource

if TYPE_CHECKING:
    from enclos.runtime.operations import Operation

SAFE = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
PROPAGATION = {"private": MS_PRIVATE, "slave": MS_SLAVE, "shared": MS_SHARED, "unbindable": MS_UNBINDABLE}
MOUNT_FLAGS = {"noexec": MOUNT_ATTR_NOEXEC, "nosymfollow": MOUNT_ATTR_NOSYMFOLLOW}
# Only of mounts that are new: the kernel does not let a user namespace change how another's mounts keep access times
# (MNT_LOCK_ATIME in fs/namespace.c).
TMPFS_FLAGS = MOUNT_FLAGS | {
    "noatime": MOUNT_ATTR_NOATIME,
    "nodiratime": MOUNT_ATTR_NODIRATIME,
    "strictatime": MOUNT_ATTR_STRICTATIME,
}


def clone(name: str, mount: Mount, option: str) -> CloneSource:
    """Take the source of a bind mount, under a name that `place` is given too."""
    optional = "nofail" in mount.options
    return CloneSource(name, mount.source, mount.target, _attributes(mount), _propagation(mount), optional, option)


def place(name: str, mount: Mount, option: str) -> Operation:
    """One mount onto its target."""
    optional = "nofail" in mount.options
    if mount.kind == "bind":
        return Attach(name, mount.target, mount.source, optional, option, mounts.WHERE_MISSING in mount.options)
    if mount.kind == "umount":
        return Unmount(mount.target, optional, option)
    options: list[tuple[str, str | None]] = [("mode", "1777")] if mount.kind == "tmpfs" else [("ptmxmode", "0666")]
    for flag in mount.options:
        name, equals, value = flag.partition("=")
        if equals and name in mounts.TMPFS_VALUES:
            options.append((name, value))
    return MountInside(mount.kind, mount.target, tuple(options), _attributes(mount), option)


def _attributes(mount: Mount) -> int:
    flags = MOUNT_FLAGS if mount.kind == "bind" else TMPFS_FLAGS
    attributes = SAFE | (MOUNT_ATTR_RDONLY if mount.read_only else 0)
    for option in mount.options:
        attributes |= flags.get(option, 0)
    return attributes


def _propagation(mount: Mount) -> int:
    """Slave by default: what the node mounts later appears inside."""
    return next((PROPAGATION[o.removeprefix("r")] for o in mount.options if o in mounts.PROPAGATION), MS_SLAVE)
