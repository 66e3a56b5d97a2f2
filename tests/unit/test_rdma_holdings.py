"""Who has which RDMA device: records before moves, one job at a time, everything back after each kind of failure.

The kernel is a table of where each device is: this machine has none that could move. The real one is tried in a guest
(tests/kernel/test_rdma_move.py, tests/cluster/test_rdma_exclusive.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from enclos.netns import rdma, rdmamove
from enclos.netns.facts import DeviceInUse, DeviceMissing, KernelRefused
from enclos.netns.rdma import NodeDevice, NodeRdma
from enclos.netns.rdmamove import Address, Interface, Movable
from enclos.runtime.devices import holdings, sitehook
from enclos.runtime.devices.holdings import Asker, Holdings, Place
from enclos.runtime.errors import EnclosError, rdma_hook_failed
from enclos.runtime.journal import Journal
from enclos.runtime.members import identity
from enclos.runtime.settings import Config, Rdma

HOME = 0


class Kernel:
    """Where each device is: HOME, or a namespace by its inode."""

    def __init__(self) -> None:
        self.where = {f"mlx5_{number}": HOME for number in range(4)}
        self.used: dict[str, str] = {}
        self.failing: set[str] = set()
        self.addresses: dict[str, Sequence[Address]] = {}
        self.mode = "exclusive"
        self.seen: list[list[str]] = []
        self.journal: Path | None = None

    def find(self) -> NodeRdma:
        return NodeRdma(self.mode, tuple(self.device(name) for name, place in self.where.items() if place == HOME))

    def device(self, name: str) -> NodeDevice:
        return NodeDevice(name, int(name[-1]) + 1, True, f"/dev/infiniband/uverbs{name[-1]}")

    def find_one(self, name: str, netns_fd: int) -> NodeDevice:
        if self.where.get(name) != identity(netns_fd)[1]:
            raise DeviceMissing(name)
        return self.device(name)

    def inspect(self, name: str, _underlay: int) -> Movable:
        if name in self.used:
            raise DeviceInUse(name, self.used[name])
        return Movable(int(name[-1]) + 1, name, (Interface(f"p{name[-1]}", f"02:00:00:00:00:0{name[-1]}", False),))

    def move(self, movable: Movable, netns_fd: int, addresses: Sequence[Address]) -> None:
        assert self.journal is not None
        self.seen.append(sorted(os.listdir(self.journal)))
        self.addresses[movable.name] = addresses
        if movable.name in self.failing:
            raise KernelRefused(95, movable.name, "Operation not supported")
        assert self.where[movable.name] == HOME
        self.where[movable.name] = identity(netns_fd)[1]

    def settle(self, movable: Movable) -> bool:
        return self.where[movable.name] == HOME

    def bring_back(self, movable: Movable, netns_fd: int) -> bool:
        if self.where[movable.name] == identity(netns_fd)[1]:
            self.where[movable.name] = HOME
        return self.where[movable.name] == HOME


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    made = Kernel()
    made.journal = tmp_path
    monkeypatch.setattr(rdma, "find", made.find)
    monkeypatch.setattr(rdma, "mode", lambda: made.mode)
    monkeypatch.setattr(rdma, "find_one", made.find_one)
    for name in ("inspect", "move", "settle", "bring_back"):
        monkeypatch.setattr(rdmamove, name, getattr(made, name))
    return made


SETTINGS = Rdma(devices=("mlx5_[0-2]",))


def make(tmp_path: Path, settings: Rdma = SETTINGS) -> Holdings:
    return Holdings(Config(rdma=settings), Journal(str(tmp_path)), 0)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Place]]:
    """A place per job; any file's inode stands for a namespace."""
    folder = tmp_path_factory.mktemp("namespaces")
    fds: dict[int, int] = {}

    def of(job: int) -> Place:
        if job not in fds:
            fds[job] = os.open(folder / str(job), os.O_RDWR | os.O_CREAT)
        return Place(job, job, fds[job], job + 1, 4, "enclos0")

    yield of
    for fd in fds.values():
        os.close(fd)


