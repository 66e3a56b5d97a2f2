"""The devices of this node, for the steps that ask for some: CDI files, Slurm's list of GPUs, the site's word.

Brings together what is read (registry.py, gres.py) and what is decided (choice.py). Runs in the agent; a step that has
no GPU and names no device costs nothing here.
"""

from __future__ import annotations

from enclos.runtime.devices import choice
from enclos.runtime.devices.choice import Selection
from enclos.runtime.devices.gres import GpuList, slurmd_path
from enclos.runtime.devices.registry import Registry
from enclos.runtime.request import StepRequest
from enclos.runtime.settings import Devices


class NodeDevices:
    """What a step may have of the node's devices."""

    def __init__(self, node: str, settings: Devices) -> None:
        self._settings = settings
        self._registry = Registry(settings.cdi)
        self._gpus = GpuList(node, settings.gpus)

    async def select(self, request: StepRequest) -> Selection:
        """The devices of a step, before a variable of its image narrows them.

        Raises:
            EnclosError: see choice.choose; gpus_not_listed.
        """
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
