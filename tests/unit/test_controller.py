"""What squeue prints is read exactly; a user can't write into any field of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from enclos.runtime.controller import FORMAT, JobFacts, ask_parts, parse


def test_jobs_with_nodes_are_read() -> None:
    assert parse("46|61001|n[1-2]|main|projecta|46\n") == [JobFacts(46, 61001, "n[1-2]", "projecta", "main")]


def test_parts_of_a_heterogeneous_job_and_tasks_of_an_array() -> None:
    parts = parse("46|61001|n1|main|a|46+0\n47|61001|n2|main|a|46+1\n49|61001|n3|main|a|48_7\n")
    assert [(job.job, job.leader, job.part) for job in parts] == [(46, 46, 0), (47, 46, 1), (49, 0, 0)]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["47|1|n2|p|a|46+1", "46|1|n1|p|a|46+0"], [46, 47]),
        (["46|1|n1|p|a|46+0", "48|1|n2|p|a|46+2"], None),
        (["47|1|n2|p|a|46+1"], None),
        (["9|1|n9|p|a|9+0", "46|1|n1|p|a|46+0"], [46]),
        ([], None),
    ],
)
def test_all_parts_are_there_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], parts: list[int] | None
) -> None:
    """A program in squeue's place prints what slurmctld might answer."""
    (tmp_path / "squeue").write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = asyncio.run(ask_parts(46))
    assert (None if found is None else [part.job for part in found]) == parts


def test_what_is_no_running_job_is_left_out() -> None:
    assert parse("47|61001||main|projecta\n\nslurm_load_jobs error: x\n48|61001|n1|main\n48|61001|n1|main|a\n") == []


def test_no_field_is_the_users() -> None:
    """%j (name), %k (comment), %o (command) and %Z (directory) could hold anything, line breaks and bars too."""
    assert not set("jkoZw") & {field[0] for field in FORMAT.split("%")[1:]}
