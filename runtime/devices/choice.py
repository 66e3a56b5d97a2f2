"""Which devices a step gets: what Slurm granted, what its user names, what the site allows.

The numbers of the granted GPUs are slurmstepd's word, the device files that they mean slurmd's (gres.py). A CDI device
is a GPU of the grant when it has those device files; one that has a file of a GPU that was not granted is never given,
whatever else allows it. NVIDIA_VISIBLE_DEVICES and AMD_VISIBLE_DEVICES can only take away from the grant. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from enclos.runtime import errors
from enclos.runtime.devices import cdi
from enclos.runtime.devices.catalogue import Catalogue
from enclos.runtime.devices.cdi import Device, Edits
from enclos.runtime.environment import is_protected

ALL = "all"
# Variable by which a user or an image narrows the GPUs of a vendor; set in CDI files for other runtimes only.
VISIBLE = {"nvidia.com": "NVIDIA_VISIBLE_DEVICES", "amd.com": "AMD_VISIBLE_DEVICES"}

# The device files of the node's GPUs, by Slurm's number.
GpuFiles = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A granted GPU: Slurm's number for it, the device of a CDI file, and its other names there (UUIDs)."""

    number: int
    device: Device
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step gets.

    Attributes:
        gpus: by Slurm's grant, in its order.
        named: by --container-device.
        bare: devices of which only what their file says for all is wanted (NVIDIA_VISIBLE_DEVICES=none).
        withheld: device files of GPUs that were not granted.
        notices: what the user has to know, one line each.
    """

    gpus: tuple[Gpu, ...] = ()
    named: tuple[Device, ...] = ()
    bare: tuple[Device, ...] = ()
    withheld: frozenset[str] = frozenset()
    notices: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.gpus or self.named or self.bare)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Each device once."""
        chosen = {device.qualified: device for device in (*(gpu.device for gpu in self.gpus), *self.named)}
        return tuple(chosen.values())

    def edits(self) -> Edits:
        """Everything that changes in the container."""
        parts = [part for device in self.devices for part in (device.edits, device.shared)]
        merged = cdi.merge([*parts, *(device.shared for device in self.bare)])
        return replace(
            merged,
            nodes=tuple(node for node in merged.nodes if node.host_path not in self.withheld),
            environment=tuple(entry for entry in merged.environment if _may_set(entry.partition("=")[0])),
        )


def _may_set(name: str) -> bool:
    return name not in VISIBLE.values() and not is_protected(name)


def choose(
    granted: Sequence[int],
    named: Iterable[tuple[str, str]],
    allowed: Sequence[str],
    catalogue: Catalogue,
    files: GpuFiles,
) -> Selection:
    """What a step may get, before any variable narrows it.

    Args:
        granted: Slurm's numbers of the step's GPUs on this node.
        named: (kind, name) of each --container-device; the name may be "all".
        allowed: patterns of devices.allow.
        files: device files by Slurm's number.

    Raises:
        EnclosError: gpu_unknown, cdi_broken, cdi_conflict, device_unknown, device_forbidden, device_not_granted.
    """
    own = {path for number in granted if number < len(files) for path in files[number]}
    withheld = frozenset(path for paths in files for path in paths) - own
    gpus: list[Gpu] = []
    notices: list[str] = []
    for number in granted:
        if number >= len(files):
            raise errors.gpu_unknown(number, len(files))
        gpu = _describing(number, frozenset(files[number]), withheld, catalogue)
        if gpu is None:
            catalogue.complain_of_broken()
            notices.append(f"GPU {number} ({files[number][0]}) is in no CDI file of this node, ignoring")
        else:
            gpus.append(gpu)
    chosen = [device for wish in named for device in _named(*wish, allowed, catalogue, own, withheld)]
    return Selection(tuple(gpus), tuple(chosen), (), withheld, tuple(notices))


def _describing(number: int, files: frozenset[str], withheld: frozenset[str], catalogue: Catalogue) -> Gpu | None:
    """The device that has these device files and the least besides; a UUID is only another name for it."""
    found = [
        device
        for device in catalogue.devices.values()
        if device.name != ALL and files <= device.host_nodes and not device.host_nodes & withheld
    ]
    if not found:
        return None
    found.sort(key=lambda device: (len(device.host_nodes), len(device.name), device.qualified))
    best = catalogue.get(found[0].qualified)
    return Gpu(number, best, tuple(device.name for device in found if device.kind == best.kind))


