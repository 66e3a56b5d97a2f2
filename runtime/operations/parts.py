"""Squashfs files as lower layers: one kernel mount per node, and a clone that shows its files as the user's.

The kernel parses only files that root wrote, or that the site trusts (staging.py decides). Runs in a builder, as root.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from enclos.runtime import errors, linux
from enclos.runtime.builder import Builder
from enclos.runtime.idmap import image_map
from enclos.runtime.images import sif
from enclos.runtime.images.filekey import file_key
from enclos.runtime.linux import (
    MOUNT_ATTR_IDMAP,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
)
from enclos.runtime.operations.common import NO_NAMESPACES, words


def mount_lower(builder: Builder, name: str, fd: int, path: str, extent: sif.Extent) -> bool:
    """Show the file as the user's: on-disk owner 0 becomes the job's uid on this clone of the mount.

    The file is mounted once per node; this builder mounts it if no other has. The clone is kept as `name`. False where
    the kernel can't do that.
    """
    key = file_key(os.fstat(fd))
    with builder.need("image", ("key", key), ("path", path)) as answer:
        for given_name, given in zip(answer.all("name"), answer.take_fds(), strict=True):
            builder.keep(given_name, given)
    mount_fd, idmap_fd = builder.fds.get("mounted", -1), builder.fds.get("idmap", -1)
    if mount_fd < 0:
        mount_fd = _attach_loop(builder, fd, key, path, extent)
    if idmap_fd < 0:
        maps = image_map(builder.uid), image_map(builder.gid)
        try:
            idmap_fd = builder.keep("idmap", linux.userns_with_map(*maps))
        except OSError as error:
            if error.errno in NO_NAMESPACES:
                raise errors.userns_forbidden(words(error)) from error
            raise
        builder.give("idmap", idmap_fd)
    lower = builder.keep(name, linux.clone_tree("", mount_fd, recursive=False))
    attributes = MOUNT_ATTR_IDMAP | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY
    try:
        linux.set_attributes(lower, attributes, propagation=MS_PRIVATE, userns_fd=idmap_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        builder.drop(name)  # FIXME(kernel 6.2): squashfs took no idmaps before.
        return False
    finally:
        builder.drop("mounted")
        builder.drop("idmap")
    return True


def _attach_loop(builder: Builder, fd: int, key: str, path: str, extent: sif.Extent) -> int:
    """Mount the file through a loop device that the kernel frees with its last mount.

    The agent attaches the mount in its own mount namespace: before Linux 6.15 a detached mount
    can't be cloned.
    """
    size = -(-extent.size // 512) * 512  # The kernel would leave out the last sector of an odd size.
    loop_fd, device = linux.loop_attach(fd, path[-63:], extent.offset, size)
    try:
        options = (("source", device),)
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY
        mount_fd = linux.mount_filesystem("squashfs", (*options, ("ro", None)), attributes)
    except OSError as error:
        raise errors.image_damaged(builder.image_path, words(error)) from error
    finally:
        os.close(loop_fd)
    builder.give("image", mount_fd, ("key", key))
    os.close(mount_fd)
    with builder.need("attached", ("key", key)) as answer:
        return builder.keep("mounted", answer.take_fds()[0])


@dataclass(frozen=True, slots=True)
class OpenParts:
    """Make the parts of a cached image the lower layers. Our importer built them, and they are root's.

    `parts` are paths in the node's cache, lowest first; `config` is the JSON text of the image's configuration.
    """

    image: str
    parts: tuple[str, ...]
    config: str = "{}"

    def describe(self) -> str:
        return f"open the parts of image {self.image}"

    def execute(self, builder: Builder) -> None:
        builder.image_path = self.image
        builder.texts["config"] = self.config.encode()
        for index, path in enumerate(self.parts):
            fd = builder.keep("image", os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
            if not mount_lower(builder, f"lower{index}", fd, path, sif.Extent()):
                raise errors.idmap_missing(self.image)
        builder.drop("image")
        builder.lowers = len(self.parts)
