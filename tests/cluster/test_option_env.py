"""--container-env, and which variables a container's tasks have: the job's, the image's, Slurm's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from boxes import BOX, shell
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")

# Each process into which it is loaded says who it is.
SPY = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void look(void)
{
	char own[4096] = "", line[5000];
	int fd = open("/shared/data/loaded", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666), size;

	if (readlink("/proc/self/exe", own, sizeof(own) - 1) < 0 || fd < 0)
		return;
	size = snprintf(line, sizeof(line), "%d %d %s\n", getuid(), geteuid(), own);
	if (write(fd, line, size) != size)
		return;
	close(fd);
}
"""


def test_environment_of_the_image(idle: Cluster) -> None:
    """It wins over the job's, but for what Slurm and the user's identity need; --container-env keeps the job's."""
    script = 'echo "$FROM_IMAGE|$QUOTED|$BOTH|$HOME|$ONLY_JOB"; [ "$SLURM_JOB_ID" != 99999 ]'
    job = {"BOTH": "job", "FROM_IMAGE": "job", "ONLY_JOB": "job"}
    assert shell(idle, script, **job) == "image|two words|image|/home/usera|job\n"
    assert shell(idle, script, "--container-env=BOTH,QUOTED", **job) == "image|two words|job|/home/usera|job\n"
    assert shell(idle, script, "--container-env=FROM_IMAGE,BOTH", **job) == "job|two words|job|/home/usera|job\n"


def test_terminal_and_language(idle: Cluster) -> None:
    """TERM is the job's. A locale of the node may not be one of the image: LANG comes when it is asked for."""
    script = 'echo "$TERM|${LANG-none}"'
    job = {"TERM": "dumb", "LANG": "en_US.UTF-8"}
    assert shell(idle, script, **job) == "dumb|none\n"
    assert shell(idle, script, "--container-env=LANG", **job) == "dumb|en_US.UTF-8\n"


def test_home_and_path(idle: Cluster) -> None:
    script = 'echo "$HOME|$PATH|$USER|$LOGNAME"'
    path = "/shared/bin:/usr/bin:/bin"
    assert shell(idle, script, PATH=path) == f"/home/usera|{path}|usera|usera\n"
    assert shell(idle, script, "--container-remap-root", PATH=path).startswith(f"/root|{path}|")


@pytest.mark.parametrize("mpi", ["none", "pmi2", "pmix"])
def test_variables_of_slurm_and_mpi_reach_the_task(idle: Cluster, mpi: str) -> None:
    """All that the same step has without a container, and none of them from the image."""
    script = "env | grep -E '^(SLURM|PMI)' | cut -d= -f1 | sort"
    step = ["srun", "-w", "n1", f"--mpi={mpi}"]
    outside = idle.run([*step, "sh", "-c", script], "usera").stdout.split()
    inside = idle.run([*step, f"--container-image={BOX}", "sh", "-c", script], "usera").stdout.split()
    ours = [name for name in inside if name not in outside]
    assert [name for name in outside if name not in inside] == []
    assert [name for name in ours if not name.startswith(("SLURM_ENCLOS_", "SLURM_SPANK_"))] == []
    assert mpi == "none" or any(name.startswith("PMI") for name in inside)


@pytest.mark.parametrize("network", ["host", "job"])
def test_variables_steer_no_privileged_helper(idle: Cluster, network: str, shared: Path, tmp_path: Path) -> None:
    """What makes the loader or Python run foreign code reaches the user's own processes, and nobody else's."""
    (tmp_path / "spy.c").write_text(SPY)
    command = ["cc", "-shared", "-fPIC", "-o", str(shared / "spy.so"), str(tmp_path / "spy.c")]
    subprocess.run(command, check=True)
    (shared / "sitecustomize.py").write_text(
        "import os\nopen('/shared/data/loaded', 'a').write(f'{os.getuid()} {os.geteuid()} python\\n')\n"
    )
    loaded = shared / "data/loaded"
    loaded.unlink(missing_ok=True)
    loaded.touch()
    loaded.chmod(0o666)
    steering = [f"{name}=/shared/spy.so" for name in ("LD_PRELOAD", "LD_AUDIT")]
    steering += [f"{name}=/shared" for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "GCONV_PATH", "NLSPATH")]
    words = ["srun", "-w", "n1", "--mpi=pmix", f"--container-image={BOX}", f"--container-network={network}"]
    options = ["--container-mounts=/shared", "--container-entrypoint", "--container-slurm", "--container-mount-home"]
    # By env(1), because root's own program starts a test's commands.
    done = idle.run(["env", *steering, *words, *options, "true"], "usera")
    assert done.returncode == 0, done.stderr
    rows = [row.split(None, 2) for row in loaded.read_text().splitlines()]
    assert any(row[2].endswith("srun") for row in rows), "it does not work at all"
    assert [row for row in rows if row[:2] != ["61001", "61001"]] == []