def _named(
    kind: str, name: str, allowed: Sequence[str], catalogue: Catalogue, own: set[str], withheld: frozenset[str]
) -> list[Device]:
    """The devices of one --container-device.

    "all" is each of the kind that the step may have, never the device that files call so.
    """

    def permitted(device: Device) -> bool:
        granted = bool(device.host_nodes & own)
        return granted or any(fnmatchcase(device.qualified, pattern) for pattern in allowed)

    text = f"{kind}={name}"
    if name == ALL:
        devices = [device for device in catalogue.of_kind(kind) if device.name != ALL]
        found = [device for device in devices if permitted(device) and not device.host_nodes & withheld]
        if not found:
            raise errors.device_forbidden(text)
        return [catalogue.get(device.qualified) for device in found]
    device = catalogue.get(text)
    if device.host_nodes & withheld:
        raise errors.device_not_granted(text)
    if not permitted(device):
        raise errors.device_forbidden(text)
    return [device]


def narrow(selection: Selection, values: Mapping[str, str]) -> Selection:
    """Take GPUs away as the variables of VISIBLE say: of the job where it has them, else of the image.

    "all" and no variable leave the grant; "void" and nothing take all of it; "none" leaves what the file gives all
    devices; a list holds places in the grant (0 is the first), names and UUIDs.
    """
    kept: list[Gpu] = []
    bare = list(selection.bare)
    notices = list(selection.notices)
    for vendor, variable in VISIBLE.items():
        own = [gpu for gpu in selection.gpus if gpu.device.kind.partition("/")[0] == vendor]
        if not own or variable not in values:
            kept += own
            continue
        value = values[variable].strip()
        if value == "none":
            bare += [gpu.device for gpu in own]
        elif value not in ("", "void"):
            visible, unknown = _visible(own, value)
            kept += visible
            notices += [f"{variable}: {entry} is not among the step's GPUs, ignoring" for entry in unknown]
    kept += [gpu for gpu in selection.gpus if gpu.device.kind.partition("/")[0] not in VISIBLE]
    order = {gpu.number: index for index, gpu in enumerate(selection.gpus)}
    kept.sort(key=lambda gpu: order[gpu.number])
    return replace(selection, gpus=tuple(kept), bare=tuple(bare), notices=tuple(notices))


def _visible(own: list[Gpu], value: str) -> tuple[list[Gpu], list[str]]:
    found: list[Gpu] = []
    unknown: list[str] = []
    for entry in (entry.strip() for entry in value.split(",")):
        if entry == ALL:
            matches = own
        elif entry.isascii() and entry.isdigit():
            matches = own[int(entry) : int(entry) + 1] if len(entry) < 6 else []
        else:
            matches = [gpu for gpu in own if entry in gpu.names]
        found += [gpu for gpu in matches if gpu not in found]
        if entry and not matches:
            unknown.append(entry[:64])
    return [gpu for gpu in own if gpu in found], unknown


def renumber(granted: Sequence[int], numbers: Sequence[int], kept: Sequence[int]) -> dict[int, int]:
    """What a number in CUDA_VISIBLE_DEVICES and the like has to become inside, where other GPUs are not there.

    A program counts the GPUs that it finds. Slurm writes places in the step's grant where the device cgroup hides the
    others (ConstrainDevices), else numbers of the node.

    Args:
        granted: Slurm's numbers of the step's GPUs.
        numbers: what Slurm wrote for them into the step's CUDA_VISIBLE_DEVICES.
        kept: those of `granted` that the container has, in its order.

    Returns:
        Places in the container by number; a GPU that it lacks is left out. Empty where nothing has to change.
    """
    if len(numbers) != len(granted):
        return {}
    places = {number: kept.index(own) for number, own in zip(numbers, granted, strict=True) if own in kept}
    unchanged = len(places) == len(numbers) and all(number == place for number, place in places.items())
    return {} if unchanged else places
