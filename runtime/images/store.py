"""The images that are mounted on this node: one kernel mount each, however many containers show it.

A mount is attached below a directory of the agent's own mount namespace (mode 0700), so it is gone with the agent,
and no user reaches it but through a container. Builders make the mounts; this keeps, counts and drops them. Runs in
the agent, which opens no image itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass, field

from enclos.runtime import linux

IDMAP_LIMIT = 256


@dataclass(slots=True)
class MountedImage:
    """One image file as it was when it was mounted; `key` is made of its device, inode, size and times."""

    key: str
    path: str
    mount_path: str
    mount_fd: int = -1
    users: int = 0
    expiry: asyncio.TimerHandle | None = None
    waiting: list[asyncio.Future[None]] = field(default_factory=list)


class MountedImages:
    """All images of this node, by key, and the user namespaces that map their owner to a user."""

    def __init__(self, directory: str, idle_seconds: float) -> None:
        self.directory = directory
        self._idle_seconds = idle_seconds
        self._images: dict[str, MountedImage] = {}
        self._idmaps: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._count = 0

    async def acquire(self, key: str, path: str) -> MountedImage:
        """Take a reference. When `mount_fd` is negative, the caller has to mount the image and `attach` it.

        Whoever asks while another is mounting waits for him, and takes over if he gives up.
        """
        while (image := self._images.get(key)) is not None and image.mount_fd < 0:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            image.waiting.append(turn)
            await turn
        if image is None:
            self._count += 1
            image = self._images[key] = MountedImage(key, path, f"{self.directory}/{self._count}")
        image.users += 1
        if image.expiry is not None:
            image.expiry.cancel()
            image.expiry = None
        return image

    def attach(self, image: MountedImage, detached_fd: int) -> None:
        """Attach the mount that the first user made; takes over the descriptor. Raises OSError."""
        try:
            os.mkdir(image.mount_path, 0o700)
            linux.move_mount(detached_fd, linux.AT_FDCWD, image.mount_path)
        except OSError:
            os.close(detached_fd)
            raise
        image.mount_fd = detached_fd
        _wake(image)

    def release(self, image: MountedImage) -> None:
        """Give up a reference; an image that nobody uses stays mounted for the idle time."""
        image.users -= 1
        if image.users > 0:
            return
        if image.mount_fd < 0 or self._idle_seconds <= 0:
            self._drop(image)
        else:
            image.expiry = asyncio.get_running_loop().call_later(self._idle_seconds, self._drop, image)

    def _drop(self, image: MountedImage) -> None:
        self._images.pop(image.key, None)
        if image.mount_fd >= 0:
            linux.unmount(image.mount_path)
            os.close(image.mount_fd)
            image.mount_fd = -1
            with contextlib.suppress(OSError):
                os.rmdir(image.mount_path)
        _wake(image)

    def idmap(self, uid: int, gid: int) -> int:
        """The kept user namespace that maps on-disk 0 to this user, or -1; it stays the store's."""
        fd = self._idmaps.get((uid, gid), -1)
        if fd >= 0:
            self._idmaps.move_to_end((uid, gid))
        return fd

    def keep_idmap(self, uid: int, gid: int, fd: int) -> None:
        """Keep such a user namespace (takes over the descriptor); the least used one goes beyond a limit."""
        if (uid, gid) in self._idmaps:
            os.close(fd)
            return
        self._idmaps[uid, gid] = fd
        if len(self._idmaps) > IDMAP_LIMIT:
            _, oldest = self._idmaps.popitem(last=False)
            os.close(oldest)

    def close(self) -> None:
        """Drop every mount; running containers keep their own copies."""
        for image in list(self._images.values()):
            if image.expiry is not None:
                image.expiry.cancel()
            self._drop(image)


def _wake(image: MountedImage) -> None:
    for turn in image.waiting:
        if not turn.done():
            turn.set_result(None)
    image.waiting.clear()