def asker(place: Callable[[int], Place], job: int, step: int = 0, network: str = "job") -> Asker:
    async def where() -> Place:
        return place(job)

    return Asker(f"step.{job}.{step}.99", 61001, network, where)


def take(held: Holdings, text: str, who: Asker) -> list[str]:
    return [device.name for device in asyncio.run(held.take(text, True, who))]


def records(tmp_path: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(tmp_path.glob("rdma.*"))}


def test_recorded_before_it_moves_and_forgotten_when_it_is_back(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]
) -> None:
    held = make(tmp_path)
    assert take(held, "2", asker(place, 7)) == ["mlx5_0", "mlx5_1"]
    first, second = f"rdma.{1:016x}", f"rdma.{2:016x}"
    assert kernel.seen == [[first], [first, second]]
    assert records(tmp_path)[first] == {
        "guid": 1,
        "name": "mlx5_0",
        "interfaces": [{"name": "p0", "mac": "02:00:00:00:00:00", "up": False}],
        "ports": [],
        "job": 7,
        "tenant": 7,
        "vni": 8,
        "rail": 0,
        "netns": list(identity(place(7).netns_fd)),
        "function": None,
        "steps": ["step.7.0.99"],
    }
    asyncio.run(held.give_back("step.7.0.99"))
    assert set(kernel.where.values()) == {HOME} and records(tmp_path) == {}


def test_each_device_of_a_job_is_on_a_rail_of_its_own(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]
) -> None:
    take(make(tmp_path), "2", asker(place, 7))
    shown = {name: [(row.address.hex(), row.prefix) for row in rows] for name, rows in kernel.addresses.items()}
    assert shown == {
        "mlx5_0": [("0a4e0005", 19), ("fd656e63726400000000000800000005", 104)],
        "mlx5_1": [("0a4e2005", 19), ("fd656e63726400000000000801000005", 104)],
    }


def test_steps_of_a_job_share_and_others_are_told(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]
) -> None:
    held = make(tmp_path)
    assert take(held, "1", asker(place, 7)) == take(held, "1", asker(place, 7, 1)) == ["mlx5_0"]
    with pytest.raises(EnclosError, match=r"RDMA device mlx5_0 is in use \(job 7 has it\)"):
        take(held, "mlx5_0", asker(place, 8))
    with pytest.raises(EnclosError, match=r"RDMA device mlx5_0 is in use \(job 7 has it\)"):
        take(held, "mlx5_0", asker(place, 8, network="host"))
    assert take(held, "auto", asker(place, 8)) == ["mlx5_1", "mlx5_2"]
    asyncio.run(held.give_back("step.7.0.99"))
    assert kernel.where["mlx5_0"] != HOME and records(tmp_path)[f"rdma.{1:016x}"]["steps"] == ["step.7.1.99"]
    asyncio.run(held.give_back("step.7.1.99"))
    assert kernel.where["mlx5_0"] == HOME


def test_who_enters_a_container_has_its_devices_too(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]
) -> None:
    """A named container: the step that made it ends, the one that entered goes on."""
    held = make(tmp_path)
    take(held, "1", asker(place, 7))
    held.share("step.7.1.99", "step.7.0.99")
    (record,) = records(tmp_path).values()
    assert record["steps"] == ["step.7.0.99", "step.7.1.99"]
    asyncio.run(held.give_back("step.7.0.99"))
    assert kernel.where["mlx5_0"] != HOME
    asyncio.run(held.give_back("step.7.1.99"))
    assert kernel.where["mlx5_0"] == HOME and records(tmp_path) == {}


def test_what_a_step_on_the_host_has_does_not_move(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]
) -> None:
    held = make(tmp_path)
    assert take(held, "mlx5_1", asker(place, 3, network="host")) == ["mlx5_1"]
    with pytest.raises(EnclosError, match=r"mlx5_1 is in use \(step 3\.0 on the node's network has it\)"):
        take(held, "mlx5_1", asker(place, 7))
    assert take(held, "auto", asker(place, 7)) == ["mlx5_0", "mlx5_2"]
    asyncio.run(held.give_back("step.3.0.99"))
    assert take(held, "mlx5_1", asker(place, 7)) == ["mlx5_1"]


