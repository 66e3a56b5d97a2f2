"""A cluster on another Slurm than the machine's: that Slurm, its Debian's Python, and a root that stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from conftest import Run
from enclos.runtime.cluster import image as images
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
    done = cluster.run("enclos check", node="n1")
    shown = done.stdout
    assert f"{shim_path(cluster.record.slurm)}, built for Slurm {cluster.release}" in shown
    assert done.returncode == 0, shown


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


# -- what differs -----------------------------------------------------------------------------------------

IMAGE = "--container-image=/images/openmpi.sqsh"
OCI = """\
RunTimeQuery="true"
RunTimeCreate="true"
RunTimeStart="true"
RunTimeKill="true"
RunTimeDelete="true"
RunTimeRun="/bin/echo by Slurm itself"
"""


@pytest.fixture(scope="module")
def other(make_cluster: Callable[..., Cluster], release: str) -> Cluster:
    """Slurm's own key in place of munge is there from 23.11 on."""
    rows, files = "", {}
    if release > "23.11":
        rows += "AuthType=auth/slurm\nCredType=cred/slurm\nAuthInfo=use_client_ids\n"
        files = {"slurm.key": "k" * 1024}
    made = make_cluster(2, slurm_conf_extra=rows, slurm_files=files)
    images.install(made.layout.images)
    return made


def test_slurms_own_key_in_place_of_munge(other: Cluster, release: str) -> None:
    if release < "23.11":
        pytest.skip("Slurm before 23.11 has munge only")
    done = other.run(f"srun -N2 -n2 {IMAGE} --container-network=job id -u", "usera")
    assert (done.returncode, done.stdout) == (0, "61001\n61001\n")
    assert "auth/slurm" in other.run("scontrol show config").stdout


def test_oci_conf_gives_container_to_slurm(make_cluster: Callable[..., Cluster], release: str) -> None:
    """Then --container is Slurm's own; --container-image stays ours."""
    # 22.05 has no such word, and wants a config.json that a real runtime could use: there it has its own error.
    lenient = release > "23.02"
    made = make_cluster(1, slurm_files={"oci.conf": OCI + ("IgnoreFileConfigJson=true\n" if lenient else "")})
    images.install(made.layout.images)
    bundle = made.layout.shared / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    config = {"ociVersion": "1.0.0", "process": {"args": ["hostname"]}, "root": {"path": "rootfs"}}
    (bundle / "config.json").write_text(json.dumps(config))
    ours = made.run(f"srun {IMAGE} sh -c 'echo ${{SLURM_CONTAINER-none}}; id -u'", "usera")
    assert (ours.returncode, ours.stdout) == (0, "none\n61001\n"), ours.stderr
    slurms = made.run("srun --container=/shared/bundle echo ran outside", "usera")
    assert slurms.stdout == ("by Slurm itself\n" if lenient else ""), slurms.stderr
    assert (slurms.returncode == 0) is lenient
    assert "bundle" not in made.agent_log("n1")
    made.down()


# -- a launcher that does not suit the MPI library --------------------------------------------------------

def test_one_task_of_each_node_says_it(cluster: Cluster, image: str) -> None:
    """The rest, library by library, is in test_mpi_matrix.py."""
    done = cluster.run(f"srun -N2 -n4 --mpi=pmi2 --container-image={image} ring --rounds 2", "usera")
    said = [row for row in done.stderr.splitlines() if " is linked with " in row]
    line = "is linked with OpenMPI, which --mpi=pmi2 possibly does not start; use --mpi=pmix"
    assert [row[row.index("is linked") :] for row in said] == [line, line], done.stderr


def test_bad_programs_are_no_matter_for_the_check(cluster: Cluster, image_directory: str) -> None:
    """Offsets that lead nowhere, a file of one byte, a script: the task ends as it would without a container."""
    whole = (cluster.layout.images / "openmpi/usr/bin/ring").read_bytes()
    folder = cluster.layout.shared / "programs"
    folder.mkdir()
    texts = {
        "script": b"#!/bin/sh\necho ran\n",
        "byte": b"\x7f",
        "header": whole[:64],
        "offsets": whole[:32] + b"\xff" * 8 + whole[40:],
        "count": whole[:56] + b"\xff\xff" + whole[58:],
        "half": whole[: len(whole) // 2],
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        (folder / name).chmod(0o755)
        step = f"srun -wn1 -n2 --mpi=pmi2 --container-image={image_directory} --container-mounts=/shared:/shared:ro"
        done = cluster.run(f"{step} /shared/programs/{name}", "usera")
        assert done.stdout == ("ran\nran\n" if name == "script" else ""), name
        bare = cluster.run(f"srun -wn1 -n2 /shared/programs/{name}", "usera")
        assert done.returncode == bare.returncode, done.stderr


@pytest.mark.parametrize(("script", "options", "shown"), [
    ("#SBATCH --container-image=/images/x.sqsh", [], ["22.05", "24.11", "26.05"]),
    ("srun --container-image=/images/x.sqsh true", ["--array=1-2"], ["22.05", "24.11", "26.05"]),
    # Nothing that a user may call tells the command line of sbatch before, where no accounts are kept.
    ("true", ["--container-image=/images/x.sqsh"], ["26.05"]),
])  # fmt: skip
def test_the_images_of_a_pending_job(
    cluster: Cluster, usera: Run, release: str, script: str, options: list[str], shown: list[str]
) -> None:
    """`enclos image pull --job` knows them as far as Slurm tells the job's owner. The rest is in test_prefetch.py."""
    (cluster.layout.shared / "pending.sh").write_text(f"#!/bin/sh\n{script}\n")
    job = usera(["sbatch", "--hold", "--parsable", *options, "/shared/pending.sh"]).stdout.strip()
    done = usera(["enclos", "image", "pull", f"--job={job}"])
    usera(["scancel", job])
    if release in shown:
        assert done.returncode == 0 and "/images/x.sqsh: not fetched: it is no image of a registry" in done.stderr
    else:
        assert done.returncode == 1 and f"enclos: --job={job}: it names no image" in done.stderr
