"""A cluster on another Slurm than the machine's: that Slurm, its Debian's Python, and a root that stays as it was."""

from __future__ import annotations

import re

import pytest
from conftest import Run
from enclos.runtime.cluster import releases
from enclos.runtime.cluster.cluster import Cluster, ClusterError
from enclos.runtime.cluster.layout import shim_path

pytestmark = pytest.mark.releases
DEBIAN = {"22.05": "bookworm", "24.11": "trixie", "26.05": "sid"}


def test_every_daemon_and_command_is_of_the_release(cluster: Cluster, usera: Run, release: str) -> None:
    for command in ("slurmctld -V", "slurmd -V", "srun --version", "sbatch --version"):
        assert re.search(r"(\d+\.\d+)\.\d+", cluster.run(command).stdout)[1] == release, command  # type: ignore[index]
    assert DEBIAN[release] in usera("srun -w n1 cat /etc/os-release").stdout
    assert cluster.release == release


def test_agent_runs_the_releases_own_python(cluster: Cluster) -> None:
    """As an administrator of that Debian would have it: built there, and nothing of this machine's Python."""
    pid = cluster.agent_pid("n1")
    with open(f"/proc/{pid}/maps") as maps:
        names = {row.split()[5] for row in maps if len(row.split()) > 5}
    own = cluster.run([str(cluster.programs / "python3"), "-c", "import sys; print(*sys.version_info[:2], sep='.')"])
    version = own.stdout.strip()
    assert any(f"/python{version}" in name for name in names), names
    others = [name for name in names if (found := re.search(r"/python(3\.\d+)", name)) and found[1] != version]
    assert others == []


def test_plugin_is_built_for_the_release(cluster: Cluster) -> None:
    shown = cluster.run("enclos check", node="n1").stdout
    assert f"{shim_path(cluster.record.slurm)}, built for Slurm {cluster.release}" in shown
    assert re.search(r"^all \d+ ok$", shown, re.MULTILINE), shown


def test_up_does_not_change_the_release(cluster: Cluster, release: str) -> None:
    other = "24.11" if release != "24.11" else "22.05"
    with pytest.raises(ClusterError, match=f"is up with Slurm {release}; take it down first"):
        cluster.up(cluster.name, len(cluster.nodes), release=other)


def test_root_is_read_only(cluster: Cluster, release: str) -> None:
    """Clusters share it: what one changes, not even as root, another must not see."""
    root = releases.find(cluster.record.slurm)
    if root is None:
        pytest.skip("the machine's own Slurm runs from the machine's own files")
    cluster.run("touch /usr/touched; echo changed > /etc/debian_version")
    assert cluster.run("cat /usr/touched /etc/debian_version", node="n1").stdout == "changed\n"
    assert not (root.path / "usr/touched").exists()
    assert (root.path / "etc/debian_version").read_text() != "changed\n"
