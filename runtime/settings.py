"""One row per setting of enclos.yaml: their only source. options.py has those of srun's options.

From these rows come the configuration file with its explanations, the JSON schema, the
environment names and the tables of the manual: `python -m enclos.runtime.settings --write`
makes them again, and a test compares. A section of the file is a dataclass, a row is a field of it, so that
`config.network.port` is typed.

Must not hold: checks of values (kinds.py), reading of files (config.py), decisions
(policy.py), generators (generate.py). Pure; imported by the agent, the command line and the
generators alike, so it stays light.
"""

# ruff: noqa: RUF009  # setting() and section() are dataclasses.field()

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from enclos.runtime.kinds import Amount, Block, Choice, Flag, Kind, Number, Several, SiteLimit, SiteMount, Size, Text

T = TypeVar("T")

NETWORKS = ("host", "job", "none")


def setting(default: T, kind: Kind, help: str) -> T:
    """One row: default, kind of value, and what it does in the words of the manual."""
    return field(default=default, metadata={"kind": kind, "help": help})


def section(cls: type[T]) -> T:
    """A nested section; its docstring is its explanation."""
    return field(default_factory=cls, metadata={"section": cls})


@dataclass(frozen=True, slots=True)
class Step:
    """What a job step gets when its user says nothing, and what users may ask for."""

    default_network: str = setting(
        "host",
        Choice(*NETWORKS),
        "Network of a step that names none with --container-network. 'host' keeps the node's network, as "
        "a step without a container has it; 'job' gives the job a private network of its own; 'none' "
        "gives only the loopback interface. Batch and interactive steps stay on 'host' unless they ask by"
        " name, because an srun that runs in them has to reach slurmctld.",
    )
    networks: tuple[str, ...] = setting(
        NETWORKS,
        Several(Choice(*NETWORKS), least=1),
        "Networks that users may ask for. It has to include step.default_network.",
    )
    build_deadline_seconds: int = setting(
        20,
        Number(1, 600),
        "Seconds that the making of a container may take. A builder that takes longer is ended and tried "
        "once more; then the step fails with a message.",
    )
    entrypoint: bool = setting(
        False,
        Flag(),
        "Run an image's entrypoint before the tasks when the user gives neither --container-entrypoint nor "
        "--no-container-entrypoint.",
    )
    spare_builder: bool = setting(
        True,
        Flag(),
        "Keep a process that waits to make the next container. Steps start some milliseconds earlier; it "
        "takes about 4 MB of memory and sleeps.",
    )
    allow_root: bool = setting(
        False,
        Flag(),
        "Let steps of root run in containers. Root in a container of its own user namespace is root of "
        "the node, so this protects nothing: leave it off.",
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Containers without Slurm: 'enclos run'."""

    allow: str = setting(
        "auto",
        Choice("auto", "always", "never"),
        "Whether users may start containers with 'enclos run'. 'auto': on machines that are no node of Slurm's, that "
        "is where the agent finds neither slurmd nor a slurm.conf, and no job was ever announced to it. 'always': on "
        "nodes of Slurm's as well; such a container belongs to no job, and with --container-limit it is outside of "
        "Slurm's cgroups.",
    )
    per_user: int = setting(
        16, Number(1, 10000), "Containers of 'enclos run' that one user may have on the machine at the same time."
    )


@dataclass(frozen=True, slots=True)
class Rootfs:
    """The root file system of containers."""

    writable: bool = setting(
        True,
        Flag(),
        "Whether a container's root file system can be written to when the user gives neither "
        "--container-writable nor --container-readonly. What is written lives in memory and is gone with "
        "the step.",
    )
    tmpfs_size: str = setting(
        "2G",
        Size(),
        "Most that the tasks of a step may write into the root file system on one node. It counts as "
        "memory of the tasks that write it.",
    )
    shm_size: str = setting("50%", Size(), "Size limit of /dev/shm in the container.")
    remap_root: bool = setting(
        False,
        Flag(),
        "Show users as root inside their containers when they give neither --container-remap-root nor "
        "--no-container-remap-root. It gives no power outside.",
    )


@dataclass(frozen=True, slots=True)
class Named:
    """Containers that a user named with --container-name: what is written into them is kept between steps."""

    scope: str = setting(
        "job",
        Choice("job", "global"),
        "How long a named container is kept: 'job', until the end of the job that made it, or 'global', for"
        " all jobs of its user on the node until 'enclos rm' removes it. 'global' needs named.directory.",
    )
    size: str = setting(
        "2G",
        Size(),
        "Most that may be written into one named container on one node.",
    )
    per_user: int = setting(
        8, Number(1, 10000), "Named containers that one user may have on one node at the same time."
    )
    directory: str = setting(
        "",
        Text(r"|/[^\s:,]*[^\s:,/]", "an absolute path, or empty"),
        "Directory on a local disk of the node that holds what is written into named containers, in one file"
        " of named.size for each. Empty: they are in memory, which counts as the tasks' own, as the root file"
        " system of other containers.",
    )


@dataclass(frozen=True, slots=True)
class Mounts:
    """What containers see of the node's file systems."""

    home: bool = setting(
        False,
        Flag(),
        "Mount the user's home directory when the user gives neither --container-mount-home nor "
        "--no-container-mount-home.",
    )
    user: bool = setting(
        True, Flag(), "Let users mount with --container-mounts what they can read on the node."
    )
    site: tuple[str, ...] = setting(
        (),
        Several(SiteMount()),
        "Mounts that every container gets, in the syntax of --container-mounts, for example "
        '"/scratch" or "/opt/site:/opt/site:ro". Sources are opened with the rights of the step\'s user.',
    )


@dataclass(frozen=True, slots=True)
class Images:
    """Where root file systems come from."""

    user_files: str = setting(
        "fuse",
        Choice("fuse", "refuse", "trust"),
        "Squashfs files that do not belong to root. 'fuse': squashfuse reads them, as their user; slower than "
        "the kernel, and nothing to fear. 'refuse' them. 'trust' any file that the user can read: the node's "
        "kernel reads the file's structures, so a file crafted by a user could attack it; choose that only "
        "where users are trusted that far. Directories are always accepted.",
    )
    site_store: str = setting(
        "",
        Text(r"|/[^\s:,\\]*", "an absolute path, or empty"),
        "Directory of the site's images, on a file system that all nodes see. Root fills it with 'enclos image pull', "
        "users only read. Before a registry is asked, an image is looked for here. Empty: there is none.",
    )
    user_store: str = setting(
        "{home}/.local/share/enclos/images",
        Text(r"|(/|\{home\}/)[^\s:,\\]*", "an absolute path, perhaps with {home} or {user} in it, or empty"),
        "Directory of a user's images, which 'enclos image pull' fills; best on a shared file system, as "
        "'/scratch/{user}/images'. An image is looked for there after the site's store. Empty: users have none.",
    )
    site_verify: str = setting(
        "boot",
        Choice("boot", "never"),
        "When the bytes of an image of the site's store are compared with their checksum: 'boot', at its first use on "
        "a node after the node has booted, for which each node reads the whole file once; 'never', then only its size "
        "is.",
    )
    user_verify: str = setting(
        "boot", Choice("boot", "never"), "The same for images of users' stores; their users' rights are used."
    )
    idle_seconds: int = setting(
        600,
        Number(0, 86400),
        "Seconds that an image stays mounted on a node after its last step. The next step with it starts "
        "faster.",
    )


@dataclass(frozen=True, slots=True)
class Imports:
    """How images of registries and archives come into the node's cache."""

    default_registry: str = setting(
        "",
        Text(
            r"|[A-Za-z0-9.\[\]:-]+(/[a-z0-9._/-]+)?",
            "REGISTRY[:PORT][/PREFIX], or empty",
        ),
        "Registry of images that are named without one, as NAME:TAG. Empty: they are not found. 'docker.io/library' "
        "is where docker finds its own.",
    )
    cache_directory: str = setting(
        "/var/cache/enclos",
        Text(r"/[^\s:,\\]*", "an absolute path"),
        "Directory of the node's cache, on a local disk. It belongs to root, and no user can enter it.",
    )
    cache_size: str = setting(
        "100G",
        Amount(),
        "Most that the cache may hold. Images that were not used for longest go first, those in use stay. A larger "
        "image is refused.",
    )
    deadline_seconds: int = setting(3600, Number(10, 86400), "Seconds that an import may take.")
    slots: int = setting(4, Number(1, 64), "Imports that a node makes at the same time; others wait.")
    first_uid: int = setting(
        65520,
        Number(1, 4294967000),
        "The first of as many user ids as there are imports.slots. Each import has one of its own, which may belong "
        "to nobody and own nothing.",
    )
    memory: str = setting(
        "228M",
        Amount(),
        "Most memory of each process that converts layers. Of one image one at a time may need more than 1/24 of it. "
        "Enough for a million files with names of 100 characters; an image that needs more is refused.",
    )
    limit_files: int = setting(
        1000000,
        Number(1000, 100000000),
        "Most files that an image may have. While it is imported, a million need about 100 MB of memory.",
    )
    limit_bytes: str = setting("100G", Amount(), "Most bytes that an image may have, downloaded and unpacked.")
    compression: str = setting(
        "zstd",
        Choice("zstd", "lz4", "gzip", "xz"),
        "Compression of imported images. zstd at a low level starts fast and is small; lz4 is larger.",
    )
    level: int = setting(1, Number(0, 22), "Level of that compression; 0 for its own default. Not for lz4.")
    block_size: str = setting(
        "128K",
        Choice("64K", "128K", "256K", "512K", "1M"),
        "Block size of imported images: larger ones are smaller on disk, and slower where little of a file is read.",
    )
    prefetch: bool = setting(
        True,
        Flag(),
        "Fetch the image that sbatch or salloc named when the job's prolog runs on a node, before its first step asks.",
    )
    verify: str = setting(
        "boot",
        Choice("boot", "never"),
        "When the bytes of a cached image are compared with their checksum: 'boot', at its first use after the node "
        "has booted, which takes about a second per GB; 'never'. For those of stores see images.site_verify.",
    )


@dataclass(frozen=True, slots=True)
class Underlay:
    """The network between the nodes that carries the containers' traffic."""

    interface: str = setting(
        "",
        Text(r"|[^\s/:]{1,15}", "the name of a network interface, or empty"),
        "Network interface of the node. Empty: the one that holds the address that network.underlay.name "
        "resolves to.",
    )
    name: str = setting(
        "{node}",
        Text(r"[A-Za-z0-9._-]*\{node\}[A-Za-z0-9._-]*", 'a host name with {node} in it, such as "{node}-ib"'),
        "Host name of a node on that network; {node} stands for Slurm's name of the node. Write it in "
        "quotes.",
    )


@dataclass(frozen=True, slots=True)
class Network:
    """Private networks: an overlay (VXLAN) per job between its nodes."""

    underlay: Underlay = section(Underlay)
    port: int = setting(
        4789,
        Number(1024, 65535),
        "UDP port of the overlay, the same on all nodes. Nothing but the agents may use it.",
    )
    ifname: str = setting(
        "enclos0",
        Text(
            r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", "an interface name of at most 15 letters, digits, _ . or -"
        ),
        "Name of the interface inside the containers of a private network.",
    )
    ipv4: str = setting(
        "10.77.0.0/16",
        Block(4, 8, 24),
        "Addresses of a job's network. Every job uses the same ones: the networks do not see each other. "
        "It may not overlap with networks that containers have to reach.",
    )
    ipv6: str = setting("fd65:6e63:6c6f::/48", Block(6, 16, 64), "The same for IPv6.")
    relay_uid: int = setting(
        65534,
        Number(1, 4294967293),
        "User id of the process that carries PMIx connections into a private network.",
    )


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of containers: GPUs that Slurm grants, others by name, nodes of /dev."""

    nodes: tuple[str, ...] = setting(
        (),
        Several(Text(r"/dev(?!.*/\.\.?(?:/|$))/[^\s:,]+", "a path below /dev")),
        "Device nodes that every container gets beside the usual ones, for example /dev/fuse or "
        "/dev/infiniband/uverbs0. Their owner and mode on the node still decide who may open them.",
    )
    cdi: tuple[str, ...] = setting(
        ("/etc/cdi", "/var/run/cdi"),
        Several(Text(r"/[^:,\n]*", "an absolute path")),
        "Directories with CDI files (Container Device Interface, .json or .yaml), which say what belongs to "
        "a device: nodes, libraries, variables. A file in a later directory counts more. The files and "
        "directories have to be root's alone.",
    )
    allow: tuple[str, ...] = setting(
        (),
        Several(Text(r"[A-Za-z0-9._*?-]+/[A-Za-z0-9._*?-]+=[A-Za-z0-9._:*?-]+", "VENDOR/CLASS=NAME, with * and ?")),
        "Devices of CDI files that users may name with --container-device, as patterns: "
        '"acme.com/fpga=*". GPUs that Slurm granted to the step need none, and no pattern opens a GPU that '
        "Slurm manages and did not grant.",
    )
    gpus: tuple[str, ...] = setting(
        (),
        Several(Text(r"/dev/[^\s:]+", "a path below /dev, or several as /dev/nvidia[0-3]")),
        "Device files of Slurm's GPUs on this node, in the order of gres.conf. Empty: the agent asks "
        "'slurmd -G'.",
    )


@dataclass(frozen=True, slots=True)
class Rdma:
    """RDMA devices (InfiniBand, RoCE, iWARP) of containers."""

    devices: tuple[str, ...] = setting(
        (),
        Several(Text(r"[A-Za-z0-9._*?-]{1,63}", "the name of an RDMA device, with * and ?")),
        "RDMA devices that containers may have, as patterns of their names in 'rdma dev': \"mlx5_*\". A "
        "container opens the nodes (uverbs) of its own devices only; never umad or issm.",
    )
    default: str = setting(
        "none",
        Choice("none", "auto"),
        "What a step on the node's network gets when it says nothing with --container-rdma: 'auto' is every "
        "device of rdma.devices that has an active port. On a job's network it counts only with rdma.mode soft.",
    )
    mode: str = setting(
        "exclusive",
        Choice("exclusive", "shared", "soft"),
        "What --container-rdma gives on a job's network. 'exclusive': the devices move into it and nobody else "
        "sees them; the kernel has to be in that mode (ib_core netns_mode=0), else such a step is refused. "
        "'shared': nodes of devices that stay in the node's namespace and are other jobs' as well; nothing is "
        "isolated. 'soft': a Soft-RoCE device of the job's own over its overlay, for development and for sites "
        "without RDMA hardware; rdma.devices does not matter.",
    )
    pools: tuple[str, ...] = setting(
        (),
        Several(Text(r"[A-Za-z0-9._*?-]{1,63}", "the name of an RDMA device, with * and ?")),
        "RDMA devices whose SR-IOV virtual functions are for containers as well, spread over these devices. "
        "The site makes the functions and binds their driver; the devices named here stay the node's.",
    )
    ipv4: str = setting(
        "10.78.0.0/16",
        Block(4, 8, 24),
        "Addresses of the first interface of each RDMA device that moves into a job's network (RoCE): eight "
        "parts, one for each device that the job has on a node.",
    )
    ipv6: str = setting("fd65:6e63:7264::/48", Block(6, 16, 64), "The same for IPv6; these have the job's VNI in them.")
    hook: str = setting(
        "",
        Text(r"|/[^\n]*", "an absolute path, or nothing"),
        "Command of the site that puts a device into the partition or VLAN of a job: it is run as root with "
        "'attach' before a device moves and with 'detach' when it is back, with ENCLOS_TENANT, ENCLOS_JOB, ENCLOS_VNI, "
        "ENCLOS_DEVICE, ENCLOS_GUID, ENCLOS_PORT_GUIDS and ENCLOS_INTERFACES in its environment.",
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of containers (cgroup v2). They only ever tighten what Slurm granted."""

    default: tuple[str, ...] = setting(
        (),
        Several(SiteLimit()),
        "Limits of a step whose user says nothing about that resource with --container-limit, for example "
        '["pids=4096", "partition:debug memory=4G,swap=0", "account:lab cpu=8"]. The account\'s come before the '
        "partition's, and those before everybody's.",
    )
    maximum: tuple[str, ...] = setting(
        (),
        Several(SiteLimit()),
        "What no step gets more of, in the same syntax. Of those that apply the smallest holds; a step whose "
        "user says nothing and that has no default gets the maximum itself.",
    )
    oom_group: bool = setting(
        True,
        Flag(),
        "Where a memory limit is set here or by the user, let the kernel end all processes of the step on "
        "the node when it is reached, as Slurm's OOMKillStep does. When false it ends the largest one. A step "
        "with SLURM_OOM_KILL_STEP=0, as srun --oom-kill-step=0 of Slurm 24.11 has it, is left as it is; what Slurm "
        "has set is never undone.",
    )
    delegate: bool = setting(
        True,
        Flag(),
        "Whether users may ask for cgroups of their own below their tasks' with --container-cgroup=delegate. They "
        "divide what the step has and end with it; the kernel keeps up to 4,096 of them for a task.",
    )


@dataclass(frozen=True, slots=True)
class Log:
    """The agent's log; it goes to standard error, which systemd keeps in the journal."""

    level: str = setting(
        "info", Choice("debug", "info", "warning", "error"), "Least important messages that are logged."
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of Enclos on this node."""

    enabled: bool = setting(
        True,
        Flag(),
        "The kill switch. When false, steps that ask for a container fail with a message; all others run "
        "as usual.",
    )
    step: Step = section(Step)
    run: Run = section(Run)
    rootfs: Rootfs = section(Rootfs)
    named: Named = section(Named)
    mounts: Mounts = section(Mounts)
    images: Images = section(Images)
    imports: Imports = section(Imports)
    network: Network = section(Network)
    devices: Devices = section(Devices)
    limits: Limits = section(Limits)
    rdma: Rdma = section(Rdma)
    log: Log = section(Log)


@dataclass(frozen=True, slots=True)
class Row:
    """A setting as the generators and the loader see it."""

    key: str
    default: object
    kind: Kind
    help: str

    @property
    def env(self) -> str:
        """Name of the environment variable that overrides it for daemon and command line."""
        return "ENCLOS_" + self.key.upper().replace(".", "_")


def subsections(cls: type[Any]) -> dict[str, type[Any]]:
    """Names and classes of the sections directly in a section."""
    return {f.name: f.metadata["section"] for f in fields(cls) if "section" in f.metadata}


def rows(cls: type[Any] = Config, prefix: str = "") -> Iterator[Row]:
    """All settings in the order of the file."""
    for f in fields(cls):
        if "section" in f.metadata:
            yield from rows(f.metadata["section"], f"{prefix}{f.name}.")
        else:
            yield Row(prefix + f.name, f.default, f.metadata["kind"], f.metadata["help"])


if __name__ == "__main__":
    from enclos.runtime import generate

    sys.exit(generate.main(sys.argv[1:]))
