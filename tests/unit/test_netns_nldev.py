"""RDMA netlink without an RDMA device: pyroute2's reading of our map, and the `rdma` tool's of our bytes.

The tool speaks to a process that answers as the kernel would, with messages that are packed here. What it asks is
compared with what we ask, what it prints of the answers with what was put into them. The real kernel's answers:
tests/kernel/test_rdma_nldev.py, in a guest.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from enclos.netns import nldev
from enclos.netns.batch import HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR
from enclos.netns.netlink import Reply, replies
from enclos.netns.nldev import NldevMessage, RdmaDevice, RdmaPort
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import nla, nlmsg  # type: ignore[import-untyped]

HEADER_FILE = Path("/usr/include/rdma/rdma_netlink.h")


class Upstream(nlmsg):  # type: ignore[misc]
    """What pyroute2 would have: the same map below its own base; tables have it again."""

    prefix = NldevMessage.prefix
    nla_map = tuple((name, "table" if kind == "recursive" else kind) for name, kind in NldevMessage.nla_map)

    class table(nla):  # type: ignore[misc]  # pyroute2 names classes of attributes so
        prefix = NldevMessage.prefix
        nla_map = NldevMessage.nla_map


SUMMARY = [
    (
        "RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY",
        [("RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_NAME", name), ("RDMA_NLDEV_ATTR_RES_SUMMARY_ENTRY_CURR", count)],
    )
    for name, count in (("pd", 2), ("qp", 3))
]
DEVICE: nldev.Attrs = [
    ("RDMA_NLDEV_ATTR_DEV_INDEX", 4),
    ("RDMA_NLDEV_ATTR_DEV_NAME", "mlx5_0"),
    ("RDMA_NLDEV_ATTR_PORT_INDEX", 1),
    ("RDMA_NLDEV_ATTR_FW_VERSION", "16.35"),
    ("RDMA_NLDEV_ATTR_NODE_GUID", 0x0002C90300001234),
    ("RDMA_NLDEV_ATTR_SYS_IMAGE_GUID", 0x0002C90300001230),
    ("RDMA_NLDEV_ATTR_DEV_NODE_TYPE", 1),
    ("RDMA_NLDEV_ATTR_DEV_PROTOCOL", "ib"),
]
PORT: nldev.Attrs = [
    ("RDMA_NLDEV_ATTR_DEV_INDEX", 4),
    ("RDMA_NLDEV_ATTR_DEV_NAME", "mlx5_0"),
    ("RDMA_NLDEV_ATTR_PORT_INDEX", 1),
    ("RDMA_NLDEV_ATTR_PORT_STATE", 4),
    ("RDMA_NLDEV_ATTR_PORT_PHYS_STATE", 5),
    ("RDMA_NLDEV_ATTR_NDEV_INDEX", 7),
    ("RDMA_NLDEV_ATTR_NDEV_NAME", "ib0"),
]
RESOURCES: nldev.Attrs = [*DEVICE[:2], ("RDMA_NLDEV_ATTR_RES_SUMMARY", SUMMARY)]
ENTRY = "RDMA_NLDEV_ATTR_RES_QP_ENTRY"
QUEUES: nldev.Attrs = [
    *DEVICE[:2],
    (
        "RDMA_NLDEV_ATTR_RES_QP",
        [
            (ENTRY, [("RDMA_NLDEV_ATTR_RES_TYPE", 1), ("RDMA_NLDEV_ATTR_RES_KERN_NAME", "ib_core")]),
            (ENTRY, [("RDMA_NLDEV_ATTR_RES_TYPE", 2), ("RDMA_NLDEV_ATTR_RES_PID", 77)]),
        ],
    ),
]  # fmt: skip
SYSTEM: nldev.Attrs = [("RDMA_NLDEV_SYS_ATTR_NETNS_MODE", 0)]


def reply(command: int, attrs: nldev.Attrs, sequence: int = 0, flags: int = 0) -> bytes:
    body = nldev.encode(attrs)
    return HEADER.pack(HEADER.size + len(body), (nldev.RDMA_NL_NLDEV << 10) + command, flags, sequence, 0) + body


def parsed(attrs: nldev.Attrs) -> Reply:
    return Reply(0, 0, 0, 0, nldev.encode(attrs))


@pytest.mark.skipif(not HEADER_FILE.exists(), reason="needs linux-libc-dev's rdma/rdma_netlink.h")
def test_the_map_is_the_headers(tmp_path: Path) -> None:
    """Each name stands at the number that the kernel's header gives it."""
    names = [name for name, _ in NldevMessage.nla_map]
    rows = "".join(f'printf("%d\\n", {name});' for name in names)
    source = tmp_path / "names.c"
    source.write_text(f"#include <rdma/rdma_netlink.h>\n#include <stdio.h>\nint main(void) {{ {rows} return 0; }}\n")
    subprocess.run(["cc", "-o", tmp_path / "names", source], check=True)
    printed = subprocess.run([tmp_path / "names"], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in printed.split()] == list(range(len(names)))


