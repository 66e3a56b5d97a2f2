"""Operations that follow what the image itself says: its mounts, variables, working directory, entrypoint.

All of it is the image maker's word, and gives no more than its user could have asked for: as the user, in his own
namespaces.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from enclos.runtime import rootfs
from enclos.runtime.builder import Builder
from enclos.runtime.images import facts
from enclos.runtime.operations.usermounts import clone, place

FSTAB = "/etc/fstab"
MOST_NAMES = 1024


@dataclass(frozen=True, slots=True)
class CloneImageMounts:
    """Take the sources that the image's fstab names, before the image is the root and hides them."""

    known: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return f"take what {FSTAB} of the image mounts"

    def execute(self, builder: Builder) -> None:
        if "config" in builder.texts:
            return  # An image from a registry: its fstab is for a machine.
        # Beside a container that runs there is no image but in that one's root.
        root_fd = builder.fds.get("lower", builder.fds.get("beside", -1))
        if root_fd < 0:
            return  # The container is entered: it has its mounts.
        data = rootfs.read_file(root_fd, FSTAB)
        builder.image_mounts, warnings = facts.fstab(data, dict(self.known))
        builder.results += [("warning", text) for text in warnings]
        for index, mount in enumerate(builder.image_mounts):
            if mount.kind == "bind":
                clone(f"image{index}", mount, FSTAB).execute(builder)


@dataclass(frozen=True, slots=True)
class PlaceImageMounts:
    """Put them where the image's fstab says; before the site's and the user's, which may cover them."""

    def describe(self) -> str:
        return f"place what {FSTAB} of the image mounts"

    def execute(self, builder: Builder) -> None:
        for index, mount in enumerate(builder.image_mounts):
            place(f"image{index}", mount, FSTAB).execute(builder)


@dataclass(frozen=True, slots=True)
class ReadImageFacts:
    """Report the image's variables, and its entrypoint, working directory and command where they are wanted."""

    known: tuple[tuple[str, str], ...]
    entrypoint: bool
    workdir: bool
    command: bool = False

    def describe(self) -> str:
        wanted = [name for name in ("entrypoint", "workdir", "command") if getattr(self, name)]
        return f"read the image's environment{''.join(f', its {name}' for name in wanted)}"

    def execute(self, builder: Builder) -> None:
        root_fd = builder.fds["root"]
        config = builder.texts.get("config", b"").decode(errors="surrogateescape")
        found = facts.read(
            config,
            lambda path: rootfs.read_file(root_fd, path),
            lambda path: list_names(root_fd, path),
            dict(self.known),
        )
        builder.results += [("env", f"{name}={value}") for name, value in found.variables]
        builder.results += [("warning", text) for text in found.warnings]
        if self.workdir and found.workdir:
            self._find_workdir(builder, found.workdir)
        if self.entrypoint:
            builder.results += [("entrypoint", word) for word in _runnable(root_fd, found.entrypoint)]
        if self.command:
            builder.results += [("command", word) for word in found.command]

    def _find_workdir(self, builder: Builder, path: str) -> None:
        """It is made where it is missing, as docker and enroot do."""
        try:
            os.close(rootfs.make_directories(builder.fds["root"], path))
            usable = os.access(path, os.X_OK)
        except OSError:
            usable = False
        if usable:
            builder.results.append(("workdir", path))
        else:
            builder.results.append(("warning", f"the image's working directory {path} cannot be entered, ignoring"))


def list_names(root_fd: int, path: str) -> Sequence[str]:
    """Names in a directory inside, empty where there is none."""
    try:
        fd = rootfs.open_inside(root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return ()
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry, _ in zip(entries, range(MOST_NAMES), strict=False)]
    finally:
        os.close(fd)


def _runnable(root_fd: int, words: Sequence[str]) -> Sequence[str]:
    """enroot runs its script also where it is not executable."""
    if list(words) != [facts.ENROOT_SCRIPT]:
        return words
    fd = rootfs.open_inside(root_fd, facts.ENROOT_SCRIPT, os.O_PATH)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        return ()
    return words if status.st_mode & 0o111 else ("/bin/sh", *words)
