"""Slurm's own namespaces around a container: job_container and namespace plugins, as each release has them.

Each release has other plugins, and other processes live inside: a task (22.05), slurmstepd too where the site says so
(24.11), slurmstepd always (26.05).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from conftest import Result, plain
from enclos.runtime.cluster import image as images
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.releases
IMAGE = "--container-image=/images/openmpi.sqsh"
JOB_CONTAINER = "AutoBasePath=true\nBasePath=/run/jobs\n"
YAML = "defaults:\n  auto_base_path: true\n  base_path: /run/jobs\n  clone_ns_flags: [{flags}]\n"


@dataclass(frozen=True)
class Setting:
    """A plugin as a site may set it up, and from which release to which it exists."""

    name: str
    plugin: str
    file: tuple[str, str]
    releases: tuple[str, ...]
    contain_spank: bool = False


def tmpfs(name: str, plugin: str, releases: tuple[str, ...], more: str = "", contain_spank: bool = False) -> Setting:
    return Setting(name, plugin, ("job_container.conf", JOB_CONTAINER + more), releases, contain_spank)


def linux(name: str, flags: str, contain_spank: bool = False) -> Setting:
    return Setting(
        name, "NamespaceType=namespace/linux", ("namespace.yaml", YAML.format(flags=flags)), ("26.05",), contain_spank
    )


OLD = "JobContainerType=job_container/tmpfs"
OUTSIDE = tmpfs("tmpfs-spank", OLD, ("24.11",), contain_spank=True)
USER_NAMESPACE = linux("linux-user", "CLONE_NEWNS, CLONE_NEWUSER")
SETTINGS = [
    tmpfs("tmpfs", OLD, ("22.05", "24.11")),
    OUTSIDE,
    tmpfs("tmpfs-entire", OLD, ("24.11",), "EntireStepInNS=true\n", contain_spank=True),
    tmpfs("namespace-tmpfs", "NamespaceType=namespace/tmpfs", ("26.05",), contain_spank=True),
    linux("linux", "CLONE_NEWNS"),
    linux("linux-pid", "CLONE_NEWNS, CLONE_NEWPID", contain_spank=True),
]


@contextmanager
def one_processor() -> Iterator[None]:
    """What starts inside stays on one processor.

    Slurm binds a mount namespace to a file, which Linux allows only for one younger than the binder's own. From 6.18 on
    the kernel numbers them per processor, so on two the younger one may have the lower number: EINVAL, now and then.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def up(make_cluster: Callable[..., Cluster], setting: Setting) -> Cluster:
    name, text = setting.file
    spank = ",contain_spank" if setting.contain_spank else ""
    rows = f"{setting.plugin}\nPrologFlags=Contain\nSlurmdParameters=config_overrides{spank}"
    with one_processor():
        made = make_cluster(2, slurm_conf_extra=rows, slurm_files={name: text})
    images.install(made.layout.images)
    return made


def own_lines(done: Result) -> list[str]:
    return [row for row in map(plain, done.stderr.splitlines()) if row.startswith(("enclos:", "hint:"))]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_containers_in_slurms_namespaces(make_cluster: Callable[..., Cluster], release: str, setting: Setting) -> None:
    if release not in setting.releases:
        pytest.skip(f"Slurm {release} has no such setting")
    cluster = up(make_cluster, setting)
    both = f"srun -N2 -n2 {IMAGE} --container-network=job"
    done = cluster.run(f"{both} sh -c 'hostname; ls /sys/class/net'", "usera")
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["enclos0", "enclos0", "lo", "lo", "n1", "n2"])
    own = cluster.run(f"srun -wn1 {IMAGE} sh -c 'echo $$; exec readlink /proc/self'", "usera").stdout.split()
    assert len(own) == 2 and own[0] == own[1], "/proc shows the pids of another namespace"
    if release != "26.05":  # Debian's 26.05 has no PMIx plugin.
        ring = cluster.run(f"{both} --mpi=pmix ring", "usera")
        assert "all data right" in ring.stdout, ring.stderr
    cluster.run("mkdir /shared/place && echo here > /shared/place/file", "usera")
    relative = f"srun -wn1 {IMAGE} --container-mounts=./place:/mnt cat /mnt/file"
    assert cluster.run(f"cd /shared && {relative}", "usera").stdout == "here\n"
    if "PID" not in setting.file[1] and "NEWNS" not in setting.file[1]:
        private_mounts(cluster)
    batch = cluster.run(f"cd /shared; sbatch -W -o batch.out {IMAGE} --wrap 'ls -d /proc/self; exit 5'", "usera")
    assert (batch.returncode, cluster.run("cat /shared/batch.out").stdout) == (5, "/proc/self\n")
    failed = cluster.run("srun -wn1 --container-image=/images/none true", "usera")
    assert own_lines(failed)[0] == "enclos: --container-image=/images/none: image not found on n1"
    cluster.await_idle()
    assert set(cluster.run("sinfo -h -N -o %T").stdout.split()) == {"idle"}
    cluster.down()


