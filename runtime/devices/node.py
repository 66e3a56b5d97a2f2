"""The devices of this node, for the steps that ask for some: CDI files, Slurm's list of GPUs, RDMA, the site's word.

Brings together what is read (registry.py, gres.py) and what is decided (choice.py). Runs in the agent; a step that has
no GPU and names no device costs nothing here.
"""

from __future__ import annotations

from dataclasses import replace

from enclos.netns import rdma as node_rdma
from enclos.runtime.devices import choice, rdma
from enclos.runtime.devices.choice import Selection
from enclos.runtime.devices.gres import Files, GpuList, slurmd_path
from enclos.runtime.devices.holdings import Asker, Holdings, choose_staying
from enclos.runtime.devices.registry import Registry
from enclos.runtime.request import StepRequest
from enclos.runtime.settings import Config


class NodeDevices:
    """What a step may have of the node's devices."""

    def __init__(self, node: str, config: Config, holdings: Holdings | None = None) -> None:
        self._settings = settings = config.devices
        self._rdma = config.rdma
        self._holdings = holdings
        self._registry = Registry(settings.cdi)
        self._gpus = GpuList(node, settings.gpus)

    @property
    def holdings(self) -> Holdings:
        """Which step has which RDMA device: the agent's."""
        assert self._holdings is not None
        return self._holdings

    async def select(self, request: StepRequest, asker: Asker) -> Selection:
        """The devices of a step, before a variable of its image narrows them.

        Raises:
            EnclosError: see choice.choose and Holdings.take; gpus_not_listed.
        """
        selection = await self._select_cdi(request)
        text = rdma.wanted(request.rdma, self._rdma.default, asker.network, self._rdma.mode)
        if not text:
            return selection
        found = await self.holdings.take(text, bool(request.rdma), asker)
        return replace(selection, named=(*selection.named, *found))

    @property
    def gpu_files(self) -> Files | None:
        """Device files by Slurm's number; None before the first step with GPUs."""
        return self._gpus.known

    async def preview(self, request: StepRequest, network: str, gpu_files: Files | None = None) -> Selection:
        """The same, without moving or making an RDMA device: what comes into a job's network is left out.

        Args:
            gpu_files: what the agent knows; None to ask Slurm.
        """
        selection = await self._select_cdi(request, gpu_files)
        text = rdma.wanted(request.rdma, self._rdma.default, network, self._rdma.mode)
        if not text or network == "job":
            return selection
        rdma.check(text, network, self._rdma.mode, node_rdma.mode())
        found = choose_staying(text, bool(request.rdma), self._rdma)
        return replace(selection, named=(*selection.named, *found))

    async def _select_cdi(self, request: StepRequest, files: Files | None = None) -> Selection:
        if not request.gpus and not request.devices:
            return Selection()
        catalogue = self._registry.catalogue()
        if not request.devices and not catalogue.devices and not catalogue.broken:
            # Where the site lists the nodes by itself, that is what it wants.
            told = () if self._settings.nodes else ("this node has no CDI files: no GPU in the container, ignoring",)
            return Selection(notices=told)
        # A machine without Slurm has no GPU that Slurm manages.
        managed = request.gpus or self._settings.gpus or slurmd_path(request.stepd)
        if files is None:
            files = await self._gpus.files(request.slurm_conf, request.stepd) if managed else ()
        return choice.choose(request.gpus, request.devices, self._settings.allow, catalogue, files)