@pytest.mark.parametrize("attrs", [DEVICE, PORT, RESOURCES, QUEUES, SYSTEM])
def test_pyroute2_packs_and_reads_the_same_from_the_same_map(attrs: nldev.Attrs) -> None:
    def tables(value: Any) -> Any:  # noqa: ANN401
        return {"attrs": [(n, tables(v)) for n, v in value]} if isinstance(value, list) else value

    ours = reply(nldev.RDMA_NLDEV_CMD_GET, attrs)
    theirs = Upstream()
    theirs["attrs"] = [(name, tables(value)) for name, value in attrs]
    theirs["header"] = {"type": (nldev.RDMA_NL_NLDEV << 10) + nldev.RDMA_NLDEV_CMD_GET, "flags": 0}
    theirs.encode()
    body = bytes(theirs.data[HEADER.size :])
    # pyroute2 leaves NLA_F_NESTED to the class of the attribute; the kernel wants it on none of these.
    assert nldev.decode(body) == attrs == nldev.decode(ours[HEADER.size :])
    read = Upstream(ours)
    read.decode()
    assert plain(read["attrs"]) == attrs


def plain(attrs: Any) -> nldev.Attrs:  # noqa: ANN401
    return [(name, plain(value["attrs"]) if hasattr(value, "get") else value) for name, value in map(tuple, attrs)]


def test_answers_as_objects() -> None:
    assert nldev.parse_device(parsed(DEVICE)) == RdmaDevice(4, "mlx5_0", 1, 0x0002C90300001234, "ib")
    assert nldev.parse_port(parsed(PORT)) == RdmaPort(1, 4, 7, "ib0")
    assert nldev.parse_counts(parsed(RESOURCES)) == ("mlx5_0", {"pd": 2, "qp": 3})
    assert nldev.parse_mode(parsed(SYSTEM)) == "exclusive"
    assert [(r.kind, r.owner, r.pid) for r in nldev.parse_resources(parsed(QUEUES))] == [(1, "ib_core", 0), (2, "", 77)]
    assert nldev.format_guid(0x0002C90300001234) == "0002:c903:0000:1234"


@given(st.binary(max_size=512))
def test_any_bytes_can_be_read(body: bytes) -> None:
    nldev.decode(body)


# ---------------------------------------------------------------- the rdma tool

# Lets the tool speak to a unix socket where it asks for NETLINK_RDMA.
PRELOAD = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static int ours = -1;

int socket(int domain, int type, int protocol)
{
	int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
	struct sockaddr_un at = { .sun_family = AF_UNIX };

	if (domain != AF_NETLINK || protocol != 20)
		return real(domain, type, protocol);
	ours = real(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	strncpy(at.sun_path, getenv("FAKE_RDMA"), sizeof(at.sun_path) - 1);
	return connect(ours, (struct sockaddr *)&at, sizeof(at)) == 0 ? ours : -1;
}

/* `netns NAME` means a file that root would have to make. */
int open(const char *path, int flags, ...)
{
	int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");

	return real(strstr(path, "/netns/") != NULL ? "/proc/self/ns/net" : path, flags, 0);
}

int open64(const char *path, int flags, ...)
{
	return open(path, flags);
}

static int fill(void *name, socklen_t *length)
{
	struct sockaddr_nl at = { .nl_family = AF_NETLINK };

	memcpy(name, &at, sizeof(at));
	*length = sizeof(at);
	return 0;
}

int bind(int fd, const struct sockaddr *name, socklen_t length)
{
	int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");

	return fd == ours ? 0 : real(fd, name, length);
}

int getsockname(int fd, struct sockaddr *name, socklen_t *length)
{
	int (*real)(int, struct sockaddr *, socklen_t *) = dlsym(RTLD_NEXT, "getsockname");

	return fd == ours ? fill(name, length) : real(fd, name, length);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
	int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");

	return fd == ours ? 0 : real(fd, level, name, value, length);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *name, socklen_t length)
{
	ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");

	return fd == ours ? send(fd, data, size, flags) : real(fd, data, size, flags, name, length);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	ssize_t (*real)(int, struct msghdr *, int) = dlsym(RTLD_NEXT, "recvmsg");
	void *name = message->msg_name;
	ssize_t size;

	if (fd != ours)
		return real(fd, message, flags);
	message->msg_name = NULL;
	message->msg_namelen = 0;
	size = real(fd, message, flags);
	message->msg_name = name;
	if (name != NULL)
		fill(name, &message->msg_namelen);
	return size;
}
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("rdma", path="/usr/bin:/usr/sbin:/sbin") is None:
        pytest.skip("needs the rdma tool of iproute2")
    folder = tmp_path_factory.mktemp("rdma")
    (folder / "fake.c").write_text(PRELOAD)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "fake.so", folder / "fake.c", "-ldl"], check=True)
    return folder


ANSWERS: dict[int, nldev.Attrs] = {
    nldev.RDMA_NLDEV_CMD_GET: DEVICE,
    nldev.RDMA_NLDEV_CMD_PORT_GET: PORT,
    nldev.RDMA_NLDEV_CMD_SYS_GET: SYSTEM,
    nldev.RDMA_NLDEV_CMD_RES_GET: RESOURCES,
}


