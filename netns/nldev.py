"""RDMA netlink (NETLINK_RDMA, "nldev"): messages, and reading devices, ports, resources, character devices.

The messages are described as pyroute2 describes its own: a class with `prefix` and `nla_map`, names and kinds as there,
so that class body and requests can go upstream with another base class. The agent does not import pyroute2 (14 MB and
100 ms, see docs/design.md), so a small codec reads the same map; a test builds pyroute2's message class from it and
compares bytes. The packing is pure; what takes a Netlink asks the kernel, in whose namespace that is.
Source: include/uapi/rdma/rdma_netlink.h, drivers/infiniband/core/nldev.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Any, NamedTuple

from enclos.netns.batch import NLM_F_DUMP, attribute, attributes, message, nested
from enclos.netns.netlink import Netlink, Reply

NETLINK_RDMA = 20
RDMA_NL_NLDEV = 5

RDMA_NLDEV_CMD_GET = 1
RDMA_NLDEV_CMD_SET = 2
RDMA_NLDEV_CMD_NEWLINK = 3
RDMA_NLDEV_CMD_PORT_GET = 5
RDMA_NLDEV_CMD_SYS_GET = 6
RDMA_NLDEV_CMD_SYS_SET = 7
RDMA_NLDEV_CMD_RES_GET = 9
RDMA_NLDEV_CMD_RES_QP_GET = 10
RDMA_NLDEV_CMD_RES_CM_ID_GET = 11
RDMA_NLDEV_CMD_GET_CHARDEV = 15

MODES = ("exclusive", "shared")
"""Values of RDMA_NLDEV_SYS_ATTR_NETNS_MODE."""

Attrs = list[tuple[str, Any]]


class NldevMessage:
    """A message of nldev: all commands have the same attributes, tables hold them again."""

    prefix = "RDMA_NLDEV_"
    nla_map = (
        ("RDMA_NLDEV_ATTR_UNSPEC", "none"),
        ("RDMA_NLDEV_ATTR_DEV_INDEX", "uint32"),
        ("RDMA_NLDEV_ATTR_DEV_NAME", "asciiz"),
        ("RDMA_NLDEV_ATTR_PORT_INDEX", "uint32"),
        ("RDMA_NLDEV_ATTR_CAP_FLAGS", "uint64"),
        ("RDMA_NLDEV_ATTR_FW_VERSION", "asciiz"),
        ("RDMA_NLDEV_ATTR_NODE_GUID", "uint64"),
        ("RDMA_NLDEV_ATTR_SYS_IMAGE_GUID", "uint64"),
        ("RDMA_NLDEV_ATTR_SUBNET_PREFIX", "uint64"),
        ("RDMA_NLDEV_ATTR_LID", "uint32"),
        ("RDMA_NLDEV_ATTR_SM_LID", "uint32"),
        ("RDMA_NLDEV_ATTR_LMC", "uint8"),
        ("RDMA_NLDEV_ATTR_PORT_STATE", "uint8"),
        ("RDMA_NLDEV_ATTR_PORT_PHYS_STATE", "uint8"),
        ("RDMA_NLDEV_ATTR_DEV_NODE_TYPE", "uint8"),
        ("RDMA_NLDEV_ATTR_RES_SUMMARY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_NAME", "asciiz"),
        ("RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_CURR", "uint64"),
        ("RDMA_NLDEV_ATTR_RES_QP", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_QP_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_LQPN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_RQPN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_RQ_PSN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_SQ_PSN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_PATH_MIG_STATE", "uint8"),
        ("RDMA_NLDEV_ATTR_RES_TYPE", "uint8"),
        ("RDMA_NLDEV_ATTR_RES_STATE", "uint8"),
        ("RDMA_NLDEV_ATTR_RES_PID", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_KERN_NAME", "asciiz"),
        ("RDMA_NLDEV_ATTR_RES_CM_ID", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_CM_ID_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_PS", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_SRC_ADDR", "cdata"),
        ("RDMA_NLDEV_ATTR_RES_DST_ADDR", "cdata"),
        ("RDMA_NLDEV_ATTR_RES_CQ", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_CQ_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_CQE", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_USECNT", "uint64"),
        ("RDMA_NLDEV_ATTR_RES_POLL_CTX", "uint8"),
        ("RDMA_NLDEV_ATTR_RES_MR", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_MR_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_RKEY", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_LKEY", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_IOVA", "uint64"),
        ("RDMA_NLDEV_ATTR_RES_MRLEN", "uint64"),
        ("RDMA_NLDEV_ATTR_RES_PD", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_PD_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_RES_LOCAL_DMA_LKEY", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_UNSAFE_GLOBAL_RKEY", "uint32"),
        ("RDMA_NLDEV_ATTR_NDEV_INDEX", "uint32"),
        ("RDMA_NLDEV_ATTR_NDEV_NAME", "asciiz"),
        ("RDMA_NLDEV_ATTR_DRIVER", "recursive"),
        ("RDMA_NLDEV_ATTR_DRIVER_ENTRY", "recursive"),
        ("RDMA_NLDEV_ATTR_DRIVER_STRING", "asciiz"),
        ("RDMA_NLDEV_ATTR_DRIVER_PRINT_TYPE", "uint8"),
        ("RDMA_NLDEV_ATTR_DRIVER_S32", "int32"),
        ("RDMA_NLDEV_ATTR_DRIVER_U32", "uint32"),
        ("RDMA_NLDEV_ATTR_DRIVER_S64", "int64"),
        ("RDMA_NLDEV_ATTR_DRIVER_U64", "uint64"),
        ("RDMA_NLDEV_ATTR_RES_PDN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_CQN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_MRN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_CM_IDN", "uint32"),
        ("RDMA_NLDEV_ATTR_RES_CTXN", "uint32"),
        ("RDMA_NLDEV_ATTR_LINK_TYPE", "asciiz"),
        ("RDMA_NLDEV_SYS_ATTR_NETNS_MODE", "uint8"),
        ("RDMA_NLDEV_ATTR_DEV_PROTOCOL", "asciiz"),
        ("RDMA_NLDEV_NET_NS_FD", "uint32"),
        ("RDMA_NLDEV_ATTR_CHARDEV_TYPE", "asciiz"),
        ("RDMA_NLDEV_ATTR_CHARDEV_NAME", "asciiz"),
        ("RDMA_NLDEV_ATTR_CHARDEV_ABI", "uint64"),
        ("RDMA_NLDEV_ATTR_CHARDEV", "uint64"),
    )


_INTEGERS = {"uint8": "=B", "uint32": "=I", "uint64": "=Q", "int32": "=i", "int64": "=q"}
_LAYOUTS = {kind: Struct(layout) for kind, layout in _INTEGERS.items()}
_NUMBERS = {name: (number, kind) for number, (name, kind) in enumerate(NldevMessage.nla_map)}


def encode(attrs: Iterable[tuple[str, Any]]) -> bytes:
    """Attributes by name; a table's value is a list of such pairs."""
    return b"".join(_encode(name, value) for name, value in attrs)