def test_what_the_node_uses_does_not_move(kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]) -> None:
    kernel.used["mlx5_0"] = "the kernel uses it (rpcrdma)"
    held = make(tmp_path)
    with pytest.raises(EnclosError, match=r"mlx5_0 is in use \(the kernel uses it \(rpcrdma\)\)"):
        take(held, "mlx5_0", asker(place, 7))
    assert take(held, "auto", asker(place, 7)) == ["mlx5_1", "mlx5_2"]


def test_a_move_that_fails_takes_the_others_back(kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]) -> None:
    kernel.failing.add("mlx5_2")
    held = make(tmp_path)
    with pytest.raises(EnclosError, match=r"cannot move the RDMA device .* \(mlx5_2: \[errno 95\] Operation not"):
        take(held, "3", asker(place, 7))
    assert set(kernel.where.values()) == {HOME} and records(tmp_path) == {}
    kernel.failing.clear()
    assert take(held, "3", asker(place, 8)) == ["mlx5_0", "mlx5_1", "mlx5_2"]


def test_a_hook_that_fails_keeps_the_device_here(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    async def run(command: str, event: str, _numbers: sitehook.Numbers, movable: Movable, _deadline: float) -> None:
        events.append((event, movable.name))
        if event == "attach" and movable.name == "mlx5_1":
            raise rdma_hook_failed(command, "no")

    monkeypatch.setattr(sitehook, "run", run)
    held = make(tmp_path, Rdma(devices=("mlx5_*",), hook="/site/hook"))
    with pytest.raises(EnclosError, match=r"rdma\.hook: /site/hook failed \(no\)"):
        take(held, "2", asker(place, 7))
    assert events == [("attach", "mlx5_0"), ("attach", "mlx5_1"), ("detach", "mlx5_0"), ("detach", "mlx5_1")]
    assert set(kernel.where.values()) == {HOME} and records(tmp_path) == {}


def test_another_agent_knows_whose_they_are(kernel: Kernel, tmp_path: Path, place: Callable[[int], Place]) -> None:
    before = make(tmp_path)
    take(before, "1", asker(place, 7))
    take(before, "1", asker(place, 8))
    after = make(tmp_path)
    after.adopt(["step.7.0.99"], {7: place(7).netns_fd, 8: place(8).netns_fd})
    # Job 8's step is gone: what nobody has comes back, the other stays.
    asyncio.run(after.reclaim())
    assert kernel.where["mlx5_0"] != HOME and kernel.where["mlx5_1"] == HOME
    assert [row["job"] for row in records(tmp_path).values()] == [7]
    asyncio.run(after.give_back("step.7.0.99"))
    assert set(kernel.where.values()) == {HOME} and records(tmp_path) == {}


def test_a_device_that_is_not_back_yet_stays_recorded(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its namespace is held by something that is no process: the kernel brings the device when that ends."""
    take(make(tmp_path), "1", asker(place, 7))
    monkeypatch.setattr(holdings, "find_network_namespace", lambda _wanted: -1)
    after = make(tmp_path)
    after.adopt([], {})
    asyncio.run(after.reclaim())
    assert len(records(tmp_path)) == 1
    with pytest.raises(EnclosError, match="mlx5_0 is in use"):
        take(after, "mlx5_0", asker(place, 9))
    kernel.where["mlx5_0"] = HOME
    assert take(after, "mlx5_0", asker(place, 9)) == ["mlx5_0"]


def test_a_namespace_is_looked_for_among_processes(kernel: Kernel, tmp_path: Path) -> None:
    """A record says which it was; a process that is in it, or has it open, leads there."""
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    take(make(tmp_path), "1", asker(lambda job: Place(job, job, fd, job + 1, 4, "enclos0"), 7))
    after = make(tmp_path)
    after.adopt([], {})
    asyncio.run(after.reclaim())
    assert kernel.where["mlx5_0"] == HOME and records(tmp_path) == {}
    os.close(fd)


@pytest.mark.parametrize("damage", ["{}", '{"guid": "x"}', "[]", "null", '{"guid": 1, "name": "a", "interfaces": 5}'])
def test_a_damaged_record_is_ignored(kernel: Kernel, tmp_path: Path, damage: str) -> None:
    (tmp_path / "rdma.0000000000000001").write_text(damage)
    after = make(tmp_path)
    after.adopt([], {})
    assert records(tmp_path) == {}


def test_a_step_that_is_given_up_while_it_moves_leaves_nothing(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move that runs in the kernel can't be stopped: its end is waited for, then it is undone."""
    began, go_on = threading.Event(), threading.Event()
    move = kernel.move

    def slow(movable: Movable, netns_fd: int, addresses: Sequence[Address]) -> None:
        began.set()
        assert go_on.wait(10)
        move(movable, netns_fd, addresses)

    monkeypatch.setattr(rdmamove, "move", slow)
    held = make(tmp_path)

    async def give_up() -> None:
        task = asyncio.create_task(held.take("1", True, asker(place, 7)))
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert set(kernel.where.values()) == {HOME} and records(tmp_path) == {}


def test_a_full_disk_moves_nothing(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make(tmp_path)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(EnclosError):
        take(held, "1", asker(place, 7))
    assert set(kernel.where.values()) == {HOME} and kernel.seen == []


def test_one_move_at_a_time(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs that ask at the same moment: neither takes what the other one is about to have."""
    moving = threading.Lock()

    def move(movable: Movable, netns_fd: int, addresses: Sequence[Address]) -> None:
        with moving:
            time.sleep(0.05)
            kernel.move(movable, netns_fd, addresses)

    monkeypatch.setattr(rdmamove, "move", move)
    held = make(tmp_path)

    async def both() -> list[str]:
        found = await asyncio.gather(*(held.take("1", True, asker(place, job)) for job in (7, 8)))
        return [device.name for devices in found for device in devices]

    assert asyncio.run(both()) == ["mlx5_0", "mlx5_1"]


def test_steps_that_start_together_have_one_soft_device(
    kernel: Kernel, tmp_path: Path, place: Callable[[int], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel has it, a second one on the same interface is refused (EEXIST)."""
    kernel.mode = "shared"
    node = tmp_path / "uverbs7"
    node.touch()
    made: list[str] = []

    def make_soft(name: str, _ifname: str, _netns_fd: int) -> None:
        if name in made:
            return
        time.sleep(0.05)
        if name in made:
            raise KernelRefused(17, name, "File exists")
        made.append(name)

    monkeypatch.setattr(rdmamove, "make_soft", make_soft)
    monkeypatch.setattr(rdma, "find_one", lambda name, _: NodeDevice(name, 1, True, str(node)))
    held = make(tmp_path, Rdma(mode="soft"))

    async def both() -> list[str]:
        found = await asyncio.gather(*(held.take("1", True, asker(place, 7, step)) for step in (0, 1)))
        return [device.name for devices in found for device in devices]

    monkeypatch.setattr(os, "chown", lambda *_: None)
    assert asyncio.run(both()) == ["enclos7n4"] * 2
    assert node.stat().st_mode & 0o777 == 0o600


def test_a_hook_that_fails_at_the_end_is_logged(
    kernel: Kernel,
    tmp_path: Path,
    place: Callable[[int], Place],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The device is back all the same; the administrator has to know what the fabric still has."""

    async def run(_command: str, event: str, *_: object) -> None:
        if event == "detach":
            raise rdma_hook_failed("/etc/enclos/hook", "no answer")

    monkeypatch.setattr(sitehook, "run", run)
    held = make(tmp_path, Rdma(devices=("mlx5_0",), hook="/etc/enclos/hook"))
    take(held, "1", asker(place, 7))
    asyncio.run(held.give_back("step.7.0.99"))
    assert kernel.where["mlx5_0"] == HOME and records(tmp_path) == {}
    assert "job=7 RDMA device mlx5_0 is back, but the site's hook failed" in caplog.text
    assert "no answer" in caplog.text
