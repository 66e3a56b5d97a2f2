"""RDMA devices that move with their interfaces, on a kernel in exclusive mode: `tests/vm/vm --kernel exclusive test`.

Soft-RoCE with the changes of tests/vm/rxe.py stands for hardware; what is asserted is what `rdma` and `ip` show.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from enclos.netns import namespace, nldev, rdma, rdmamove
from enclos.netns.facts import DeviceInUse, DeviceMissing, KernelRefused
from enclos.netns.link import pack_address
from enclos.netns.netlink import Netlink
from enclos.netns.rdmamove import Address, Movable
from vm import cards, verbs
from vm.cards import command

pytestmark = pytest.mark.vm_exclusive


@pytest.fixture(autouse=True)
def card() -> Iterator[None]:
    cards.require()
    cards.plug(0)
    yield
    deadline = time.monotonic() + 20
    while "rx0" not in devices() and time.monotonic() < deadline:
        time.sleep(0.1)
    cards.unplug(0)


@pytest.fixture
def other() -> Iterator[int]:
    """Another network namespace, as a job has it."""
    fd = namespace.create_private()
    yield fd
    os.close(fd)


def devices() -> list[str]:
    return [row["ifname"] for row in json.loads(command("rdma", "-j", "dev"))]


def inside(fd: int, *words: str) -> Any:  # noqa: ANN401
    """What a tool that speaks JSON prints in a namespace."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{fd}", *words], pass_fds=[fd], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout or "[]")


def links(rows: Any) -> dict[str, str]:  # noqa: ANN401
    return {row["ifname"]: "up" if "UP" in row["flags"] else "down" for row in rows}


def own_links() -> dict[str, str]:
    return links(json.loads(command("ip", "-j", "link")))


def addresses() -> list[Address]:
    return [Address(pack_address("fd00:77::1"), 104), Address(pack_address("10.78.0.1"), 19)]


def test_a_device_moves_with_its_interface_and_comes_back(other: int) -> None:
    movable = rdmamove.inspect("rx0")
    assert (movable.name, [row.name for row in movable.interfaces]) == ("rx0", ["vf0"])
    rdmamove.move(movable, other, addresses())
    assert devices() == [] and "vf0" not in own_links()
    assert not os.listdir("/sys/class/infiniband")
    assert [row["ifname"] for row in inside(other, "rdma", "-j", "dev")] == ["rx0"]
    (port,) = inside(other, "rdma", "-j", "link")
    assert (port["netdev"], port["state"]) == ("vf0", "ACTIVE")
    (vf0,) = (row for row in inside(other, "ip", "-j", "address") if row["ifname"] == "vf0")
    shown = {f"{row['local']}/{row['prefixlen']}" for row in vf0["addr_info"] if row["scope"] == "global"}
    assert shown == {"10.78.0.1/19", "fd00:77::1/104"}
    assert rdmamove.bring_back(movable, other)
    assert devices() == ["rx0"] and own_links()["vf0"] == "up"
    assert inside(other, "rdma", "-j", "dev") == [] and links(inside(other, "ip", "-j", "link")) == {"lo": "up"}
    # What is back already stays.
    assert rdmamove.bring_back(movable, other) and devices() == ["rx0"]


def test_nobody_outside_can_open_it(other: int) -> None:
    movable = rdmamove.inspect("rx0")
    rdmamove.move(movable, other)
    node = rdma.find_one("rx0", other).node
    with pytest.raises(PermissionError):
        os.open(node, os.O_RDWR)
    with namespace.inside(other):
        os.close(os.open(node, os.O_RDWR))
    assert subprocess.run(["ibv_devinfo", "-d", "rx0"], check=False, capture_output=True).returncode != 0
    rdmamove.bring_back(movable, other)


def use(fd: int) -> None:
    """What a program does first with a device that it has opened (IB_USER_VERBS_CMD_GET_CONTEXT); raises OSError."""
    answer = ctypes.create_string_buffer(8)
    os.write(fd, struct.pack("=IHHQ", 0, 4, 2, ctypes.addressof(answer)))


def test_a_program_that_has_it_open_does_not_hold_it(other: int) -> None:
    """Nor has it a way to the device by which it could reach the next job that gets it."""
    movable = rdmamove.inspect("rx0")
    rdmamove.move(movable, other)
    with namespace.inside(other):
        node = rdma.find_one("rx0", other).node
        used, kept = (os.open(node, os.O_RDWR) for _ in range(2))
    use(used)
    assert rdmamove.bring_back(movable, other) and devices() == ["rx0"]
    with pytest.raises(OSError, match="Input/output error"):
        use(kept)
    for fd in (used, kept):
        os.close(fd)


