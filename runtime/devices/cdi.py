"""One CDI file (Container Device Interface 0.3 to 1.1), checked: devices, and what each edits in a container.

Takes what json or yaml made of the file; says what is wrong by the place in it. What such a file may ask for and a
container never gets is kept as words (`Edits.left_out`), so that the user is told. Pure: no file is opened here.
Source: the CDI specification; hooks as `nvidia-ctk cdi generate` and `amd-ctk cdi generate` write them.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
DEVICE_LIMIT = 4096
EDIT_LIMIT = 4096

_VENDOR = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,250}[A-Za-z0-9]|[A-Za-z]")
_CLASS = re.compile(r"[A-Za-z]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,253}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", re.DOTALL)
_RELEASE = re.compile(r"([0-9]+)\.([0-9]+)\.[0-9]+")

# Hooks that need nothing here: /dev and its folders may be searched by everybody; nobody can make a device node in a
# user namespace.
NEEDLESS_HOOKS = frozenset({"chmod", "disable-device-node-modification"})
# What a mount may say besides. All are made in one way: with what lies below, nosuid, nodev, later mounts appear.
NEEDLESS_OPTIONS = frozenset(
    {"bind", "rbind", "nosuid", "nodev", "rw", "exec", "private", "rprivate", "slave", "rslave", "shared", "rshared"}
)


class BrokenFile(Exception):
    """A file that is no valid CDI; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Node:
    """A device node: its path in the container, the host's node that it copies, and the CDI file that says so.

    An optional one is left out where the host has none.
    """

    path: str
    host_path: str
    file: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host that appears in the container; `file` is the CDI file that says so."""

    source: str
    target: str
    read_only: bool
    no_exec: bool
    file: str


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link to be made in the container."""

    path: str
    destination: str