def private_mounts(cluster: Cluster) -> None:
    """/tmp and /dev/shm are the job's own: there lie the mounts that a step names, and its images."""
    step = "srun -Q --overlap -n1"
    script = f"""set -e
        mkdir /tmp/own && echo mine > /tmp/own/file && echo shared > /dev/shm/piece && ln -s /tmp/own /shared/link
        {step} {IMAGE} --container-mounts=/tmp/own:/mnt,/dev/shm/piece:/piece:ro cat /mnt/file /piece
        {step} {IMAGE} --container-mounts=/shared/link:/mnt cat /mnt/file
        cd /tmp && {step} {IMAGE} --container-mounts=./own:/mnt sh -c 'echo more >> /mnt/file'
        {step} {IMAGE} --container-mounts=/:/node:ro cat /node/tmp/own/file
        cp -r /images/openmpi /tmp/image && echo directory > /tmp/image/mark
        cp /images/openmpi.sqsh /tmp/image.sqsh
        {step} --container-image=./image cat /mark
        {step} --container-image=./image.sqsh echo file
        {step} --container-image=/tmp/image.sqsh --container-name=w sh -c 'echo named > /opt/n'
        {step} --container-name=w --container-mounts=/tmp/own:/mnt cat /opt/n /mnt/file
        ! {step} {IMAGE} --container-mounts=/:/node:ro,umount:/node/tmp ls /node/tmp
        exec {step} {IMAGE} --container-mounts=/tmp/own/none:/mnt true"""
    cluster.run("rm -f /shared/link; chmod 1777 /shared")
    words = ["salloc", "-Q", "-wn1", *step.split(), "bash", "-c", script]
    done = cluster.run(words, "usera", timeout=120)
    read = ["mine", "shared", "mine", "mine", "more", "directory", "file", "named", "mine", "more"]
    assert done.stdout.split() == read, done.stderr
    # What Slurm mounted over the node's /tmp does not come off.
    errors = [line for line in own_lines(done) if line.startswith("enclos:")]
    assert errors == [
        "enclos: --container-mounts=umount:/node/tmp: couldn't unmount in the container "
        "(nothing is mounted there that could be taken away) on n1",
        "enclos: --container-mounts=/tmp/own/none:/mnt: source path does not exist on n1",
    ]
    assert done.returncode == 1
    # Outside of a job's mounts there is nothing of it, and nothing is left when it is over.
    nothing = cluster.run(f"srun -wn1 {IMAGE} --container-mounts=/tmp/own:/mnt cat /mnt/file", "usera")
    assert (nothing.returncode, own_lines(nothing)[0]) == (
        1, "enclos: --container-mounts=/tmp/own:/mnt: source path does not exist on n1"
    )  # fmt: skip


def test_chdir_under_contain_spank(make_cluster: Callable[..., Cluster], release: str) -> None:
    """From 24.05 on user_init may run in a clone that job_container/tmpfs has put to another directory."""
    if release not in OUTSIDE.releases:
        pytest.skip(f"Slurm {release} has no such setting")
    cluster = up(make_cluster, OUTSIDE)
    cluster.run("mkdir /shared/place && echo here > /shared/place/file", "usera")
    relative = f"{IMAGE} --container-mounts=./place:/mnt cat /mnt/file"
    done = cluster.run(f"mkdir -p place; srun -wn1 --chdir=/shared {relative}", "usera")
    assert (done.returncode, done.stdout) == (1, "")
    assert own_lines(done) == [
        "enclos: --container-mounts: a relative path cannot be used with --chdir here "
        "(contain_spank hides the step's directory) on n1"
    ]
    absolute = f"{IMAGE} --container-mounts=/shared/place:/mnt cat /mnt/file"
    assert cluster.run(f"srun -wn1 --chdir=/shared {absolute}", "usera").stdout == "here\n"
    cluster.down()


@pytest.mark.parametrize("network", ["host", "job", "none"])
def test_slurms_user_namespace_is_refused(refusing: Cluster, network: str) -> None:
    done = refusing.run(f"srun -wn1 {IMAGE} --container-network={network} echo ran", "usera")
    assert (done.returncode, done.stdout) == (1, "")
    assert own_lines(done) == [
        "enclos: --container-image=/images/openmpi.sqsh: containers cannot be joined from Slurm's user namespace "
        "(namespace.yaml has CLONE_NEWUSER) on n1",
        "hint: administrator: remove CLONE_NEWUSER from clone_ns_flags in namespace.yaml",
    ]
    assert refusing.run("srun -wn1 echo bare", "usera").stdout == "bare\n"
    shown = refusing.run("enclos check", node="n1")
    assert (shown.returncode, "remove CLONE_NEWUSER from namespace.yaml" in shown.stdout) == (1, True)


@pytest.fixture(scope="module")
def refusing(make_cluster: Callable[..., Cluster], release: str) -> Cluster:
    if release not in USER_NAMESPACE.releases:
        pytest.skip(f"Slurm {release} has no such setting")
    return up(make_cluster, USER_NAMESPACE)


def test_where_slurm_gives_no_mounts_nobody_joins_any(idle: Cluster, image: str) -> None:
    """So that nothing is spent on it, and nothing built twice."""
    step = f"srun -wn1 --container-image={image} --container-mounts=/shared:/mnt true"
    assert idle.run(step, "usera").returncode == 0
    row = [row for row in idle.agent_log("n1").splitlines() if " ready@" in row][-1]
    assert "OpenImage=" in row and "CloneSource=" in row and "Mounts=" not in row.replace("ImageMounts=", "")
