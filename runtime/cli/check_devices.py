"""`enclos check`, the part about devices: CDI files, Slurm's GPUs, the nodes that the site lists.

Runs as whoever types the command.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from enclos.netns import rdma
from enclos.netns.facts import KernelRefused
from enclos.runtime.cli.finding import Finding, mend, note, ok
from enclos.runtime.devices import choice, gres, registry, vfs
from enclos.runtime.devices.catalogue import Catalogue
from enclos.runtime.errors import EnclosError
from enclos.runtime.settings import Config

GENERATE = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml; amd-ctk cdi generate --output=/etc/cdi/amd.json"


EXCLUSIVE = (
    "options ib_core netns_mode=0 in /etc/modprobe.d (and the initramfs), then boot: the mode can only change while "
    "no other network namespace exists"
)
UDEV = "/run/udev/control"
RULE = "60-enclos.rules"
RULE_FOLDERS = tuple(f"{place}/udev/rules.d" for place in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"))
LOAD_SOFT = "modprobe -a rdma_rxe ib_uverbs rdma_ucm, at boot by /etc/modules-load.d"


def findings(settings: Config, node: str) -> Iterator[Finding]:
    """All findings about devices; none where the node has nothing of the kind."""
    yield from listed_findings(settings)
    catalogue = registry.read(settings.devices.cdi)
    yield from file_findings(catalogue)
    yield from gpu_findings(settings, node, catalogue)
    yield from rdma_findings(settings)


def listed_findings(settings: Config) -> Iterator[Finding]:
    """devices.nodes exist here."""
    missing = [path for path in settings.devices.nodes if not Path(path).exists()]
    if missing:
        yield mend(
            "devices.nodes",
            f"missing: {', '.join(missing)}",
            "load the driver, or remove it from enclos.yaml",
        )
    bad = [path for path in settings.devices.nodes if re.match(r"/dev/(mem|kmem|port|sd|nvme|vd|loop)", path)]
    if bad:
        yield note(
            "devices.nodes", f"{', '.join(bad)} in every container", "owner and mode of the node still apply"
        )


def file_findings(catalogue: Catalogue) -> Iterator[Finding]:
    """Each CDI file can be read, and names nodes that are there."""
    for file, detail in catalogue.broken.items():
        yield mend("CDI file", f"{file}: {detail}", "mend it, generate it anew, or remove it")
    for device, files in catalogue.twice.items():
        yield mend("CDI file", f"{device} is in {files[0]} and in {files[1]}", "remove one of the files")
    kinds = Counter((device.file, device.kind) for device in catalogue.devices.values())
    for (file, kind), count in kinds.items():
        own = [device for device in catalogue.devices.values() if (device.file, device.kind) == (file, kind)]
        nodes = {node.host_path for device in own for node in (*device.edits.nodes, *device.shared.nodes)}
        sources = {mount.source for device in own for mount in (*device.edits.mounts, *device.shared.mounts)}
        missing = sorted(path for path in nodes | sources if not Path(path).exists())
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            yield mend("CDI file", f"{file} names what is not there: {shown}", "load the driver, or generate it anew")
        else:
            yield ok("CDI file", f"{file}: {count} of {kind}")
        told = {text for device in own for text in (*device.edits.left_out, *device.shared.left_out)}
        for text in sorted(told):
            yield note("CDI file", f"{file}: {text}", "what else these devices need has to be there without it")


def rdma_findings(settings: Config) -> Iterator[Finding]:
    """What the node has of rdma.devices; none where neither site nor node knows of RDMA."""
    pooled = [function.name for function in vfs.find(settings.rdma.pools)] if settings.rdma.pools else []
    patterns = (*settings.rdma.devices, *pooled)
    if settings.rdma.pools and not pooled:
        yield mend("RDMA", "rdma.pools is set, but there are no virtual functions", "write sriov_numvfs of the devices")
    try:
        found = rdma.find()
    except KernelRefused as error:
        yield mend("RDMA", str(error), "look at 'rdma dev'")
        return
    if not found.mode:
        if patterns:
            yield mend("RDMA", "rdma.devices is set, but the kernel has no RDMA", "load the driver: modprobe ib_core")
        elif settings.rdma.mode == "soft":
            yield mend("RDMA", "rdma.mode is soft, but the kernel has no RDMA", LOAD_SOFT)
        return
    listed = [d for d in found.devices if any(fnmatchcase(d.name, pattern) for pattern in patterns)]
    for device in listed:
        if not device.node:
            yield mend("RDMA", f"{device.name} has no uverbs node", "modprobe ib_uverbs")
    names = ", ".join(f"{d.name} ({'active' if d.active else 'not active'})" for d in listed) or "none"
    yield ok("RDMA", f"mode {found.mode}; for containers: {names}")
    yield from _mode_findings(settings, found.mode, bool(listed))
    nodes = [path for path in settings.devices.nodes if path.startswith(f"{rdma.FOLDER}/")]
    if nodes and "job" in settings.step.networks:
        yield mend("RDMA", f"devices.nodes gives {nodes[0]} to each container, on every network", "use rdma.devices")


def _mode_findings(settings: Config, mode: str, listed: bool) -> Iterator[Finding]:
    """Whether the kernel's mode can give what rdma.mode promises."""
    wanted = settings.rdma.mode
    if wanted == "exclusive" and mode == "shared" and listed:
        yield note(
            "RDMA",
            "job networks are refused RDMA: isolation needs namespace mode exclusive, found shared",
            f"{EXCLUSIVE}; or set rdma.mode to what the kernel can give",
        )
    elif wanted != "exclusive" and mode == "exclusive":
        yield mend(
            "RDMA",
            f"rdma.mode {wanted} needs namespace mode shared, found exclusive",
            "set rdma.mode to exclusive, or boot with ib_core netns_mode=1",
        )
    elif wanted == "shared" and listed:
        yield note(
            "RDMA",
            "the kernel shares devices among network namespaces: only device nodes keep jobs apart",
            f"{EXCLUSIVE}, and rdma.mode to exclusive",
        )
    elif wanted == "soft" and not os.path.isdir("/sys/module/rdma_rxe"):
        yield mend("RDMA", "rdma.mode is soft, but rdma_rxe is not loaded", LOAD_SOFT)
    if wanted == "soft":
        yield from udev_findings()