def test_what_a_dead_namespace_leaves_is_known_by_its_guid() -> None:
    """The kernel gives both back to the initial namespace; somebody has taken the interface's name meanwhile."""
    movable = rdmamove.inspect("rx0")
    fd = namespace.create_private()
    rdmamove.move(movable, fd)
    command("ip", "link", "add", "vf0", "type", "bridge")
    os.close(fd)
    deadline = time.monotonic() + 20
    while not rdmamove.settle(movable):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rows = json.loads(command("ip", "-j", "link"))
    assert "vf0" not in {row["ifname"] for row in rows if row["address"] == "52:54:00:00:00:00"}
    command("ip", "link", "delete", "vf0")
    assert rdmamove.settle(movable)
    (row,) = (row for row in json.loads(command("ip", "-j", "link")) if row["address"] == "52:54:00:00:00:00")
    assert (row["ifname"], "UP" in row["flags"]) == ("vf0", True)


def test_a_taken_name_does_not_keep_the_interface_there(other: int) -> None:
    movable = rdmamove.inspect("rx0")
    rdmamove.move(movable, other)
    command("ip", "link", "add", "vf0", "type", "bridge")
    try:
        assert rdmamove.bring_back(movable, other)
        assert "52:54:00:00:00:00" in {row["address"] for row in json.loads(command("ip", "-j", "link"))}
    finally:
        command("ip", "link", "delete", "vf0")
    assert rdmamove.settle(movable) and own_links()["vf0"] == "up"


@pytest.mark.parametrize(
    ("make", "undo", "reason"),
    [
        (
            "ip address add 10.1.1.1/24 dev vf0",
            "ip address del 10.1.1.1/24 dev vf0",
            "its interface vf0 has an address of the node",
        ),
        (
            "ip route add 10.5.0.0/16 dev vf0",
            "ip route del 10.5.0.0/16 dev vf0",
            "the node has routes over its interface vf0",
        ),
        (
            "ip link add br9 type bridge && ip link set vf0 master br9",
            "ip link del br9",
            "its interface vf0 is part of a bridge or bond",
        ),
        (
            "ip link add v9 link vf0 type macvlan",
            "ip link del v9",
            "interface v9 stands on its interface vf0",
        ),
    ],
)
def test_what_the_node_uses_is_not_spared(make: str, undo: str, reason: str) -> None:
    command("sh", "-c", make)
    try:
        with pytest.raises(DeviceInUse) as caught:
            rdmamove.inspect("rx0")
    finally:
        command("sh", "-c", undo)
    assert (caught.value.name, caught.value.reason) == ("rx0", reason)
    assert rdmamove.inspect("rx0").name == "rx0"


def await_index(address: str) -> None:
    """Until a device's table has an address: that comes by a work queue."""
    deadline = time.monotonic() + 10
    while (pack_address(address), "vf0") not in rdmamove.table("rx0"):
        assert time.monotonic() < deadline, rdmamove.table("rx0")
        time.sleep(0.05)


def test_an_address_of_another_namespace_is_not_lent(other: int) -> None:
    """A macvlan of a pod, say: on the node nothing shows it, but whoever has the device may use its address.

    Both of them are called as the device's own interface is. After it has gone the device is as free as before.
    """
    command("ip", "link", "add", "v9", "link", "vf0", "type", "macvlan")
    words = ["ip", "link", "set", "v9", "netns", f"/proc/self/fd/{other}", "name", "vf0"]
    subprocess.run(words, pass_fds=[other], check=True)
    with namespace.inside(other):
        command("ip", "link", "set", "vf0", "up")
        command("ip", "address", "add", "10.99.0.9/24", "dev", "vf0")
    await_index("10.99.0.9")
    with pytest.raises(DeviceInUse) as caught:
        rdmamove.inspect("rx0")
    assert caught.value.reason == "interface vf0 of another network namespace has an address on it"
    with namespace.inside(other):
        command("ip", "link", "delete", "vf0")
    assert rdmamove.inspect("rx0").name == "rx0"


def test_the_underlay_is_not_spared() -> None:
    with open("/sys/class/net/vf0/ifindex") as file:
        index = int(file.read())
    with pytest.raises(DeviceInUse) as caught:
        rdmamove.inspect("rx0", index)
    assert caught.value.reason == "its interface vf0 is the underlay of the networks"


def test_what_a_program_uses_is_not_spared() -> None:
    with Netlink(nldev.NETLINK_RDMA) as nl:
        (device,) = nldev.devices(nl)
        fd = os.open(f"/dev/infiniband/{nldev.chardev(nl, device, 'uverbs')}", os.O_RDWR)
    # Opened alone it has no context yet, and nothing would be lost.
    assert rdmamove.inspect("rx0").name == "rx0"
    os.close(fd)
    command("ip", "address", "add", "fe80::9/64", "dev", "vf0", "nodad")
    server = ["stdbuf", "-oL", "ibv_rc_pingpong", "-d", "rx0", "-g", "0"]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and "local address" in running.stdout.readline()
        with pytest.raises(DeviceInUse) as caught:
            rdmamove.inspect("rx0")
        running.kill()
    assert caught.value.reason == f"process {running.pid} of the node uses it"