def _encode(name: str, value: Any) -> bytes:  # noqa: ANN401  # int, str, bytes, or a table of them
    number, kind = _NUMBERS[name]
    if kind == "recursive":
        return nested(number, encode(value))
    if kind == "asciiz":
        return attribute(number, value.encode() + b"\0")
    return attribute(number, value if kind == "cdata" else _LAYOUTS[kind].pack(value))


def decode(body: bytes) -> Attrs:
    """(name, value) of each attribute; those that this map does not have are left out, as a newer kernel's."""
    return list(_decode(body))


def _decode(body: bytes) -> Iterator[tuple[str, Any]]:
    for number, payload in attributes(body):
        if number >= len(NldevMessage.nla_map):
            continue
        name, kind = NldevMessage.nla_map[number]
        if kind == "recursive":
            yield name, decode(payload)
        elif kind == "asciiz":
            yield name, payload.rstrip(b"\0").decode(errors="surrogateescape")
        elif kind in _LAYOUTS and len(payload) == _LAYOUTS[kind].size:
            yield name, _LAYOUTS[kind].unpack(payload)[0]
        elif kind == "cdata":
            yield name, payload


def request(command: int, flags: int = 0, *attrs: tuple[str, Any]) -> bytes:
    """A message of one of the commands."""
    return message((RDMA_NL_NLDEV << 10) + command, flags, encode(attrs))


