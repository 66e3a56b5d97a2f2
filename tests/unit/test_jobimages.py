"""What a job's script and command line name as images."""

from __future__ import annotations

import pytest
from enclos.runtime.cli import jobimages


@pytest.mark.parametrize(("script", "found"), [
    ("#!/bin/sh\n#SBATCH --container-image=docker://r:1/a:1 # ours\necho", ["docker://r:1/a:1"]),
    ("#SBATCH -N2 --container-image 'r.site#a:1'\n", ["r.site#a:1"]),
    ("## SBATCH --container-image=a:1\n# srun --container-image=b:1\n", []),
    ("time srun -n2 \\\n  --container-image=a:1 \\\n  ./a.out\n", ["a:1"]),
    ("if true; then srun --container-image=a:1; fi\n", ["a:1"]),
    ("X=$(srun --container-image=a:1)\n", ["a:1"]),
    ("srun --container-image=a#b:1 x # --container-image=c:1\n", ["a#b:1"]),
    ("IMAGE=docker://r:1/a\nexport TAG='2'\nsrun --container-image=${IMAGE}:$TAG\n", ["docker://r:1/a:2"]),
    ('srun --container-image="$1" x; srun --container-image=$IMAGE y\n', ["$1", "$IMAGE"]),
    ("export ENCLOS_CONTAINER_IMAGE=a:1\nsrun ./a.out\n", ["a:1"]),
    ("PYXIS_CONTAINER_IMAGE=a:1 srun ./a.out\n", ["a:1"]),
    ("srun --container=a:1 x\nsrun --container-name=a:1 y\n", ["a:1"]),
    ("echo 'open\nsrun --container-image=a:1 x\n", ["a:1"]),
    ("srun --container-image=\nsrun --container-image", []),
    ("cat <<E\n\x00\xff\nE\n", []),
    ("", []),
])  # fmt: skip
def test_images_of_a_script(script: str, found: list[str]) -> None:
    assert jobimages.of_script(script) == found


@pytest.mark.parametrize(("line", "found"), [
    ("sbatch --container-image=r:1/a:1 --job-name a 'b c job.sh", ["r:1/a:1"]),
    ("sbatch --container-image a#b:1 job.sh", ["a#b:1"]),
    ("sbatch job.sh", []),
])  # fmt: skip
def test_images_of_a_command_line(line: str, found: list[str]) -> None:
    """Slurm joins the words of 26.05 without quotes."""
    assert jobimages.of_command_line(line) == found
