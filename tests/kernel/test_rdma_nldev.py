"""RDMA netlink against a real kernel, compared with what the `rdma` tool prints at that moment. In a guest: tests/vm.

The devices are Soft-RoCE on a veth pair; what only hardware has (moving them) is tried up to the driver's refusal.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from enclos.netns import nldev
from enclos.netns.batch import Batch
from enclos.netns.facts import KernelRefused
from enclos.netns.netlink import Netlink

pytestmark = pytest.mark.vm_new
NAMES = ("enclosrxe0", "enclosrxe1")


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def rdma(*words: str) -> Any:  # noqa: ANN401
    return json.loads(command("rdma", "-j", *words))


@pytest.fixture(scope="module", autouse=True)
def two_devices() -> Iterator[None]:
    """Soft-RoCE on both ends of a veth pair."""
    try:
        if os.geteuid() != 0:
            raise OSError(errno.EPERM, "needs root")
        subprocess.run(["modprobe", "rdma_rxe"], check=False, capture_output=True)
        Netlink(nldev.NETLINK_RDMA).close()
        command("ip", "link", "add", "enclosv0", "type", "veth", "peer", "name", "enclosv1")
        for index, name in enumerate(NAMES):
            command("ip", "link", "set", f"enclosv{index}", "up")
            command("rdma", "link", "add", name, "type", "rxe", "netdev", f"enclosv{index}")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"no Soft-RoCE device on this kernel: {getattr(error, 'stderr', '') or error}"
        if "rdma" in os.environ.get("ENCLOS_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    yield
    for name in NAMES:
        command("rdma", "link", "delete", name)
    command("ip", "link", "delete", "enclosv0")


@pytest.fixture
def nl() -> Iterator[Netlink]:
    with Netlink(nldev.NETLINK_RDMA) as session:
        yield session


def test_devices(nl: Netlink) -> None:
    shown = {row["ifname"]: row for row in rdma("dev", "show")}
    found = {device.name: device for device in nldev.devices(nl)}
    assert set(found) == set(shown) >= set(NAMES)
    for name, device in found.items():
        assert device.dev_index == shown[name]["ifindex"]
        assert nldev.format_guid(device.node_guid) == shown[name]["node_guid"]
        assert device.ports == 1


def test_ports_and_their_interfaces(nl: Netlink) -> None:
    shown = {(row["ifname"], row["port"]): row for row in rdma("link", "show")}
    found = {(device.name, port.port): port for device in nldev.devices(nl) for port in nldev.ports(nl, device)}
    assert set(found) == set(shown)
    for index, name in enumerate(NAMES):
        port = found[name, 1]
        assert port.ifname == shown[name, 1]["netdev"] == f"enclosv{index}"
        assert port.ifindex == shown[name, 1]["netdev_index"]
        assert (port.state == 4) is (shown[name, 1]["state"] == "ACTIVE")


def test_resources(nl: Netlink) -> None:
    shown = {row.pop("ifname"): row for row in rdma("resource", "show")}
    found = nldev.counts(nl)
    for name in NAMES:
        shown[name].pop("ifindex")
        assert found[name] == shown[name]
    queues = rdma("resource", "show", "qp")
    for device in nldev.devices(nl):
        of_kernel = {row["comm"].strip("[]") for row in queues if row["ifname"] == device.name and "pid" not in row}
        assert nldev.kernel_owners(nl, device) >= of_kernel


def test_character_devices(nl: Netlink) -> None:
    subprocess.run(["modprobe", "ib_uverbs"], check=True)
    for device in nldev.devices(nl):
        name = nldev.chardev(nl, device, "uverbs")
        with open(f"/sys/class/infiniband_verbs/{name}/ibdev") as file:
            assert file.read().strip() == device.name
    with pytest.raises(KernelRefused):
        nldev.chardev(nl, device._replace(dev_index=9999), "uverbs")


def set_mode(nl: Netlink, mode: str) -> None:
    """Set it as soon as the kernel, which removes namespaces in a work queue, is done with those of other tests."""
    batch = Batch()
    batch.add(nldev.set_mode(mode), "mode")
    deadline = time.monotonic() + 20
    while True:
        try:
            return nl.run(batch)
        except KernelRefused as refused:
            if refused.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_mode_is_read_and_set(nl: Netlink) -> None:
    assert nldev.mode(nl) == command("rdma", "system", "show").split()[1]
    for mode in ("exclusive", "shared"):
        set_mode(nl, mode)
        assert nldev.mode(nl) == mode == command("rdma", "system", "show").split()[1]


def test_mode_stays_while_there_are_other_namespaces(nl: Netlink) -> None:
    with subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; cat"], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        batch = Batch()
        batch.add(nldev.set_mode("exclusive"), "mode")
        with pytest.raises(KernelRefused) as caught:
            nl.run(batch)
        assert caught.value.errno == errno.EBUSY
        other.communicate("")


def test_a_shared_device_does_not_move(nl: Netlink) -> None:
    device = next(device for device in nldev.devices(nl) if device.name == NAMES[0])
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        batch = Batch()
        batch.add(nldev.move_device(device.dev_index, fd), device.name)
        with pytest.raises(KernelRefused) as caught:
            nl.run(batch)
    finally:
        os.close(fd)
    assert (caught.value.errno, caught.value.object) == (errno.EOPNOTSUPP, NAMES[0])
