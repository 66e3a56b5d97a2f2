"""Operations for devices of CDI files: which of them, their nodes' place, mounts, links, the linker's cache.

SelectDevices runs as root and reads the image's variables as the user; the nodes are made by StageDevices, as root,
with the owner and mode that they have outside. Everything else runs as the user: what a CDI file mounts is opened with
his rights, so that a container shows nothing that a bare step could not open. No hook and no program is run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from enclos.runtime import errors, ldcache, linux, rootfs
from enclos.runtime.asuser import open_as_user
from enclos.runtime.builder import Builder
from enclos.runtime.devices import choice
from enclos.runtime.devices.cdi import Bind
from enclos.runtime.devices.choice import Selection
from enclos.runtime.images import facts
from enclos.runtime.linux import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, MS_SLAVE
from enclos.runtime.operations.image import list_names
from enclos.runtime.operations.namespaces import open_source

CACHE = "/etc/ld.so.cache"
LIBRARY_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class SelectDevices:
    """Let NVIDIA_VISIBLE_DEVICES and AMD_VISIBLE_DEVICES take away what they want of Slurm's grant.

    The job's variable counts more than the image's, which is known only now.
    """

    selection: Selection
    visible: tuple[tuple[str, str], ...] = ()
    known: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        devices = " ".join(device.qualified for device in self.selection.devices) or "none"
        told = "".join(f", {name}={value}" for name, value in self.visible)
        return f"choose devices: {devices}{told}"

    def execute(self, builder: Builder) -> None:
        image = self._image_variables(builder) if self.selection.gpus else {}
        chosen = choice.narrow(self.selection, image | dict(self.visible))
        builder.devices = chosen.edits()
        builder.results += [("device", device.qualified) for device in chosen.devices]
        builder.results += [("gpu", str(gpu.number)) for gpu in chosen.gpus]
        builder.results += [("device_env", entry) for entry in builder.devices.environment]
        left_out = [
            f"{device.file}: {text}, ignoring"
            for device in (*chosen.devices, *chosen.bare)
            for text in (*device.edits.left_out, *device.shared.left_out)
        ]
        builder.results += [("warning", text) for text in dict.fromkeys((*chosen.notices, *left_out))]

    def _image_variables(self, builder: Builder) -> dict[str, str]:
        """What the image says before it is anybody's root; nothing where a user's process serves it."""
        with builder.as_user():
            if builder.image_is_directory:
                root_fd = open_as_user(builder.image_path, os.O_PATH | os.O_DIRECTORY)
            elif "lower" in builder.fds:
                root_fd = os.dup(builder.fds["lower"])
            else:
                return {}
            try:
                return self._read(builder.texts.get("config", b""), root_fd)
            finally:
                os.close(root_fd)

    def _read(self, config: bytes, root_fd: int) -> dict[str, str]:
        found = facts.read(
            config.decode(errors="surrogateescape"),
            lambda path: rootfs.read_file(root_fd, path),
            lambda path: list_names(root_fd, path),
            dict(self.known),
        )
        return dict(found.variables)


@dataclass(frozen=True, slots=True)
class CloneDevices:
    """Take what the CDI files mount, as CloneSource does, with the rights of the user."""

    def describe(self) -> str:
        return "clone what the devices' files mount"

    def execute(self, builder: Builder) -> None:
        for index, mount in enumerate(builder.devices.mounts):
            attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
            attributes |= MOUNT_ATTR_RDONLY if mount.read_only else 0
            attributes |= MOUNT_ATTR_NOEXEC if mount.no_exec else 0
            try:
                fd = open_source(mount.source)
            except OSError as error:
                raise errors.cdi_mount_failed(mount.file, mount.source, error.errno or 0) from error
            try:
                clone = builder.keep(f"device{index}", linux.clone_tree("", fd))
            finally:
                os.close(fd)
            linux.set_attributes(clone, attributes, propagation=MS_SLAVE, recursive=True)


@dataclass(frozen=True, slots=True)
class AttachDevices:
    """Put the devices' mounts and links where their files say, inside the image."""

    def describe(self) -> str:
        return "attach what the devices' files mount, make their links"

    def execute(self, builder: Builder) -> None:
        for index, mount in enumerate(builder.devices.mounts):
            name = f"device{index}"
            try:
                rootfs.attach(builder.fds["root"], builder.fds[name], mount.target)
            except OSError as error:
                raise errors.image_place_missing(builder.image_path, mount.target, error.errno or 0) from error
            builder.drop(name)
        for link in builder.devices.links:
            _link(builder, link.path, link.destination)


@dataclass(frozen=True, slots=True)
class JoinLibraries:
    """Let the image's dynamic linker find the devices' libraries: what the hook update-ldcache is for."""

    def describe(self) -> str:
        return f"join the devices' libraries to {CACHE}"

    def execute(self, builder: Builder) -> None:
        folders = builder.devices.linker_folders
        found = [entry for mount in builder.devices.mounts for entry in _libraries(builder, mount, folders)]
        if not found:
            return
        data = rootfs.read_file(builder.fds["root"], CACHE)
        try:
            cache = ldcache.parse(data) if data else ldcache.Cache()
        except ldcache.Malformed:
            builder.results.append(("warning", f"{CACHE} of the image can't be read, ignoring"))
            return
        for entry in found:
            folder, file = os.path.split(entry.path)
            if file != entry.name:
                _link(builder, os.fsdecode(os.path.join(folder, entry.name)), os.fsdecode(file))
        if not rootfs.replace_file(builder.fds["root"], CACHE, ldcache.write(ldcache.join(cache, found))):
            builder.results.append(("warning", f"{CACHE} of the image can't be replaced by its user, ignoring"))


def _libraries(builder: Builder, mount: Bind, folders: tuple[str, ...]) -> Iterator[ldcache.Entry]:
    """The shared libraries that a mount brings into one of the folders."""
    root_fd = builder.fds["root"]
    if mount.target in folders:
        fd = rootfs.open_inside(root_fd, mount.target, os.O_RDONLY | os.O_NONBLOCK)
        try:
            names = os.listdir(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else []
        finally:
            os.close(fd)
        paths = [os.path.join(mount.target, name) for name in sorted(names)[:LIBRARY_LIMIT]]
    else:
        paths = [mount.target] if os.path.dirname(mount.target) in folders else []
    for path in paths:
        if ".so" not in os.path.basename(path):
            continue
        try:
            fd = rootfs.open_inside(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            continue
        try:
            yield ldcache.read_entry(_reader(fd), os.fsencode(path))
        except (OSError, ldcache.Malformed):
            continue  # Not a library; or one that the user may not read, and so not load.
        finally:
            os.close(fd)


def _reader(fd: int) -> Callable[[int, int], bytes]:
    """Reads from an open file, as ldcache wants it."""
    return lambda offset, size: os.pread(fd, size, offset)


def _link(builder: Builder, path: str, destination: str) -> None:
    try:
        rootfs.make_link(builder.fds["root"], path, destination)
    except OSError as error:
        text = f"{path} can't be made in the image ({errors.reason(error.errno or 0)}), ignoring"
        builder.results.append(("warning", text))
