"""What a job's script and command line name as images."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from enclos.runtime.cli import jobimages

PROFILES = defaultdict(str, torch="torch:1")


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
    ("#SBATCH --container-profile=torch # ours\n", ["torch:1"]),
    ("#SBATCH --container-profile torch\n#SBATCH -N2\n#SBATCH --container-image=a:1\nsrun x\n", ["a:1"]),
    ("#SBATCH --container-image=a:1\nsrun --container-profile=torch x\n", ["a:1", "torch:1"]),
    ("srun --container-profile=torch --container-image=a:1 x\n", ["a:1"]),
    ("srun --container-image=a:1 x; srun '' --container-profile=torch y && z\n", ["a:1", "torch:1"]),
    ("srun 2>&1 x --container-image=a:1 --container-profile=torch\n", ["a:1"]),
    ("(srun --container-profile=torch x) | srun --container-image=a:1 y\n", ["torch:1", "a:1"]),
    ("P=torch\nsrun --container-profile=$P x\nsrun --container-profile=$1 y\n", ["torch:1"]),
    ("export ENCLOS_CONTAINER_PROFILE=torch\nsrun x\n", ["torch:1"]),
    ("srun --container-profile=none x\n", []),
])  # fmt: skip
def test_images_of_a_script(script: str, found: list[str]) -> None:
    assert jobimages.of_script(script, PROFILES.__getitem__) == found


@pytest.mark.parametrize(("line", "found"), [
    ("sbatch --container-image=r:1/a:1 --job-name a 'b c job.sh", ["r:1/a:1"]),
    ("sbatch --container-image a#b:1 job.sh", ["a#b:1"]),
    ("sbatch job.sh", []),
    ("sbatch --container-profile=torch job.sh", ["torch:1"]),
    ("sbatch --container-profile=torch --container-image=a:1 job.sh", ["a:1"]),
])  # fmt: skip
def test_images_of_a_command_line(line: str, found: list[str]) -> None:
    """Slurm joins the words of 26.05 without quotes."""
    assert jobimages.of_command_line(line, PROFILES.__getitem__) == found


def test_what_a_profile_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENCLOS_PROFILE_PATH", str(tmp_path))
    (tmp_path / "with.toml").write_text('image = "a:${TAG:-1}"\n')
    (tmp_path / "without.toml").write_text('mounts = ["/scratch"]\n')
    (tmp_path / "bad.toml").write_text('image = "a:${TAG}"\n')
    found = [jobimages._image_of(name) for name in ("with", "without", "bad", "none", "$P")]
    assert found == ["a:1", "", "", "", ""]
    assert [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "cannot be used (${TAG} is not set): not looked into",
        f"profile not found (searched {tmp_path}): not looked into",
        "not looked into: what it stands for is known when the job runs",
    ]
