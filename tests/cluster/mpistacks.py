"""MPI programs over RDMA: an image with Debian's own stacks for it, from this machine's files, and how each is started.

A stack is an MPI library with what it sends by. The trial image has neither UCX nor libfabric; here they come on top.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster import image
from vm.verbs import LIBRARIES, LOADED, add_driver

IMAGE = "/images/mpi-rdma"
COMPONENTS = ("mtl_ofi", "pml_cm", "pml_ucx")
ROUNDS, SIZE = 10, 200000
# The program sends that much from each of two ranks, whatever else it says.
LEAST_BYTES = ROUNDS * SIZE


@dataclass(frozen=True, slots=True)
class Stack:
    """How srun starts it, what it needs, and what it says by itself when it sends over an RDMA device."""

    launcher: str
    program: str
    variables: dict[str, str]
    says: str

    def command(self) -> list[str]:
        """The program's words for a container's `env`."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return ["env", *variables, self.program, "--rounds", str(ROUNDS), "--size", str(SIZE)]

    def went_over(self, shown: str, devices: list[str]) -> bool:
        """Whether each rank says that it sends over its device."""
        return all(re.search(self.says.format(device=device), shown) for device in devices)


# What has to be set and why: docs/user-guide.md.
UCX = {"UCX_LOG_LEVEL": "info"}
UCX_SAYS = r"ep_cfg\[\d+\]: tag\([^)]*\brc_verbs/{device}:1"
OFI = {"OMPI_MCA_pml": "cm", "OMPI_MCA_mtl": "ofi", "OMPI_MCA_mtl_base_verbose": "1", "FI_UNIVERSE_SIZE": "64"}
STACKS = {
    "mpich-ucx": Stack("pmi2", "ring-mpich", UCX, UCX_SAYS),
    "openmpi-ucx": Stack("pmix", "ring", UCX | {"OMPI_MCA_pml": "ucx"}, UCX_SAYS),
    "openmpi-libfabric": Stack("pmix", "ring", OFI, r"mtl:ofi:provider: {device}\b"),
}


def is_right(shown: str) -> bool:
    """Whether two ranks met, and all that came was what had been sent."""
    return re.search(r"^ring of 2: .* all data right$", shown, re.MULTILINE) is not None


def make_image(images: Path) -> None:
    """A directory of both libraries' programs with what they open by name, and the device's driver."""
    root = images / Path(IMAGE).name
    subprocess.run(["cp", "-a", str(image.make("openmpi").directory), str(root)], check=True)
    shutil.copy(image.make("mpich").directory / "usr/bin/ring", root / "usr/bin/ring-mpich")
    components = [LIBRARIES / f"openmpi/lib/openmpi3/mca_{name}.so" for name in COMPONENTS]
    opened = [*components, LIBRARIES / "ucx/libuct_ib.so.0", *(LIBRARIES / name for name in LOADED)]
    libraries = image.libraries(root / "usr/bin/ring-mpich")
    for path in opened:
        libraries += image.libraries(path)
    add_driver(root, [*opened, *libraries])
