"""One row per option of srun, sbatch and salloc: their only source, as settings.py is that of enclos.yaml.

From these rows come the option table of the Slurm plugin (spank/options.gen.h), what srun refuses by itself, the
completion of shells and the tables of the manual (generate.py). With them the variables of a user's environment that
have a meaning to us.

Must not hold: checks of values (early.py and its neighbours), decisions (policy.py). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from enclos.runtime import early, early_limits, early_mounts
from enclos.runtime.early import Check


@dataclass(frozen=True, slots=True)
class Option:
    """One option of srun, sbatch and salloc.

    `key` is NAME of `option.NAME` on the wire; `fixed` is its value when the option takes
    none. `env` and `pyxis_env` are read when no option with this key was given; they are
    empty on the second spelling of a key. `detail` is for the manual only. `checks` are what
    srun refuses by itself.
    """

    name: str
    arginfo: str
    usage: str
    key: str
    detail: str = ""
    fixed: str = ""
    env: str = ""
    pyxis_env: str = ""
    checks: tuple[Check, ...] = ()


def option(
    name: str,
    arginfo: str,
    usage: str,
    detail: str = "",
    *,
    key: str = "",
    fixed: str = "",
    twin: bool = True,
    pyxis: bool = True,
    checks: tuple[Check, ...] = (),
) -> Option:
    """A row of the option table; name without the leading `container-`, its twins follow from it."""
    rest = name.removeprefix("no-")
    upper = rest.upper().replace("-", "_")
    return Option(
        name=f"{'no-' if rest != name else ''}container-{rest}",
        arginfo=arginfo,
        usage=f"[enclos] {usage}",
        key=key or rest,
        detail=detail,
        fixed=fixed,
        env=f"ENCLOS_CONTAINER_{upper}" if twin else "",
        pyxis_env=f"PYXIS_CONTAINER_{upper}" if twin and pyxis else "",
        checks=checks,
    )


OPTIONS: tuple[Option, ...] = (
    option(
        "image",
        "IMAGE",
        "run the step in a container made from this image: docker://REGISTRY/NAME:TAG, or a path on the node",
        "A name in a registry (docker://[USER@]REGISTRY[:PORT]/NAME[:TAG][@DIGEST], REGISTRY#NAME:TAG, or NAME:TAG in "
        "the site's own), oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE, dir:DIR, or the path of a squashfs or "
        "SIF file or of a directory. Paths are looked up on the compute node with your rights; ./PATH starts at the "
        "step's working directory.",
        checks=early.IMAGE,
    ),
    option(
        "mounts",
        "SRC[:DST[:FLAGS]][,...]",
        'show files or directories of the node inside the container; flags are joined by "+", e.g. '
        '"ro+noexec"',
        "SRC alone is mounted at the same place. SRC is looked up on the compute node with your rights; "
        "./SRC starts at the step's working directory. tmpfs:DST gives an empty directory in memory, "
        "devpts:DST terminals of the container's own, umount:DST takes away what is mounted at DST.",
        checks=early_mounts.MOUNTS,
    ),
    option(
        "profile",
        "NAME|FILE",
        "take options from this TOML or YAML file, where the command line does not say otherwise",
        "A NAME is looked up in ~/.config/enclos/profiles, ~/.edf and /etc/enclos/profiles, or in the directories of "
        "ENCLOS_PROFILE_PATH. It is read where srun is typed; see PROFILES.",
        checks=early.PROFILE,
        pyxis=False,
    ),
    option(
        "workdir",
        "PATH",
        "working directory inside the container",
        "A relative one starts at the container's root.",
        checks=early.WORKDIR,
    ),
    option(
        "name",
        "NAME[:auto|create|exec|no_exec]",
        "keep the container under this name for later steps of the job on the node; with one of that name, use it",
        "An image is only needed to create it, and not looked at afterwards. 'auto' (the default) enters a "
        "container of the name that runs, starts one that does not, and creates one that does not exist; 'create' "
        "refuses one that exists, 'exec' one that does not run; 'no_exec' starts another container on the same "
        "files beside one that runs. JOB.STEP names the container of a running step without a name.",
        checks=early.NAME,
    ),
    option(
        "save",
        "PATH",
        "at the step's end, save the container with all that was written into it as a squashfs file",
        "It can be used as --container-image. What is mounted is not saved, nor what is in /proc, /sys, /dev, "
        "/tmp and /run. PATH is on the compute node, opened with your rights, and appears when the file is "
        "whole; ./PATH starts at the step's working directory. If it cannot be saved the step fails. A step "
        "that is cancelled or out of time is saved if that is done within KillWait of slurm.conf. One that is killed "
        "is not, nor one whose program is killed by SIGKILL or ends with status 137, as a shell does then. With "
        "several nodes each saves its own to that path, and the last one stays.",
        checks=early.SAVE,
    ),
    option(
        "writable",
        "",
        "let the step write to the container's root file system; what it writes is gone at its end",
        fixed="1",
    ),
    option("readonly", "", "make the container's root file system read-only", fixed="1"),
    option("remap-root", "", "be root inside the container; this gives no rights outside", fixed="1"),
    option("no-remap-root", "", "keep your user id inside the container", fixed="0", twin=False),
    option("mount-home", "", "mount your home directory inside the container", fixed="1"),
    option(
        "no-mount-home", "", "do not mount your home directory inside the container", fixed="0", twin=False
    ),
    option(
        "entrypoint",
        "",
        "run the image's entrypoint, once per node and before the tasks, which get the environment it makes",
        fixed="1",
    ),
    option("no-entrypoint", "", "do not run the image's entrypoint", fixed="0", twin=False),
    option("entrypoint-log", "", "show on standard error what the entrypoint prints", fixed="1"),
    option(
        "slurm",
        "",
        "bring srun and Slurm's other commands into the container of a batch or interactive step",
        "They work whatever the image holds, on the node's network and with your own user id. Steps that such a "
        "script starts inherit the option, and take no notice of it where they have another network or are root "
        "inside.",
        fixed="1",
        pyxis=False,
    ),
    option("no-slurm", "", "do not bring Slurm's commands into the container", fixed="0", twin=False),
    option(
        "env",
        "NAME[,NAME...]",
        "variables that keep the job's value even if the image sets them",
        checks=early.ENV,
    ),
    option(
        "device",
        "VENDOR/CLASS=NAME|all[,...]",
        "devices of the node's CDI files besides the GPUs that Slurm granted, where the site allows it",
        "all stands for each device of that kind that the step may have. GPUs of --gres and --gpus are in the "
        "container without this option; NVIDIA_VISIBLE_DEVICES and AMD_VISIBLE_DEVICES, of the job or of "
        "the image, can take some of them away.",
        pyxis=False,
        checks=early.DEVICE,
    ),
    option(
        "rdma",
        "auto|none|NAME[,NAME]|N",
        "RDMA devices of the container, of those that the site lists",
        "auto is every one with an active port, N the first N of these. On a job's network the site's rdma.mode "
        "decides whether devices move into it (exclusive), or it gets a Soft-RoCE device of its own (soft).",
        pyxis=False,
        checks=early.RDMA,
    ),
    option(
        "unshare",
        "net|ipc|uts[,...]",
        "namespaces of the container's own: net leaves it only the loopback interface, ipc and uts every "
        "container has",
        "net is the same as --container-network=none.",
        checks=early.UNSHARE,
    ),
    option(
        "limit",
        "NAME=VALUE[,...]",
        "tighten what the job was granted: memory, swap, cpu, cpuset, pids, io, hugetlb, rdma",
        "memory=8G, swap=0, cpu=2.5 (processor time), cpuset=0-3,8 (which processors), pids=512 (processes and "
        "threads), io=8:0:rbps=100M:wiops=50 (rbps, wbps, riops, wiops of a disk), hugetlb=2M:1G (of a page "
        "size), rdma=mlx5_0:hca_handle=4:hca_object=1000. Each is for all tasks of the step on one node together.",
        pyxis=False,
        checks=early_limits.LIMIT,
    ),
    option(
        "cgroup",
        "readonly|delegate",
        "what a task may do with cgroups: see its step's, or make some below its own",
        "readonly is what a step gets without it. With delegate each task has a cgroup of its own as /sys/fs/cgroup, "
        "in which podman, a kubelet or your own program can make others, move its processes and divide what the "
        "step has. It ends with the task, and everything in it.",
        pyxis=False,
        checks=early.CGROUP,
    ),
    option(
        "network",
        "job|host|none",
        "network of the container: private to this job, the node's, or none",
        "On a job network the names of the job's nodes lead to their containers, and nobody else can "
        "reach them.",
        pyxis=False,
        checks=early.NETWORK,
    ),
    # Here comes, with what it needs: publish.
)

# Variables with which users name an interface. Where the container does not have it, the
# variable is reset, with a notice: otherwise MPI and NCCL fail far from the cause.
INTERFACE_VARIABLES: tuple[str, ...] = (
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "UCX_NET_DEVICES",
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_oob_tcp_if_include",
    "PRTE_MCA_prte_if_include",
    "MPIR_CVAR_CH3_NETWORK_IFNAME",
    "FI_TCP_IFACE",
    "FI_SOCKETS_IFACE",
    "FI_UDP_IFACE",
    "FI_VERBS_IFACE",
)

# Variables with which a user narrows the GPUs of a vendor (devices/choice.py).
VISIBLE_VARIABLES: tuple[str, ...] = ("NVIDIA_VISIBLE_DEVICES", "AMD_VISIBLE_DEVICES")

# 0 or 1: srun's --oom-kill-step, or what a batch script has of it (Slurm 24.11, src/srun/srun.c and
# src/slurmd/slurmstepd/task.c). Older releases do not know it, and hand on what the user exports.
OOM_VARIABLE = "SLURM_OOM_KILL_STEP"