def test_a_device_that_is_not_there(other: int) -> None:
    with pytest.raises(DeviceMissing):
        rdmamove.inspect("rx7")
    with pytest.raises(DeviceMissing):
        rdma.find_one("rx0", other)
    assert not rdmamove.settle(Movable(1, "rx7", ()))
    with pytest.raises(DeviceMissing):
        rdmamove.move(Movable(1, "rx7", ()), other)


def test_soft_roce_is_not_made_in_exclusive_mode(other: int) -> None:
    """It would appear in the initial namespace: that is why rdma.mode soft is refused there."""
    with namespace.inside(other):
        command("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        command("ip", "link", "set", "v0", "up")
    rdmamove.make_soft("enclosrxe9", "v0", other)
    assert "enclosrxe9" in devices() and inside(other, "rdma", "-j", "dev") == []
    with pytest.raises(KernelRefused) as caught:
        rdmamove.make_soft("enclosrxe9", "v0", other)
    assert caught.value.errno == errno.EEXIST
    command("rdma", "link", "delete", "enclosrxe9")


@pytest.fixture(scope="module")
def programs() -> Path:
    """Where `netadmin` and `indexes` are."""
    return verbs.programs()


def answers(text: str) -> dict[str, str]:
    """What netadmin.c and indexes.c print, by the first word of each line."""
    return dict(line.split(" ", 1) for line in text.splitlines())


def await_indexes(programs: Path, netns_fd: int, usable: str) -> dict[str, str]:
    """The kernel's answers to a queue pair with each address index of rx0, when these are the ones that it takes."""
    words = ["nsenter", f"--net=/proc/self/fd/{netns_fd}", str(programs / "indexes"), "rx0"]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(words, pass_fds=[netns_fd], capture_output=True, text=True, check=True)
        if (found := answers(done.stdout)).get("ok") == usable:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_device_has_only_its_own_addresses_where_it_has_moved(other: int, programs: Path) -> None:
    """All other indexes of its table are refused. It is not the namespace that the kernel minds: that is shown, too."""
    movable = rdmamove.inspect("rx0")
    rdmamove.move(movable, other, addresses())
    # Link-local, IPv6, IPv4.
    assert await_indexes(programs, other, "0 1 2")["ENODATA"].startswith("3 4 5 ")
    with namespace.inside(other):
        command("ip", "link", "add", "v9", "link", "vf0", "type", "macvlan")
        command("ip", "link", "set", "v9", "netns", str(os.getppid()))
    command("ip", "link", "set", "v9", "up")
    command("ip", "address", "add", "10.99.0.9/24", "dev", "v9")
    await_indexes(programs, other, "0 1 2 3 4")
    command("ip", "link", "delete", "v9")
    assert rdmamove.bring_back(movable, other)


def netadmin(programs: Path, *words: str, before: tuple[str, ...] = ()) -> dict[str, str]:
    done = subprocess.run([*before, str(programs / "netadmin"), *words], capture_output=True, text=True, check=True)
    return answers(done.stdout)


def test_what_root_can_do_a_user_can_not(other: int, programs: Path) -> None:
    """The attempts of crossings.py are real ones: for root they work, or the driver has nothing of the kind."""
    index = command(str(programs / "netadmin"), "index", "rx0").strip()
    with open("/sys/class/net/vf0/ifindex") as file:
        port = file.read().strip()
    command("ip", "address", "add", "fe80::9/64", "dev", "vf0", "nodad")
    server = ["stdbuf", "-oL", "ibv_rc_pingpong", "-d", "rx0", "-g", "0"]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and "local address" in running.stdout.readline()
        assert netadmin(programs, "read", index) == {"pairs": "ok", "keys": "ok"}
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        assert netadmin(programs, "read", index, before=user) == {"pairs": "ok", "keys": "ENODATA"}
        assert netadmin(programs, "read", "user", index, before=user) == {"pairs": "ok", "keys": "ENODATA"}
        running.kill()
    # The driver has neither parts nor raw state to show. Another network namespace exists: `other`.
    assert netadmin(programs, "change", index, port, "1") == dict.fromkeys(
        ("rename", "count", "add", "qkeys", "move", "interface", "remove", "enter"), "ok"
    ) | {"divide": "EOPNOTSUPP", "raw": "EINVAL", "mode": "EBUSY"}
    command("rdma", "link", "delete", "evil")
    cards.plug(0)