# ---------------------------------------------------------------- requests


def get_mode() -> bytes:
    """How network namespaces share RDMA devices."""
    return request(RDMA_NLDEV_CMD_SYS_GET)


def set_mode(mode: str) -> bytes:
    """EBUSY while there are other network namespaces."""
    return request(RDMA_NLDEV_CMD_SYS_SET, 0, ("RDMA_NLDEV_SYS_ATTR_NETNS_MODE", MODES.index(mode)))


def list_devices() -> bytes:
    """The devices that the namespace sees: in shared mode all of them."""
    return request(RDMA_NLDEV_CMD_GET, NLM_F_DUMP)


def list_ports(index: int) -> bytes:
    """The ports of a device, with their network interfaces."""
    return request(RDMA_NLDEV_CMD_PORT_GET, NLM_F_DUMP, ("RDMA_NLDEV_ATTR_DEV_INDEX", index))


def move_device(index: int, netns_fd: int) -> bytes:
    """Give a device to another network namespace.

    EOPNOTSUPP in shared mode, and where the driver cannot take its mappings away from programs (Soft-RoCE).
    """
    where = ("RDMA_NLDEV_ATTR_DEV_INDEX", index), ("RDMA_NLDEV_NET_NS_FD", netns_fd)
    return request(RDMA_NLDEV_CMD_SET, 0, *where)


def add_link(name: str, kind: str, ifname: str) -> bytes:
    """A software device ("rxe", "siw") on an interface of the namespace; it is gone with the interface.

    EEXIST where the name is taken, in any namespace, or the interface has one; EINVAL for an unknown kind.
    """
    parts = ("DEV_NAME", name), ("LINK_TYPE", kind), ("NDEV_NAME", ifname)
    return request(RDMA_NLDEV_CMD_NEWLINK, 0, *((f"RDMA_NLDEV_ATTR_{key}", value) for key, value in parts))


def count_resources() -> bytes:
    """How many queue pairs, memory regions and so on each device has."""
    return request(RDMA_NLDEV_CMD_RES_GET, NLM_F_DUMP)


def list_resources(command: int, index: int) -> bytes:
    """The queue pairs (RES_QP_GET) or connections (RES_CM_ID_GET) of a device, with who made them."""
    return request(command, NLM_F_DUMP, ("RDMA_NLDEV_ATTR_DEV_INDEX", index))


def get_chardev(index: int, kind: str) -> bytes:
    """The character device of a kind ("uverbs", "umad", "issm"); ENODATA where there is none."""
    return request(
        RDMA_NLDEV_CMD_GET_CHARDEV, 0, ("RDMA_NLDEV_ATTR_DEV_INDEX", index), ("RDMA_NLDEV_ATTR_CHARDEV_TYPE", kind)
    )


# ---------------------------------------------------------------- answers


class RdmaDevice(NamedTuple):
    """An RDMA device. `node_guid` is what stays the same when the kernel gives it another name."""

    dev_index: int
    name: str
    ports: int
    node_guid: int
    protocol: str


class RdmaPort(NamedTuple):
    """A port; `ifindex` and `ifname` are those of its network interface, 0 and "" where it has none that is seen."""

    port: int
    state: int
    ifindex: int
    ifname: str


class Resource(NamedTuple):
    """A queue pair or connection; `owner` is the kernel module that made it, "" for a process's."""

    kind: int
    owner: str
    pid: int


def parse_mode(reply: Reply) -> str:
    """ "exclusive" or "shared"."""
    return MODES[dict(decode(reply.body)).get("RDMA_NLDEV_SYS_ATTR_NETNS_MODE", 1) & 1]


