"""The plan of a container: request + configuration + facts of the node -> operations, in their order.

The one place where the order of things is written; read it from top to bottom to learn how a container is made.
Pure: makes no system call, so `enclos render` can print a plan anywhere and golden tests can compare it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from enclos.runtime import errors
from enclos.runtime import operations as op
from enclos.runtime.builder import Plan
from enclos.runtime.devices.choice import Selection
from enclos.runtime.idmap import IdMaps
from enclos.runtime.linux import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
)
from enclos.runtime.mounts import Mount
from enclos.runtime.policy import Decision
from enclos.runtime.request import BATCH_STEP, StepRequest
from enclos.runtime.settings import Config

if TYPE_CHECKING:
    from enclos.runtime.slurmclient import SlurmClient

SAFE = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
KERNEL_FS = SAFE | MOUNT_ATTR_NOEXEC
PROC_OPTIONS: tuple[tuple[str, str | None], ...] = (("hidepid", "invisible"),)
STANDARD_NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx")
ROOT_HOME = "/root"
FIXED_TARGETS = ("/proc", "/sys", "/dev", "/etc/passwd", "/tmp")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a plan needs to know of the node.

    Attributes:
        stage: directory in the agent's mount namespace on which every builder mounts its own stage.
        step_cgroup: directory of the step's cgroup v2, or empty where Slurm uses none.
        slurm: Slurm's commands, where a step wants them inside.
        devices: what the step may have of the CDI files.
        het_leader: job id of the het job's leader, of which this job is a part; else 0.
        pid_namespace_of: slurmstepd's pid, where it lives in a pid namespace of its job's; else 0.
        own_mounts: whether the job has a mount namespace of Slurm's, which the agent lends as `outside`.
    """

    stage: str
    step_cgroup: str = ""
    slurm: SlurmClient | None = None
    devices: Selection = field(default_factory=Selection)
    het_leader: int = 0
    pid_namespace_of: int = 0
    own_mounts: bool = False


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that was not named by its path, and the JSON text of its configuration.

    Either the squashfs files of the node's cache, lowest first, or `path`, the file of a store.
    """

    parts: tuple[str, ...]
    config: str
    path: str = ""


NO_IMAGE = CachedImage((), "{}")


@dataclass(frozen=True, slots=True)
class Kept:
    """The files of a named container.

    Attributes:
        path: where they are mounted in the node's mount namespace.
        backing: the file that holds them, or "" for memory.
        image_key: which image they are changes to; "" where they are made now.
        beside: whether a container that runs has them as its root now.
    """

    path: str
    backing: str = ""
    image_key: str = ""
    beside: bool = False


def make(
    request: StepRequest,
    decision: Decision,
    config: Config,
    maps: IdMaps,
    node: NodeFacts,
    image: CachedImage = NO_IMAGE,
    kept: Kept | None = None,
) -> Plan:
    """The early plan of a step: everything that can be done before its first task is there.

    Args:
        decision: what the site's policy made of the request.
        maps: the user namespace's uid and gid maps.
        image: what was imported for a request that names no path.
        kept: what a named container's root is made of.
    """
    operations = tuple(_early(request, decision, config, maps, node, image, kept))
    return Plan(request.uid, request.gid, request.groups, operations)


def enter(request: StepRequest) -> Plan:
    """The early plan of a step that enters a container that runs already."""
    operations = (op.TakeContainer(), op.BecomeUser(), op.EnterContainer())
    return Plan(request.uid, request.gid, request.groups, operations)


def _early(
    request: StepRequest,
    decision: Decision,
    config: Config,
    maps: IdMaps,
    node: NodeFacts,
    image: CachedImage,
    kept: Kept | None,
) -> Iterator[op.Operation]:
    home = home_directory(request, decision)
    origins = {
        "mounts.site": decision.site_mounts,
        "--container-slurm": node.slurm.mounts() if node.slurm else (),
        "--container-mount-home": _home_mounts(request, decision),
        "--container-mounts": decision.user_mounts,
    }
    job = "" if request.is_run else str(request.job)
    known = (("HOME", home), ("PWD", request.cwd), ("SLURM_JOB_ID", job))
    wanted = [(mount, option) for option, listed in origins.items() for mount in listed]

    # As root: what only root may mount, and what has to be read before the image is the root.
    yield op.LookUpAccounts(node.slurm.accounts if node.slurm else ())
    if node.own_mounts:
        yield op.TakeMounts()
    beside = kept is not None and kept.beside
    path = request.image_path() or image.path
    if beside:
        yield op.StageBeside("" if request.image_path() else image.config)
    elif request.image_path():
        wanted_key = kept.image_key if kept else ""
        yield op.OpenImage(path, config.images.user_files, request.name, wanted_key)
    elif path:  # A store's, by its digest: that is the key of a named container, too.
        yield op.OpenImage(path, config.images.user_files, config=image.config)
    else:
        yield op.OpenParts(request.image, image.parts, image.config)
    yield op.StageText("resolv.conf", "/etc/resolv.conf")
    yield op.StageText("hosts", "/etc/hosts")
    if node.devices or node.devices.notices:
        yield op.SelectDevices(node.devices, tuple(request.visible.items()), known)
    yield op.StageDevices("dev", (*STANDARD_NODES, *config.devices.nodes))
    # The node's, not an instance of its own: the terminal of `srun --pty` has a name only there.
    yield op.CloneHostPath("terminals", "/dev/pts", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)
    # The owner of a user namespace could give a tmpfs that was mounted in it another size.
    owner = (("uid", str(request.uid)), ("gid", str(request.gid)))
    limit = config.named.size if kept else config.rootfs.tmpfs_size
    if kept is None:
        yield op.StageFilesystem("upper", "tmpfs", (("size", limit), ("mode", "0755"), *owner), SAFE)
    elif not beside:
        yield op.StageKept(request.name, kept.path, limit, not kept.image_key, kept.backing)
    yield op.StageFilesystem("shm", "tmpfs", (("size", config.rootfs.shm_size), ("mode", "1777"), *owner), SAFE)
    if node.pid_namespace_of:
        yield op.StageProc("proc", node.pid_namespace_of, PROC_OPTIONS, KERNEL_FS)
    else:
        yield op.StageFilesystem("proc", "proc", PROC_OPTIONS, KERNEL_FS)
    if node.step_cgroup:
        yield op.CloneHostPath("cgroup", node.step_cgroup, KERNEL_FS | MOUNT_ATTR_RDONLY)
    if decision.network != "host":
        yield op.JoinNetwork()
    yield op.StageFilesystem("sys", "sysfs", (), KERNEL_FS | MOUNT_ATTR_RDONLY)

    if node.own_mounts:
        yield op.JoinMounts()
    # As the user, in his own user namespace. Sources are cloned only now: in a tree that was cloned before, the
    # user could unmount what the host mounted over other files.
    yield op.BecomeUser()
    yield op.EnterUserNamespace(maps.uid_map, maps.gid_map)
    yield op.EnterNamespaces()
    if path and not beside:
        yield op.CloneDirectoryImage(path)
        yield op.AwaitServer(path)
    if config.mounts.user:
        yield op.CloneImageMounts(known)
    for index, (mount, option) in enumerate(wanted):
        if mount.kind == "bind":
            yield op.clone(f"mount{index}", mount, option)
    if node.devices:
        yield op.CloneDevices()
    commands = tuple(path for path, _ in node.slurm.commands) if node.slurm else ()
    targets = (*FIXED_TARGETS, f"{home}/", *slurm_directories(request, node.het_leader), *commands)
    targets += (*(mount.target for mount, _ in wanted), *_device_targets(node.devices))
    if decision.remap_root:
        targets += (op.APT_SETTING,)
    yield op.EnterRootBeside(node.stage) if beside else op.EnterRoot(node.stage, limit, targets)
    yield op.Attach("proc", "/proc")
    yield op.Attach("sys", "/sys")
    if node.step_cgroup:
        yield op.Attach("cgroup", "/sys/fs/cgroup")
    yield op.Attach("dev", "/dev")
    yield op.Attach("terminals", "/dev/pts")
    yield op.Attach("shm", "/dev/shm")
    yield op.MountInside("mqueue", "/dev/mqueue", (), KERNEL_FS)
    yield op.ReadImageFacts(known, decision.entrypoint, not request.workdir, request.is_run)
    yield op.WriteAccounts(home, decision.remap_root)
    yield op.WriteStaged("/etc/resolv.conf", "resolv.conf")
    yield op.WriteStaged("/etc/hosts", "hosts")
    yield op.WriteHostname()
    if decision.remap_root:
        yield op.SetUpPackageManagers()
    yield op.MakeDirectory("/tmp", 0o1777)
    yield op.MakeDirectory(home, 0o700)
    if node.slurm:
        for paths, program in node.slurm.programs():
            yield op.WriteProgram(paths, program)
    if node.devices:
        yield op.AttachDevices()
        yield op.JoinLibraries()
    if config.mounts.user:
        yield op.PlaceImageMounts()
    for index, (mount, option) in enumerate(wanted):
        yield op.place(f"mount{index}", mount, option)


def late(request: StepRequest, decision: Decision, directories: Sequence[str]) -> Plan:
    """The late plan, which the first task brings: what Slurm made after PREPARE, and the last touches.

    Args:
        directories: host directories that the agent sends as descriptors of the same name, to appear at
            the same path inside (PMIx).
    """
    steps: list[op.Operation] = [op.Attach(path, path) for path in directories]
    if request.workdir:
        steps.append(op.CheckWorkdir(request.workdir))
    if not decision.writable:
        steps.append(op.SealRoot())
    return Plan(request.uid, request.gid, request.groups, tuple(steps))


def late_entered(request: StepRequest, directories: Sequence[str]) -> Plan:
    """The late plan of a step that entered a container that runs."""
    steps: list[op.Operation] = [op.AttachRunning(path) for path in directories]
    if request.workdir:
        steps.append(op.CheckWorkdir(request.workdir))
    return Plan(request.uid, request.gid, request.groups, tuple(steps))


def slurm_directories(request: StepRequest, het_leader: int = 0) -> tuple[str, ...]:
    """Directories that Slurm may have made for the step, which its tasks need at the same path.

    Those of the PMIx plugin, its server's and its clients', and the one that holds a batch step's script. In all parts
    of a het job the plugin's have the id of its leader (src/plugins/mpi/pmix/pmixp_info.c, pmixp_info_set).
    """
    if request.is_run:
        return ()
    step = f"{het_leader or request.job}.{request.step}"
    directories = (f"{request.spool}/pmix.{step}", f"{request.tmpfs}/spmix_appdir_{request.uid}_{step}")
    if request.step == BATCH_STEP:
        return (*directories, f"{request.spool}/job{request.job:05d}")
    return directories


def home_directory(request: StepRequest, decision: Decision) -> str:
    """The user's home inside: the one he has outside, or /root for a remapped root."""
    return ROOT_HOME if decision.remap_root else request.home or "/"


def _home_mounts(request: StepRequest, decision: Decision) -> tuple[Mount, ...]:
    """At its own path, which scripts hold; for a remapped root also where root's home is, as pyxis has it."""
    if not decision.mount_home:
        return ()
    if not request.home:
        raise errors.home_missing(request.home)
    places = dict.fromkeys([request.home, home_directory(request, decision)])
    return tuple(Mount(request.home, place, "bind", None, (), request.home) for place in places)


def _device_targets(devices: Selection) -> tuple[str, ...]:
    """Where devices may mount or link something."""
    edits = devices.edits()
    places = (*(mount.target for mount in edits.mounts), *(link.path for link in edits.links))
    return (*places, *(f"{folder}/x" for folder in edits.linker_folders))
