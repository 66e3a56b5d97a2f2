"""The cluster that a benchmark runs on: of its own, with a small image, and gone afterwards whatever happens.

Runs as root. What is timed happens inside the cluster: see stopwatch.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from enclos.runtime.cluster.cluster import Cluster

PROGRAM_SOURCE = "int main(void)\n{\n\treturn 0;\n}\n"
BARE_PROGRAM = "/shared/nothing"
IMAGE = "/images/nothing.sqsh"
IMAGE_PROGRAM = "/bin/nothing"
CONTAINER = (f"--container-image={IMAGE}",)
USER = "usera"


@contextmanager
def trial(name: str, nodes: int, cpus: int = 8) -> Iterator[Cluster]:
    """A fresh cluster; one of the same name that an earlier run left is removed first."""
    previous = signal.signal(signal.SIGTERM, _stop)
    Cluster.remove(name)
    try:
        cluster = Cluster.up(name, nodes, cpus)
        make_image(cluster)
        yield cluster
    finally:
        Cluster.remove(name)
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, _frame: FrameType | None) -> None:
    """A benchmark that is told to end takes its cluster down, too."""
    sys.exit(128 + number)


def make_image(cluster: Cluster) -> None:
    """The same static program that does nothing, outside (BARE_PROGRAM) and as an image (IMAGE).

    Nothing else is in the image: what a program loads is not what a container adds.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        for directory in ("bin", "etc", "dev", "proc", "sys", "tmp"):
            (root / directory).mkdir(parents=True)
        source = Path(folder) / "nothing.c"
        source.write_text(PROGRAM_SOURCE)
        program = root / IMAGE_PROGRAM.lstrip("/")
        subprocess.run(["cc", "-O2", "-static", "-o", program, source], check=True)
        outside = cluster.layout.shared / Path(BARE_PROGRAM).name
        outside.write_bytes(program.read_bytes())
        outside.chmod(0o755)
        squash = ["mksquashfs", str(root), str(cluster.layout.images / Path(IMAGE).name)]
        squash += ["-noappend", "-all-root", "-quiet", "-no-progress"]
        subprocess.run(squash, check=True, stdout=subprocess.DEVNULL)