def udev_findings() -> Iterator[Finding]:
    """Whether udev, where there is one, has the rule that keeps nodes of Soft-RoCE devices their users'."""
    if os.path.exists(UDEV) and not any(os.path.exists(f"{folder}/{RULE}") for folder in RULE_FOLDERS):
        yield mend(
            "RDMA",
            f"udev opens jobs' Soft-RoCE devices to all users: {RULE} is missing",
            "copy it to /etc/udev/rules.d",
        )


def gpu_findings(settings: Config, node: str, catalogue: Catalogue) -> Iterator[Finding]:
    """Each GPU that Slurm may grant is in a CDI file."""
    listed = settings.devices.gpus
    if not listed and not gres.slurmd_path():
        return
    try:
        files = gres.configured(listed) if listed else asyncio.run(gres.ask(node))
    except EnclosError as error:
        yield note("GPUs", error.line(), "needed only where Slurm grants GPUs")
        return
    without = []
    for number, paths in enumerate(files):
        try:
            described = choice.choose([number], (), (), Catalogue(catalogue.devices), files)
        except EnclosError:
            described = choice.Selection()
        if not described.gpus:
            without.append(f"{number} ({paths[0] if paths else 'no device file'})")
    if without and not settings.devices.nodes:
        yield mend("GPUs", f"in no CDI file: {', '.join(without)}", GENERATE)
    elif files:
        yield ok("GPUs", f"{len(files) - len(without)} of Slurm's {len(files)} are in CDI files")