def play_kernel(listener: socket.socket, asked: list[Reply]) -> None:
    """Take the tool's sockets, one or two; ends with the listener."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection, asked), daemon=True).start()


def answer(connection: socket.socket, asked: list[Reply]) -> None:
    """Answer each request as nldev does: dumps end with NLMSG_DONE, changes are acknowledged."""
    with connection:
        while packet := connection.recv(65536):
            (wanted,) = replies(packet)
            asked.append(wanted)
            command, number = wanted.type & 1023, wanted.sequence
            if wanted.flags & NLM_F_DUMP == NLM_F_DUMP:
                connection.send(reply(command, ANSWERS[command], number, 2))
                connection.send(HEADER.pack(20, NLMSG_DONE, 2, number, 0) + bytes(4))
                continue
            if command in ANSWERS:
                connection.send(reply(command, ANSWERS[command], number))
            connection.send(HEADER.pack(36, NLMSG_ERROR, 0, number, 0) + bytes(4) + packet[:16])


Rdma = Callable[..., tuple[Any, list[Reply]]]


@pytest.fixture
def rdma(preload: Path, tmp_path: Path) -> Rdma:
    def run(*words: str) -> tuple[Any, list[Reply]]:
        """The tool's JSON, and what it asked."""
        path = tmp_path / f"s{len(os.listdir(tmp_path))}"
        asked: list[Reply] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            thread = threading.Thread(target=play_kernel, args=(listener, asked), daemon=True)
            thread.start()
            environment = {**os.environ, "LD_PRELOAD": str(preload / "fake.so"), "FAKE_RDMA": str(path)}
            done = subprocess.run(
                ["rdma", "-j", *words], env=environment, capture_output=True, text=True, timeout=20, check=False
            )
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        assert done.returncode == 0, done.stderr
        # `rdma system` prints no JSON before iproute2 6.10.
        shown = done.stdout.strip()
        return (json.loads(shown) if shown.startswith("[") else shown), asked

    return run


def meaning(request: bytes | Reply) -> tuple[int, int, nldev.Attrs]:
    """Type, dump or not, attributes: what the kernel looks at. Flags for acknowledgement are each one's own."""
    if isinstance(request, bytes):
        (request,) = replies(request)
    return request.type, request.flags & NLM_F_DUMP, nldev.decode(request.body)


def test_the_tool_lists_devices_as_we_do(rdma: Rdma) -> None:
    shown, asked = rdma("dev")
    assert meaning(nldev.list_devices()) in map(meaning, asked)
    (device,) = shown
    ours = nldev.parse_device(parsed(DEVICE))
    assert (device["ifindex"], device["ifname"]) == (ours.dev_index, ours.name)
    assert device["node_guid"] == nldev.format_guid(ours.node_guid)


def test_the_tool_lists_ports_as_we_do(rdma: Rdma) -> None:
    shown, asked = rdma("link")
    assert nldev.parse_port(parsed(PORT)) == RdmaPort(shown[0]["port"], 4, shown[0]["netdev_index"], shown[0]["netdev"])
    assert shown[0]["state"] == "ACTIVE"
    commands = {request.type & 1023 for request in asked}
    assert nldev.RDMA_NLDEV_CMD_PORT_GET in commands


def test_the_tool_counts_resources_as_we_do(rdma: Rdma) -> None:
    shown, asked = rdma("resource", "show")
    assert {name: shown[0][name] for name in ("pd", "qp")} == nldev.parse_counts(parsed(RESOURCES))[1]
    assert any(request.type & 1023 == nldev.RDMA_NLDEV_CMD_RES_GET for request in asked)


def test_the_tool_reads_and_sets_the_mode_as_we_do(rdma: Rdma) -> None:
    shown, asked = rdma("system")
    shown = shown if isinstance(shown, str) else f"netns {shown[0]['netns']}"
    assert shown.startswith(f"netns {nldev.parse_mode(parsed(SYSTEM))}")
    assert meaning(nldev.get_mode()) in map(meaning, asked)
    for mode in nldev.MODES:
        _, asked = rdma("system", "set", "netns", mode)
        assert meaning(nldev.set_mode(mode)) in map(meaning, asked)


def test_the_tool_moves_a_device_as_we_do(rdma: Rdma) -> None:
    """The number of the namespace's descriptor is the tool's own."""
    _, asked = rdma("dev", "set", "mlx5_0", "netns", "tenant")
    kind, dump, attrs = meaning(asked[-1])
    assert (kind, dump) == meaning(nldev.move_device(4, 3))[:2]
    assert [name for name, _ in attrs] == [name for name, _ in meaning(nldev.move_device(4, 3))[2]]
    assert dict(attrs)["RDMA_NLDEV_ATTR_DEV_INDEX"] == 4


def test_requests_are_requests() -> None:
    every = [nldev.get_mode(), nldev.list_devices(), nldev.move_device(1, 3), nldev.get_chardev(1, "uverbs")]
    assert all(next(replies(request)).flags & NLM_F_REQUEST for request in every)
