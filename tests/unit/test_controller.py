"""What squeue prints is read exactly; a user can't write into any field of it."""

from __future__ import annotations

from enclos.runtime.controller import FORMAT, JobFacts, parse


def test_jobs_with_nodes_are_read() -> None:
    assert parse("46|61001|n[1-2]|main|projecta\n") == [JobFacts(46, 61001, "n[1-2]", "projecta", "main")]


def test_what_is_no_running_job_is_left_out() -> None:
    assert parse("47|61001||main|projecta\n\nslurm_load_jobs error: x\n48|61001|n1|main\n") == []


def test_no_field_is_the_users() -> None:
    """%j (name), %k (comment), %o (command) and %Z (directory) could hold anything, line breaks and bars too."""
    assert not set("jkoZw") & {field[0] for field in FORMAT.split("%")[1:]}
