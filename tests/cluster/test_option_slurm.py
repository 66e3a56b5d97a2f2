"""--container-slurm: srun and its siblings in a containerised batch script, whatever the image holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from boxes import BOX, shell, srun
from conftest import Result
from enclos.runtime import slurmclient
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")

ALONE = "/images/alone"
PROGRAM = r"""
#include <stdio.h>
#include <unistd.h>
int main(int count, char **words)
{
	printf("alone\n");
	fflush(stdout);
	if (count > 1)
		execvp(words[1], words + 1);
	return count > 1;
}
"""


def batch(cluster: Cluster, script: str, *options: str, nodes: int = 1) -> Result:
    """A batch script in a container; stdout is what it printed."""
    place = cluster.layout.shared / "nested.sh"
    place.write_text(f"#!/bin/sh\n{script}\n")
    place.chmod(0o755)
    out = cluster.layout.shared / "nested.out"
    out.unlink(missing_ok=True)
    words = ["sbatch", "-W", f"-N{nodes}", "-n2", "-o", "/shared/nested.out", *options, "/shared/nested.sh"]
    done = cluster.run(words, "usera", timeout=60)
    return Result(done.args, done.returncode, out.read_text() if out.exists() else "", done.stderr)


@pytest.fixture(scope="module", autouse=True)
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with one static binary, and nothing else."""
    root = cluster.layout.images / "alone"
    root.mkdir()
    source = tmp_path_factory.mktemp("alone") / "alone.c"
    source.write_text(PROGRAM)
    subprocess.run(["cc", "-static", "-O2", "-o", str(root / "alone"), str(source)], check=True)
    return root


def test_without_the_option_there_is_no_srun(idle: Cluster) -> None:
    done = batch(idle, "srun hostname", f"--container-image={BOX}")
    assert done.returncode == 127
    assert "srun: not found" in done.stdout


def test_script_calls_srun(idle: Cluster) -> None:
    """On two nodes, in an image that has nothing but busybox: in the same image, another one, and with a network."""
    script = f"""
        cat /opt/file
        srun -l sh -c 'cat /opt/file; hostname'
        srun -N1 -n1 -w n2 --container-image={ALONE} /alone
        srun --container-network=job sh -c 'echo $(ls /sys/class/net) $(id -u)'
        squeue -h -o '%T %u' --me; scontrol show job $SLURM_JOB_ID | grep -c JobState=RUNNING"""
    done = batch(idle, script, f"--container-image={BOX}", "--container-slurm", nodes=2)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert lines[0] == "of the image"
    assert sorted(lines[1:5]) == ["0: n1", "0: of the image", "1: n2", "1: of the image"]
    assert lines[5] == "alone"
    assert sorted(lines[6:8]) == ["enclos0 lo 61001"] * 2
    assert lines[8:] == ["RUNNING usera", "1"]


def test_script_starts_mpi(idle: Cluster, image: str, pmix: None) -> None:
    """srun itself opens the library of PMIx, by a full path that an image of busybox does not have."""
    script = f"srun --mpi=pmix --container-image={image} --container-network=job ring"
    done = batch(idle, script, f"--container-image={BOX}", "--container-slurm", nodes=2)
    assert done.returncode == 0, done.stdout
    assert "all data right" in done.stdout and "rank 1  node n2" in done.stdout


def test_image_with_a_pmix_of_its_own(idle: Cluster, image: str, pmix: None) -> None:
    """It stays for programs of the image, and srun does not open it: here it is not even a library."""
    plugins = Path("/usr/lib").glob("*/slurm-wlm/mpi_pmix_*.so")
    paths = [path for plugin in plugins for path in slurmclient.opened_by_path(plugin.read_bytes())]
    assert paths, "Slurm's mpi_pmix names no library"
    root = idle.layout.images / "own-pmix"
    shutil.copytree(idle.layout.images / "box", root, symlinks=True)
    for path in paths:
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (root / path[1:]).write_text("of the image\n")
    script = f"cat {paths[0]}; srun --mpi=pmix --container-image={image} --container-network=job ring"
    done = batch(idle, script, "--container-image=/images/own-pmix", "--container-slurm", nodes=2)
    assert done.stdout.startswith("of the image\n") and "all data right" in done.stdout, done.stdout


def test_image_with_another_libc(idle: Cluster) -> None:
    """The commands use neither the image's loader nor its libraries."""
    root = idle.layout.images / "broken-libc"
    shutil.copytree(idle.layout.images / "box", root, symlinks=True)
    for name in ("lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6", "usr/lib/x86_64-linux-gnu/libc.so.6"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not a library")
    done = batch(
        idle,
        "srun -n1 hostname; sbatch --version",
        "-wn1",
        "--container-image=/images/broken-libc",
        "--container-slurm",
    )
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "n1"), done.stdout


def test_interactive_step(idle: Cluster) -> None:
    out = shell(idle, "squeue -h --me -o %u; sinfo -h -o %P", "--container-slurm")
    assert out.split() == ["usera", "main*"]


def test_program_alone_starts_a_step(idle: Cluster) -> None:
    """No shell, no file but the program: it executes srun, which starts it once more elsewhere."""
    words = ["srun", "-N1", "-n1", "-w", "n1", "--overlap", f"--container-image={ALONE}", "--container-slurm", "/alone"]
    done = idle.run([*words, "srun", "--overlap", f"--container-image={ALONE}", "/alone"], "usera", timeout=30)
    assert (done.returncode, done.stdout) == (0, "alone\nalone\n"), done.stderr


def test_commands_are_read_only_and_the_users(idle: Cluster) -> None:
    script = "grep ' /etc/slurm ' /proc/mounts | cut -d' ' -f4 | cut -d, -f1; srun --version >/dev/null && echo runs"
    assert shell(idle, script, "--container-slurm", "--container-readonly") == "ro\nruns\n"


@pytest.mark.parametrize("option", ["--container-network=job", "--container-network=none", "--container-remap-root"])
def test_script_away_from_slurmctld(idle: Cluster, option: str) -> None:
    """Refused for a script; a step that inherits the option takes no notice."""
    done = batch(idle, "srun true", f"--container-image={BOX}", "--container-slurm", option)
    assert done.returncode == 1
    assert f"--container-slurm: cannot be combined with {option}" in done.stdout
    assert srun(idle, "--container-slurm", option, "sh", "-c", "command -v srun").returncode == 127
