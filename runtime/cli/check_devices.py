"""`enclos check`, the part about devices: CDI files, Slurm's GPUs, the nodes that the site lists.

Runs as whoever types the command.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from enclos.netns import rdma
from enclos.netns.facts import KernelRefused
from enclos.runtime.cli.finding import Finding, mend, note, ok
from enclos.runtime.devices import choice, gres, registry
from enclos.runtime.devices.catalogue import Catalogue
from enclos.runtime.errors import EnclosError
from enclos.runtime.settings import Config

GENERATE = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml; amd-ctk cdi generate --output=/etc/cdi/amd.json"


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
    patterns = settings.rdma.devices
    try:
        found = rdma.find()
    except KernelRefused as error:
        yield mend("RDMA", str(error), "look at 'rdma dev'")
        return
    if not found.mode:
        if patterns:
            yield mend("RDMA", "rdma.devices is set, but the kernel has no RDMA", "load the driver: modprobe ib_core")
        return
    listed = [d for d in found.devices if any(fnmatchcase(d.name, pattern) for pattern in patterns)]
    for device in listed:
        if not device.node:
            yield mend("RDMA", f"{device.name} has no uverbs node", "modprobe ib_uverbs")
    names = ", ".join(f"{d.name} ({'active' if d.active else 'not active'})" for d in listed) or "none"
    yield ok("RDMA", f"mode {found.mode}; for containers: {names}")
    if found.mode == "shared" and listed:
        yield note(
            "RDMA",
            "the kernel shares devices among network namespaces: only device nodes keep jobs apart",
            "mode exclusive is set at boot (ib_core netns_mode=0), while there is no other network namespace",
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
