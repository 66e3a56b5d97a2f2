"""--container-slurm in a real distribution: a batch script in debootstrap's Debian 13 works with Slurm as outside.

Once with Debian's own Slurm and PMIx in the image, of whatever release, at the very paths at which the node's appear,
and once without any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from enclos.runtime.cluster import releases
from enclos.runtime.cluster.cluster import Cluster

pytestmark = [pytest.mark.releases, pytest.mark.usefixtures("image")]

OTHER = "--container-image=/images/openmpi.sqsh"
SCRIPT = rf"""#!/bin/bash
. /etc/os-release
echo "in $VERSION_CODENAME: $(srun --version)"
squeue -h --me -o "%T %D"; scontrol show job $SLURM_JOB_ID | grep -o JobState=RUNNING
echo - inherited; srun -l sh -c '. /etc/os-release; echo $VERSION_CODENAME $(hostname)' | sort
echo - own
srun -l {OTHER} --container-network=job sh -c 'echo $(ls /sys/class/net) $(command -v apt || echo another)' | sort
echo - sbcast; echo hello > /tmp/a; sbcast --force /tmp/a /tmp/sent-$SLURM_JOB_ID
srun -l --container-mounts=/tmp:/node cat /node/sent-$SLURM_JOB_ID | sort
step() {{ squeue -h -s --me -o "%i %j" | while read id name; do [ $name = $1 ] && echo $id; done; }}
echo - scancel; srun -N1 -n1 -J asleep sh -c 'echo up; sleep 60' > /tmp/up 2> /dev/null &
until [ -s /tmp/up ]; do sleep 0.1; done; scancel $(step asleep); wait $!; echo ended $(($? != 0))
echo - sattach; srun -N1 -n1 -J ticks sh -c 'for i in 1 2 3 4 5 6 7 8 9; do echo tick; sleep 0.3; done' > /tmp/ticks &
until [ -s /tmp/ticks ]; do sleep 0.1; done; sattach $(step ticks) | head -n1; wait
echo - salloc; salloc -Q -N1 -n1 echo allocated
echo - sbatch; sbatch -Q -W -n1 -o /dev/null --wrap '. /etc/os-release; test $VERSION_CODENAME = trixie'; echo status $?
echo - mpi; srun --mpi=pmix {OTHER} --container-network=job ring 2>&1 | grep -c 'all data right'
"""
SHOWN = """\
- inherited
0: trixie n1
1: trixie n2
- own
0: enclos0 lo another
1: enclos0 lo another
- sbcast
0: hello
1: hello
- scancel
ended 1
- sattach
tick
- salloc
allocated
- sbatch
status 0
- mpi
"""


@pytest.fixture(scope="module")
def debian(cluster: Cluster) -> Path:
    """The root of the release that has Slurm 24.11, as an image: its files are linked, not copied."""
    root = releases.find("24.11")
    assert root is not None
    image = cluster.layout.images / "debian"
    linked = subprocess.run(["cp", "-al", root.path, image], check=False, capture_output=True)
    if linked.returncode != 0:
        shutil.rmtree(image, ignore_errors=True)
        subprocess.run(["cp", "-a", root.path, image], check=True)
    for name in ("dev", "proc"):
        shutil.rmtree(image / name)
        (image / name).mkdir()
    (image / "root").chmod(0o755)  # A checkout below /root is brought to its own path, plugin and all.
    return image


@pytest.mark.parametrize("has_slurm", [True, False], ids=["with its own Slurm", "without Slurm"])
def test_script_works_with_slurm(idle: Cluster, debian: Path, has_slurm: bool) -> None:
    if not has_slurm:
        libraries = (f"usr/lib/*/{name}" for name in ("slurm-wlm", "libslurm*", "libpmix*", "pmix2"))
        for pattern in ("usr/bin/s*", "usr/sbin/slurm*", *libraries):
            for path in debian.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in ("sh", "sort", "sleep", "sed"):
                    path.unlink()
        assert not os.path.lexists(debian / "usr/bin/srun")
    assert (debian / "usr/bin/srun").exists() is has_slurm
    shared = idle.layout.shared
    shared.chmod(0o1777)
    (shared / "debian.sh").write_text(SCRIPT)
    (shared / "debian.sh").chmod(0o755)
    words = ["sbatch", "-Q", "-W", "-N2", "-n2", "-w", "n1,n2", "--overcommit", "-o", "/shared/debian.out"]
    options = ["--container-image=/images/debian", "--container-slurm", "/shared/debian.sh"]
    done = idle.run([*words, *options], "usera", timeout=120)
    text = (shared / "debian.out").read_text()
    first, states, shown = text.split("\n", 1)[0], text.split("\n")[1:3], text[text.index("- inherited") :]
    # What srun says when it had to wait for the end of the step before.
    shown = re.sub(r"srun: (Step created|Job \S+ step creation temporarily).*\n", "", shown)
    assert first.startswith("in trixie: slurm") and f" {idle.release}." in first
    assert states == ["RUNNING 2", "JobState=RUNNING"]
    mpi = "pmix" in idle.run(["sh", "-c", "srun --mpi=list 2>&1"]).stdout
    assert (shown, done.returncode) == (SHOWN + ("1\n" if mpi else "0\n"), 0 if mpi else 1)
