"""What a step is told of the limits that it has met: by the kernel's counters, each limit by its own."""

from __future__ import annotations

from pathlib import Path

from enclos.runtime import steplimits

HUGE = "--container-limit=hugetlb=2M:4M"
OBJECTS = "--container-limit=rdma=rx0:hca_object=2"
HANDLES = "--container-limit=rdma=rx1:hca_handle=1"
ROWS = [
    ("hugetlb.2MB.max", HUGE, ""),
    ("rdma.max", OBJECTS, "rx0 hca_object"),
    ("rdma.max", HANDLES, "rx1 hca_handle"),
    ("pids.max", "--container-limit=pids=4"),  # As an agent of before this has recorded it.
]
# As Linux 7.2 writes it.
EVENTS = """\
rx0 hca_handle.max=0 hca_handle.alloc_fail=0 hca_object.max=3 hca_object.alloc_fail=1
rx1 hca_handle.max=0 hca_handle.alloc_fail=0 hca_object.max=7 hca_object.alloc_fail=1
"""


def subjects(directory: Path) -> list[str]:
    return [error.subject for error in steplimits.news(str(directory), ROWS)]


def test_each_limit_by_its_own_counter(tmp_path: Path) -> None:
    assert subjects(tmp_path) == []
    (tmp_path / "rdma.events.local").write_text(EVENTS)
    (tmp_path / "hugetlb.2MB.events.local").write_text("max 0\n")
    assert subjects(tmp_path) == [OBJECTS]
    (tmp_path / "hugetlb.2MB.events.local").write_text("max 2\n")
    (tmp_path / "pids.events").write_text("max 1\n")
    assert subjects(tmp_path) == [HUGE, OBJECTS, "--container-limit=pids=4"]
