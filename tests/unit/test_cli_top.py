"""`enclos top`: what its numbers are, from files of the kernel's form."""

from __future__ import annotations

from pathlib import Path

import pytest
from enclos.runtime.cli import top


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (999, "999"), (1000, "0.977K"), (512 << 10, "512K"), (5 << 28, "1.25G")],
)
def test_sizes_for_people(number: float | None, text: str) -> None:
    assert top.size(number) == text


def test_a_cgroup_that_is_gone_is_no_container(tmp_path: Path) -> None:
    assert top.sample({"cgroup": str(tmp_path / "gone"), "stepd": 1}) is None


def test_counters_of_a_cgroup(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 2500000\nuser_usec 1\nnr_throttled 0\n",
        "memory.current": "4096\n",
        "pids.current": "3\n",
        "io.stat": "8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=5 wbytes=0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    disks = {"8:0": {"rbytes": 10, "wbytes": 20, "rios": 1}, "8:16": {"rbytes": 5, "wbytes": 0}}
    assert top.sample({"cgroup": str(tmp_path)}) == top.Sample(2.5, 4096, None, 3, 15, 20, disks)


def test_limits_that_few_have(tmp_path: Path) -> None:
    files = {
        "io.max": "8:0 rbps=1048576 wbps=max riops=50 wiops=max\n",
        "hugetlb.2MB.max": "1073741824\n",
        "hugetlb.2MB.current": "4194304\n",
        "hugetlb.2MB.rsvd.max": "max\n",
        "hugetlb.1GB.max": "max\n",
        "rdma.max": "mlx5_0 hca_handle=4 hca_object=max\n",
        "rdma.current": "mlx5_0 hca_handle=2 hca_object=60\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before, after = (
        top.Sample(0.0, None, None, 1, None, None, {"8:0": {"rbytes": n << 20, "rios": 8 * n}}) for n in (3, 4)
    )
    container = {"job": 7, "step": 0, "uid": 0, "image": "/i", "cgroup": str(tmp_path)}
    found = top.use(container, before, after, 2.0)
    assert found.others == (
        top.Other("io=8:0:rbps", 524288.0, 1 << 20),
        top.Other("io=8:0:riops", 4.0, 50),
        top.Other("hugetlb=2M", 4 << 20, 1 << 30),
        top.Other("rdma=mlx5_0:hca_handle", 2, 4),
    )
    shown = "io=8:0:rbps 512K/1M io=8:0:riops 4/50 hugetlb=2M 4M/1G rdma=mlx5_0:hca_handle 2/4"
    assert top.line(found)[-2] == shown


def test_use_is_the_difference_over_the_time() -> None:
    container = {"job": 7, "step": 0, "uid": 0, "image": "/i", "cgroup": ""}
    before = top.Sample(1.0, 10, None, 1, None, None)
    found = top.use(container, before, top.Sample(4.0, 20, None, 2, None, None), 2.0)
    assert (found.cpu, found.memory_bytes, found.processes, found.cpu_limit) == (1.5, 20, 2, None)
    assert top.line(found) == ("7.0", "root", "1.50", "-", "20", "-", "-", "2", "-", "-", "-", "-", "/i")
