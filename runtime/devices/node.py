"""The devices of this node, for the steps that ask for some: CDI files, Slurm's list of GPUs, RDMA, the site's word.

Brings together what is read (registry.py, gres.py) and what is decided (choice.py). Runs in the agent; a step that has
no GPU and names no device costs nothing here.
"""

from __future__ import annotations

from dataclasses import replace

from enclos.netns import rdma as node_rdma
from enclos.runtime.devices import choice, rdma
from enclos.runtime.devices.choice import Selection
from enclos.runtime.devices.gres import GpuList, slurmd_path
from enclos.runtime.devices.registry import Registry
from enclos.runtime.request import StepRequest
from enclos.runtime.settings import Config


class NodeDevices:
    """What a step may have of the node's devices."""

    def __init__(self, node: str, config: Config) -> None:
        self._settings = settings = config.devices
        self._rdma = config.rdma
        self._registry = Registry(settings.cdi)
        self._gpus = GpuList(node, settings.gpus)

    async def select(self, request: StepRequest, network: str) -> Selection:
        """The devices of a step, before a variable of its image narrows them.

        Args:
            network: the kind of network that the step gets.

        Raises:
            EnclosError: see choice.choose and rdma.choose; gpus_not_listed.
        """
        selection = await self._select_cdi(request)
        text = rdma.wanted(request.rdma, self._rdma.default, network)
        if not text:
            return selection
        found = rdma.choose(text, bool(request.rdma), network, self._rdma.devices, node_rdma.find())
        return replace(selection, named=(*selection.named, *found))

    async def _select_cdi(self, request: StepRequest) -> Selection:
        if not request.gpus and not request.devices:
            return Selection()
        catalogue = self._registry.catalogue()
        if not request.devices and not catalogue.devices and not catalogue.broken:
            # Where the site lists the nodes by itself, that is what it wants.
            told = () if self._settings.nodes else ("this node has no CDI files: no GPU in the container, ignoring",)
            return Selection(notices=told)
        # A machine without Slurm has no GPU that Slurm manages.
        managed = request.gpus or self._settings.gpus or slurmd_path(request.stepd)
        files = await self._gpus.files(request.slurm_conf, request.stepd) if managed else ()
        return choice.choose(request.gpus, request.devices, self._settings.allow, catalogue, files)