@dataclass(frozen=True, slots=True)
class Edits:
    """What changes in a container.

    Attributes:
        environment: NAME=VALUE.
        linker_folders: directories of the container that the dynamic linker has to find libraries in.
        left_out: what the file asks for besides, in words.
    """

    environment: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    mounts: tuple[Bind, ...] = ()
    links: tuple[Link, ...] = ()
    linker_folders: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its qualified name, with its own edits and those that all devices of its file share."""

    kind: str
    name: str
    edits: Edits
    shared: Edits
    file: str

    @property
    def qualified(self) -> str:
        return f"{self.kind}={self.name}"

    @property
    def host_nodes(self) -> frozenset[str]:
        """The host's device nodes that are this device's own."""
        return frozenset(node.host_path for node in self.edits.nodes)


def is_kind(text: str) -> bool:
    """VENDOR/CLASS."""
    vendor, slash, name = text.partition("/")
    return bool(slash and _VENDOR.fullmatch(vendor) and _CLASS.fullmatch(name))


def is_name(text: str) -> bool:
    """The name of a device, without its kind."""
    return _NAME.fullmatch(text) is not None


def parse(document: object, file: str) -> tuple[Device, ...]:
    """The devices of one file.

    Args:
        document: the file as json or yaml read it.
        file: its path, for `Device.file`.

    Raises:
        BrokenFile: with the place and what was expected there.
    """
    top = _object(document, "the file", {"cdiVersion", "kind", "annotations", "devices", "containerEdits"})
    _check_version(top.get("cdiVersion"))
    kind = top.get("kind")
    if not isinstance(kind, str) or not is_kind(kind):
        raise BrokenFile("kind: expected VENDOR/CLASS, such as nvidia.com/gpu")
    shared = _edits(top.get("containerEdits"), "containerEdits", file)
    found: dict[str, Device] = {}
    for index, entry in enumerate(_list(top.get("devices"), "devices", DEVICE_LIMIT)):
        place = f"devices[{index}]"
        fields = _object(entry, place, {"name", "annotations", "containerEdits"})
        name = fields.get("name")
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)  # YAML reads a bare 0 as a number.
        if not isinstance(name, str) or not is_name(name):
            raise BrokenFile(f"{place}.name: expected letters, digits, . _ - and :")
        if name in found:
            raise BrokenFile(f"{place}.name: {name} is there twice")
        own = _edits(fields.get("containerEdits"), f"{place}.containerEdits", file)
        found[name] = Device(kind, name, own, shared, file)
    if not found:
        raise BrokenFile("devices: expected at least one")
    return tuple(found.values())


def merge(parts: Iterable[Edits]) -> Edits:
    """All edits as one: of nodes and mounts at the same place the first counts, of variables the last."""
    variables: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    mounts: dict[str, Bind] = {}
    links: dict[str, Link] = {}
    folders: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for edits in parts:
        variables |= {entry.partition("=")[0]: entry for entry in edits.environment}
        nodes |= {node.path: node for node in edits.nodes if node.path not in nodes}
        mounts |= {mount.target: mount for mount in edits.mounts if mount.target not in mounts}
        links |= {link.path: link for link in edits.links if link.path not in links}
        folders |= dict.fromkeys(edits.linker_folders)
        left_out |= dict.fromkeys(edits.left_out)
    return Edits(
        environment=tuple(variables.values()),
        nodes=tuple(nodes.values()),
        mounts=tuple(mounts.values()),
        links=tuple(links.values()),
        linker_folders=tuple(folders),
        left_out=tuple(left_out),
    )


# ---------------------------------------------------------------- the parts of a file


def _check_version(version: object) -> None:
    """A patch release changes nothing of the format."""
    match = _RELEASE.fullmatch(version.removeprefix("v")) if isinstance(version, str) else None
    if match is None:
        raise BrokenFile("cdiVersion: expected a version such as 0.6.0")
    if f"{match[1]}.{match[2]}.0" not in VERSIONS:
        raise BrokenFile(f"cdiVersion: {version} is not known (known: {VERSIONS[0]} to {VERSIONS[-1]})")


def _edits(value: object, place: str, file: str) -> Edits:
    if value is None:
        return Edits()
    known = {"env", "deviceNodes", "mounts", "hooks", "intelRdt", "additionalGids", "additionalGIDs", "netDevices"}
    fields = _object(value, place, known)
    links: list[Link] = []
    folders: list[str] = []
    left_out = [_NOT_DONE[name] for name in fields if name in _NOT_DONE and fields[name]]
    for index, entry in enumerate(_list(fields.get("hooks"), f"{place}.hooks")):
        _read_hook(entry, f"{place}.hooks[{index}]", links, folders, left_out)
    return Edits(
        environment=tuple(_environment(fields.get("env"), f"{place}.env")),
        nodes=tuple(_nodes(fields.get("deviceNodes"), f"{place}.deviceNodes", file)),
        mounts=tuple(_mounts(fields.get("mounts"), f"{place}.mounts", file)),
        links=tuple(links),
        linker_folders=tuple(folders),
        left_out=tuple(left_out),
    )


_NOT_DONE = {
    "intelRdt": "cache and memory bandwidth classes (intelRdt) are Slurm's",
    "additionalGids": "additional groups (additionalGids) are not given",
    "additionalGIDs": "additional groups (additionalGids) are not given",
    "netDevices": "network interfaces (netDevices) are not moved",
}


def _environment(value: object, place: str) -> Iterable[str]:
    for index, entry in enumerate(_list(value, place)):
        if not isinstance(entry, str) or _VARIABLE.fullmatch(entry) is None:
            raise BrokenFile(f"{place}[{index}]: expected NAME=VALUE")
        yield entry


def _nodes(value: object, place: str, file: str) -> Iterable[Node]:
    known = {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"}
    for index, entry in enumerate(_list(value, place)):
        here = f"{place}[{index}]"
        fields = _object(entry, here, known)
        path = _path(fields.get("path"), f"{here}.path")
        if not path.startswith("/dev/"):
            raise BrokenFile(f"{here}.path: expected a path below /dev")
        host = fields.get("hostPath")
        yield Node(path, _path(host, f"{here}.hostPath") if host else path, file)


def _mounts(value: object, place: str, file: str) -> Iterable[Bind]:
    for index, entry in enumerate(_list(value, place)):
        here = f"{place}[{index}]"
        fields = _object(entry, here, {"hostPath", "containerPath", "type", "options"})
        options = _list(fields.get("options"), f"{here}.options")
        kind = fields.get("type") or "none"
        if kind not in ("none", "bind") and not {"bind", "rbind"} & {str(option) for option in options}:
            raise BrokenFile(f"{here}.type: {str(kind)[:32]}: only bind mounts are made")
        for option in options:
            if option not in NEEDLESS_OPTIONS | {"ro", "noexec"}:
                raise BrokenFile(f"{here}.options: {str(option)[:32]} is not known")
        source = _path(fields.get("hostPath"), f"{here}.hostPath")
        target = _path(fields.get("containerPath"), f"{here}.containerPath")
        if target == "/" or target.startswith(("/proc/", "/dev/")) or target in ("/proc", "/dev", "/sys"):
            raise BrokenFile(f"{here}.containerPath: {target[:64]}: nothing is mounted there")
        yield Bind(source, target, "ro" in options, "noexec" in options, file)


def _read_hook(entry: object, place: str, links: list[Link], folders: list[str], left_out: list[str]) -> None:
    """What hooks of nvidia-ctk and amd-ctk do is done without running them; other programs are never run."""
    fields = _object(entry, place, {"hookName", "path", "args", "env", "timeout"})
    program = _path(fields.get("path"), f"{place}.path")
    arguments = [str(argument) for argument in _list(fields.get("args"), f"{place}.args")]
    words = [word for word in arguments[1:] if word != "hook"]
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb == "update-ldcache":
        folders += [_path(folder, f"{place}.args") for folder in _values(words, "--folder")]
    elif verb == "create-symlinks":
        for text in _values(words, "--link"):
            destination, separator, path = text.partition("::")
            if not separator or not destination:
                raise BrokenFile(f"{place}.args: expected --link DESTINATION::PATH")
            links.append(Link(_path(path, f"{place}.args"), destination))
    elif verb not in NEEDLESS_HOOKS:
        left_out.append(f"its hook {os.path.basename(program)}{f' {verb}' if verb else ''} is not run")


def _values(words: list[str], option: str) -> list[str]:
    """Values of an option that may repeat, as `--option VALUE` or `--option=VALUE`."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return found + [value for word, value in pairwise(words) if word == option]


# ---------------------------------------------------------------- forms


def _object(value: object, place: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BrokenFile(f"{place}: expected fields and values")
    for name in value:
        if name not in known:
            raise BrokenFile(f"{place}: unknown field {str(name)[:64]}")
    return value


def _list(value: object, place: str, limit: int = EDIT_LIMIT) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BrokenFile(f"{place}: expected a list")
    if len(value) > limit:
        raise BrokenFile(f"{place}: more than {limit} entries")
    return value


def _path(value: object, place: str) -> str:
    """An absolute path without `..`, in its shortest form."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in value.split("/"):
        raise BrokenFile(f"{place}: expected an absolute path without ..")
    return os.path.normpath("/" + value.lstrip("/"))
