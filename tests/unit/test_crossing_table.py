"""docs/security.md says of RDMA what the tests of each mode expect: both come from one table."""

from __future__ import annotations

import re
from pathlib import Path

import crossingtable
import pytest
from crossingtable import ATTEMPTS, CHANGES, MODES, ROWS

ROOT = Path(__file__).resolve().parents[2]
SECTION = "\n## RDMA: what crosses\n"


def test_the_document_has_the_table() -> None:
    section = (ROOT / "docs/security.md").read_text().partition(SECTION)[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == crossingtable.markdown()


def test_results_say_yes_or_no_first() -> None:
    """`expected` goes by the first word."""
    for row in ROWS:
        assert len(row.results) == len(MODES)
        for result in row.results:
            assert re.match(r"(yes|no)\b", result), row


def test_each_attempt_is_in_one_row() -> None:
    named = [attempt for row in ROWS for attempt in row.attempts]
    assert len(named) == len(set(named))
    assert set(named) | set(crossingtable.OWNERS["exclusive"]) == ATTEMPTS


@pytest.mark.parametrize(
    ("file", "modes"), [("test_rdma_tenants.py", ["exclusive"]), ("test_rdma_soft.py", ["soft", "shared"])]
)
def test_the_tests_assert_it(file: str, modes: list[str]) -> None:
    """With nothing added or taken away."""
    text = (ROOT / "tests/cluster" / file).read_text()
    found = re.findall(r"assert crossings\.succeeded\([^)]*\) == expected\(\"(\w+)\"\)\n", text)
    assert found == modes and text.count("succeeded(") == len(modes)


def test_the_program_makes_each_change() -> None:
    """tests/vm/netadmin.c says what it tries by these words."""
    text = (ROOT / "tests/vm/netadmin.c").read_text()
    body = text.partition("static void changes(")[2].partition("\n}\n")[0]
    told = set(re.findall(r'(?:change|tell)\("(\w+)"', body))
    told |= set(re.findall(r"^\t(?:take_)?(\w+)\((?:ifindex|pid)", body, re.MULTILINE))
    assert told == CHANGES