def parse_device(reply: Reply) -> RdmaDevice:
    """One message of `list_devices`."""
    found = dict(decode(reply.body))
    return RdmaDevice(
        found["RDMA_NLDEV_ATTR_DEV_INDEX"],
        found["RDMA_NLDEV_ATTR_DEV_NAME"],
        found.get("RDMA_NLDEV_ATTR_PORT_INDEX", 0),
        found.get("RDMA_NLDEV_ATTR_NODE_GUID", 0),
        found.get("RDMA_NLDEV_ATTR_DEV_PROTOCOL", ""),
    )


def parse_port(reply: Reply) -> RdmaPort:
    """One message of `list_ports`."""
    found = dict(decode(reply.body))
    return RdmaPort(
        found["RDMA_NLDEV_ATTR_PORT_INDEX"],
        found.get("RDMA_NLDEV_ATTR_PORT_STATE", 0),
        found.get("RDMA_NLDEV_ATTR_NDEV_INDEX", 0),
        found.get("RDMA_NLDEV_ATTR_NDEV_NAME", ""),
    )


def parse_counts(reply: Reply) -> tuple[str, dict[str, int]]:
    """(device, number of resources by name) of one message of `count_resources`."""
    found = dict(decode(reply.body))
    rows = [dict(row) for _, row in found.get("RDMA_NLDEV_ATTR_RES_SUMMARY", ())]
    counts = {
        row["RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_NAME"]: row["RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_CURR"] for row in rows
    }
    return found["RDMA_NLDEV_ATTR_DEV_NAME"], counts


def parse_resources(reply: Reply) -> list[Resource]:
    """The rows of one message of `list_resources`."""
    rows = [row for name, table in decode(reply.body) if name in _TABLES for _, row in table]
    return [
        Resource(
            found.get("RDMA_NLDEV_ATTR_RES_TYPE", -1),
            found.get("RDMA_NLDEV_ATTR_RES_KERN_NAME", ""),
            found.get("RDMA_NLDEV_ATTR_RES_PID", 0),
        )
        for found in map(dict, rows)
    ]


_TABLES = ("RDMA_NLDEV_ATTR_RES_QP", "RDMA_NLDEV_ATTR_RES_CM_ID")


def format_guid(guid: int) -> str:
    """As `rdma` prints it."""
    text = f"{guid:016x}"
    return ":".join(text[i : i + 4] for i in range(0, 16, 4))


# ---------------------------------------------------------------- asking the kernel


def mode(nl: Netlink) -> str:
    """The node's mode."""
    return parse_mode(nl.query(get_mode(), "RDMA namespace mode")[0])


def devices(nl: Netlink) -> list[RdmaDevice]:
    """The devices of nl's namespace."""
    return [parse_device(reply) for reply in nl.query(list_devices(), "RDMA devices")]


def ports(nl: Netlink, device: RdmaDevice) -> list[RdmaPort]:
    """The ports of a device."""
    return [parse_port(reply) for reply in nl.query(list_ports(device.dev_index), f"ports of {device.name}")]


def counts(nl: Netlink) -> dict[str, dict[str, int]]:
    """Numbers of resources by device and name."""
    return dict(parse_counts(reply) for reply in nl.query(count_resources(), "RDMA resources"))


def resources(nl: Netlink, device: RdmaDevice) -> list[Resource]:
    """The queue pairs and connections on a device."""
    found: list[Resource] = []
    for command in (RDMA_NLDEV_CMD_RES_QP_GET, RDMA_NLDEV_CMD_RES_CM_ID_GET):
        for reply in nl.query(list_resources(command, device.dev_index), f"resources of {device.name}"):
            found += parse_resources(reply)
    return found


def kernel_owners(nl: Netlink, device: RdmaDevice) -> set[str]:
    """Kernel modules that have queue pairs or connections on the device (ib_core's are there always)."""
    return {resource.owner for resource in resources(nl, device) if resource.owner}


def chardev(nl: Netlink, device: RdmaDevice, kind: str) -> str:
    """The name below /dev/infiniband of a device's node; KernelRefused where it has none."""
    (reply,) = nl.query(get_chardev(device.dev_index, kind), f"{kind} of {device.name}")
    return str(dict(decode(reply.body))["RDMA_NLDEV_ATTR_CHARDEV_NAME"])
