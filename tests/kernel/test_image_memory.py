"""How much memory an import takes, by what is in the image."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from enclos.runtime.images import tar, turn
from enclos.runtime.images.layout import Store
from enclos.runtime.images.order import Limits
from enclos.runtime.images.parts import SMALL_PART
from enclos.runtime.images.tar import Member
from layers import Entry, layer
from test_image_import import Import, home, left, store
from test_image_odd import in_layout

__all__ = ["home", "store"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

COUNT = 250_000
LIMITS = Limits(2 * COUNT + 1000, 1 << 40)
NAME_BYTES = 90
# What the squashfs file's tree takes for one of them: its name, 28 bytes, the hash table, what is needed at the end.
ENTRY_BYTES = NAME_BYTES + 60
SAMPLE_SECONDS = 0.02
BASE_MB = 64  # Importer, sandboxes and two converters, with nothing to remember.


def many(prefix: bytes) -> bytes:
    """A layer of empty files, large enough to be a part of its own where it is not compressed."""
    members = (Member(prefix + b"%0*d" % (NAME_BYTES - len(prefix), number), tar.FILE) for number in range(COUNT))
    return b"".join(map(tar.header, members)) + bytes(2 * tar.BLOCK)


class Watch(contextlib.AbstractContextManager["Watch"]):
    """The most memory that a process and all below it had at a time, shared pages counted once (PSS)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.peak_mb = 0.0

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_mb = max(self.peak_mb, sum(map(_pss_kb, _below(self._pid))) / 1024)


def _pss_kb(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
    return 0


def _below(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield from _below(int(child))


def test_large_parts_are_made_one_after_the_other(store: Store, home: Path) -> None:
    """Two that could be made side by side: not the memory of both, and little more than one needs for its names."""
    image = in_layout(home, [many(b"a"), many(b"b")], compression="")
    running = Import(image, store, limits=LIMITS, memory=96 << 20)
    assert running.receive()["state"] == ["resolved"]
    with Watch(running.process.pid) as watch:
        running.go()
        states = [running.receive()["state"] for _ in range(3)]
    assert states == [["part"], ["part"], ["done"]]
    one_mb = COUNT * ENTRY_BYTES / 2**20
    assert watch.peak_mb < BASE_MB + one_mb + 96 / SMALL_PART


def test_an_image_that_needs_more_than_it_may_have(store: Store, home: Path) -> None:
    running = Import(in_layout(home, [many(b"a")], compression=""), store, limits=LIMITS, memory=48 << 20)
    assert running.receive()["state"] == ["resolved"]
    running.go()
    message = running.receive()
    assert message["state"] == ["error"]
    assert message["cause"] == [f"its names need more than {48 << 20} bytes of memory"]
    assert "imports.memory" in message["hint"][0]
    assert not os.listdir(f"{store.directory}/parts")


def test_the_limit_of_files_is_the_images(store: Store, home: Path) -> None:
    """Each of the parts is below it."""
    noise = os.urandom(25 << 20)
    layers = [layer([Entry("d", "dir"), Entry(f"d/{name}", data=noise), Entry(f"d/{name}{name}")]) for name in "ab"]
    image = in_layout(home, layers)
    for limit, states in ((5, ["error"]), (6, ["part", "part", "done"])):
        running = Import(image, store, limits=Limits(limit, 1 << 40))
        assert running.receive()["state"] == ["resolved"]
        running.go()
        messages = [message for message in iter(running.receive, {}) if message["state"] != ["part"] or limit == 6]
        assert [message["state"][0] for message in messages] == states
        if limit == 5:
            assert messages[0]["cause"] == ["more than 5 files"]
            assert not left(store)["images"]


def test_one_large_converter_at_a_time() -> None:
    shared_fd = turn.create()
    first_fd, second_fd = turn.share(shared_fd), turn.share(shared_fd)
    first, second = turn.Turn(first_fd, 100), turn.Turn(second_fd, 100)
    first.need(101)
    second.need(100)  # A small one does not wait.
    first.need(10**9)
    passed = threading.Event()

    def wait() -> None:
        second.need(101)
        passed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert not passed.wait(0.2)
    finally:
        os.close(first_fd)  # As the end of its process does.
        thread.join(10)
    assert passed.is_set()
    os.close(second_fd)
    os.close(shared_fd)
