"""SIF files as Singularity lays them out, whole and spoilt. What lies at the offset is squashfs.py's business."""

from __future__ import annotations

import os

import pytest
from enclos.runtime.cluster.sif import DATA, TABLE, Part, make_sif
from enclos.runtime.images.sif import BadSif, Extent, find_root, is_sif
from hypothesis import given
from hypothesis import strategies as st

DEFINITION = Part(b"Bootstrap: docker", 0x4001)


def find(content: bytes, machine: str = "x86_64") -> Extent:
    fd = os.memfd_create("sif")
    try:
        os.write(fd, content)
        assert is_sif(fd)
        return find_root(fd, machine)
    finally:
        os.close(fd)


def test_the_primary_partition_is_found_among_others() -> None:
    others = [DEFINITION, Part(kind=3), Part(filesystem=2, kind=4), Part(used=False)]
    assert find(make_sif([*others, Part(b"y" * 9000)])) == Extent(DATA + 4096 + 3 * 8192, 9000)


@pytest.mark.parametrize(("parts", "machine", "reason"), [
    ([DEFINITION], "x86_64", "it has no root file system"),
    ([Part(filesystem=2)], "x86_64", "its root file system is ext3"),
    ([Part(filesystem=5)], "x86_64", "its root file system is an encrypted squashfs"),
    ([Part(filesystem=9)], "x86_64", "its root file system is of an unknown kind"),
    ([Part(architecture=b"04\0")], "x86_64", "it is for aarch64, this node is x86_64"),
    ([Part()], "aarch64", "it is for x86_64, this node is aarch64"),
])  # fmt: skip
def test_what_cannot_be_used_is_said(parts: list[Part], machine: str, reason: str) -> None:
    with pytest.raises(BadSif, match=reason):
        find(make_sif(parts), machine)


def test_an_unknown_architecture_is_let_pass() -> None:
    assert find(make_sif([Part(architecture=b"00\0")]), "riscv64").offset == DATA


@pytest.mark.parametrize("cut", [100, 128, 4096, 4096 + 100, DATA, DATA + 4999])
def test_a_truncated_file_is_an_error(cut: int) -> None:
    with pytest.raises(BadSif):
        find(make_sif([Part()])[:cut])


@pytest.mark.parametrize("total", [0, -1, 1025, 2**62])
def test_the_number_of_descriptors_is_bounded(total: int) -> None:
    with pytest.raises(BadSif, match="its header is damaged"):
        find(make_sif([Part()], total))


@given(st.binary(max_size=86), st.binary(max_size=585))
def test_whatever_is_in_it_the_extent_lies_in_the_file(head: bytes, table: bytes) -> None:
    content = bytearray(make_sif([Part()]))
    content[42 : 42 + len(head)] = head
    content[TABLE : TABLE + len(table)] = table
    try:
        found = find(bytes(content))
    except BadSif:
        return
    assert found.offset > 0 and found.size > 0 and found.offset + found.size <= len(content)
