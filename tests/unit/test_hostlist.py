"""Slurm's hostlist notation: what `scontrol show hostnames` says, and limits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from enclos.runtime.hostlist import BadHostlist, expand
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = {
    "n1": ["n1"],
    "n[001-003,5]": ["n001", "n002", "n003", "n5"],
    "n[08-11],n[8-11]": ["n08", "n09", "n10", "n11", "n8", "n9", "n10", "n11"],
    "n[1-002]": ["n1", "n2"],
    "n[5,5]": ["n5", "n5"],
    "a[1-2]b[3-4]": ["a1b3", "a1b4", "a2b3", "a2b4"],
    "n[1-2]-ib,x": ["n1-ib", "n2-ib", "x"],
    "gpu1,,cpu1": ["gpu1", "cpu1"],
    "": [],
}
BAD = ["n[3-1]", "n[]", "n[1", "n1]", "n[[1]]", "n[1-3,]", "n[a-b]", "n[-3]", "n[1--3]", "n[1-2]]", "a b", "[1-2"]


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scontrol wants a configuration even where it needs none."""
    path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    path.write_text("ClusterName=x\nSlurmctldHost=x\nNodeName=x\nPartitionName=p Nodes=x\n")
    return path


def scontrol(text: str, conf: Path) -> list[str]:
    command = ["scontrol", "show", "hostnames", text]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()


@pytest.mark.parametrize(("text", "names"), CASES.items())
def test_expands(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", BAD)
def test_refuses(text: str) -> None:
    with pytest.raises(BadHostlist):
        expand(text)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol")
@pytest.mark.parametrize("text", [text for text in CASES if text and ",," not in text and "]-ib" not in text])
def test_agrees_with_scontrol(text: str, slurm_conf: Path) -> None:
    assert expand(text) == scontrol(text, slurm_conf)


PREFIXES = st.sampled_from(["n", "node-", "cpu", "rack1x"])
RANGES = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4)).map(
        lambda r: f"{r[0]:0{r[2]}d}-{r[0] + r[1]:0{r[2]}d}" if r[1] else f"{r[0]:0{r[2]}d}"
    ),
    min_size=1,
    max_size=4,
)
ENTRIES = st.lists(st.tuples(PREFIXES, RANGES), min_size=1, max_size=4).map(
    lambda entries: ",".join(f"{prefix}[{','.join(ranges)}]" for prefix, ranges in entries)
)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol")
@settings(max_examples=60, deadline=None)
@given(text=ENTRIES)
def test_agrees_with_scontrol_on_anything(slurm_conf: Path, text: str) -> None:
    assert expand(text) == scontrol(text, slurm_conf)


@given(st.text(alphabet="n1-[],x 0", max_size=40))
def test_never_more_names_than_the_limit_and_no_other_error(text: str) -> None:
    try:
        names = expand(text, limit=50)
    except BadHostlist:
        return
    assert len(names) <= 50
    assert not any(set(name) & set("[], ") for name in names)


@pytest.mark.parametrize(
    "text", ["n[1-100001]", "n[1-99999999999999999]", "a[1-1000]b[1-1000]", ",".join(["n[1-60000]"] * 2)]
)
def test_limit_is_applied_before_names_are_made(text: str) -> None:
    with pytest.raises(BadHostlist, match="more than 100000"):
        expand(text)


def test_ten_thousand_nodes() -> None:
    names = expand("n[00001-10000]")
    assert (len(names), names[0], names[-1]) == (10000, "n00001", "n10000")
