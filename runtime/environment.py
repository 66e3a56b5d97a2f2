"""Which variables a container's tasks get besides the job's: rules, no process's own environment. Pure.

The image brings variables in its /etc/environment, as enroot's and our importer write it. They win over
the job's, as users know it from pyxis, except for what Slurm and MPI's start depend on. Variables that
name a network interface are taken away where the container's network has no such interface.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# All of it travels in one packet of 128 KiB, with room for the rest of the reply.
MOST_BYTES = 65536
MOST_VARIABLES = 1024

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Set by Slurm, by its MPI plugins or by us for this very task. "PMI" covers PMI_, PMI2_ and PMIX_.
PROTECTED_PREFIXES = ("SLURM", "SRUN_", "SPANK_", "PMI", "ENCLOS_", "OMPI_COMM_WORLD_", "MPIR_")
# The user's identity and terminal, and what Slurm's gres plugins decide.
PROTECTED_NAMES = frozenset(
    {"HOME", "USER", "LOGNAME", "PWD", "OLDPWD", "TMPDIR", "HOSTNAME", "TERM"}
    | {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
)

# UCX reads from a datagram's completion whether its header is IPv4's or IPv6's, from a field that only mlx5 fills
# (uct_ud_iface_check_grh, src/uct/ib/ud/base/ud_inl.h). Soft-RoCE leaves it 0, UCX drops each datagram over IPv4 as
# another one's, and programs end after half a minute with "UD endpoint: unhandled timeout error".
SOFT_ROCE = "UCX_UD_VERBS_ETH_DGID_CHECK=n"
# A UCX built without InfiniBand (1.23 of Debian's unstable) knows no such variable, and says so on the standard output
# of every task.
UCX_QUIET = "UCX_WARN_UNUSED_ENV_VARS=n"


@dataclass(frozen=True, slots=True)
class Unset:
    """Variables to take away, and the one line that tells the user, or ""."""

    names: tuple[str, ...] = ()
    notice: str = ""


def parse_etc_environment(data: bytes) -> list[tuple[str, str]]:
    """The (name, value) lines of an image's /etc/environment, in order.

    A line is `NAME=VALUE`, perhaps after `export `, the value perhaps in one pair of quotes.
    """
    return list(_bounded(_unquoted(raw) for raw in _lines(data)))


def parse_plain(data: bytes) -> list[tuple[str, str]]:
    """The (name, value) lines of a text in which nothing is quoted: a registry's configuration, Charliecloud's file."""
    return list(_bounded(raw.partition("=")[::2] for raw in _lines(data) if "=" in raw))


def _lines(data: bytes) -> Iterator[str]:
    return (raw.decode(errors="surrogateescape") for raw in data[: 2 * MOST_BYTES].split(b"\n"))


def _unquoted(raw: str) -> tuple[str, str]:
    name, _, value = raw.strip().removeprefix("export ").lstrip().partition("=")
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return name, value


def _bounded(variables: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What are variables, as many as there is room for: an image must not be able to fill the reply.

    What is beyond MOST_VARIABLES or MOST_BYTES (names, values and two bytes each) is left out.
    """
    room, count = MOST_BYTES, 0
    for name, value in variables:
        if not NAME.fullmatch(name) or "\0" in value:
            continue
        room -= len(name) + len(value.encode(errors="surrogateescape")) + 2
        count += 1
        if room < 0 or count > MOST_VARIABLES:
            return
        yield name, value


def is_protected(name: str) -> bool:
    """Whether an image may not set this variable."""
    return name in PROTECTED_NAMES or name.startswith(PROTECTED_PREFIXES)


def from_image(variables: Iterable[tuple[str, str]], keep: Collection[str]) -> list[tuple[str, str]]:
    """The image's variables that the tasks get; the last of a name wins.

    Args:
        variables: as parse_etc_environment returns them.
        keep: names given with --container-env, whose values stay the job's.
    """
    merged = {name: value for name, value in variables if name not in keep and not is_protected(name)}
    return list(merged.items())


# A locale of the node is not necessarily one of the image, and programs complain of one that is not there.
NODE_ONLY_NAMES = ("LANG",)


def path_with(path: str, directory: str) -> str:
    """The image's PATH with a directory of commands that were brought into the container, last if it is not there."""
    return path if directory in path.split(":") else f"{path}:{directory}"


def unset_interfaces(
    variables: Mapping[str, str],
    interfaces: Collection[str],
    addresses: Sequence[str] = (),
    devices: Collection[str] = (),
) -> Unset:
    """The variables that only name interfaces which are not there. Scripts set them for the host.

    Args:
        variables: those of the job that name interfaces (NCCL_SOCKET_IFNAME, ...).
        interfaces: names in the container's network.
        addresses: its addresses, for values that are subnets.
        devices: its RDMA devices, for UCX.
    """
    names = tuple(
        name
        for name, value in variables.items()
        if value.strip()
        and not any(_is_there(name, entry, interfaces, addresses, devices) for entry in _entries(value))
    )
    if not names:
        return Unset()
    given = ", ".join(f"{name}={variables[name]}" for name in names)
    there = ", ".join(sorted(interfaces)) or "none"
    return Unset(names, f"unset {given}: no such interface in the container's network (it has {there})")


def _entries(value: str) -> list[str]:
    """The entries of a list of interfaces; a list of exclusions ("^a,b") is one entry "^".

    A list that begins with "=" (NCCL: exact names, not prefixes) gives entries that do.
    """
    if value.startswith("^"):
        return ["^"]
    mark = "=" if value.startswith("=") else ""
    return [mark + entry.strip() for entry in value.removeprefix("=").split(",") if entry.strip()]


def _is_there(
    name: str, entry: str, interfaces: Collection[str], addresses: Sequence[str], devices: Collection[str]
) -> bool:
    if entry in ("^", "all", "any"):
        return True
    if name.startswith("NCCL_"):
        wanted, _, _ = entry.removeprefix("=").partition(":")
        if entry.startswith("="):
            return wanted in interfaces
        return any(known.startswith(wanted) for known in interfaces)
    if "/" in entry:
        return _in_subnet(entry, addresses)
    device, _, _ = entry.partition(":")
    return entry in interfaces or device in devices or entry in addresses


def _in_subnet(entry: str, addresses: Sequence[str]) -> bool:
    try:
        subnet = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
    return any(ipaddress.ip_address(address) in subnet for address in addresses)
