"""docs/pyxis.md: each row has its five cells and names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

from enclos.runtime.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/pyxis.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "Behaviour"]


def test_each_row_names_a_test_that_exists() -> None:
    every = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows():
        assert len(row) == 5, row
        assert row[0] and row[2], row
        assert re.fullmatch(r"test_\w+", row[4]), row
        assert f"def {row[4]}(" in every, row


def test_each_behaviour_has_one_row() -> None:
    names = [row[0] for row in rows()]
    assert len(names) == len(set(names)) > 40


# Options whose tests stand in the file of another one, or in the file of what they are about.
ELSEWHERE = {
    "network": "test_network.py",
    "name": "test_named.py",
    "save": "test_save.py",
    "readonly": "test_option_writable.py",
    "entrypoint-log": "test_option_entrypoint.py",
}


def test_each_option_has_its_file_of_tests() -> None:
    for key in {option.key for option in OPTIONS}:
        path = ROOT / "tests/cluster" / ELSEWHERE.get(key, f"test_option_{key.replace('-', '_')}.py")
        assert path.exists(), key
        assert f"--container-{key}" in path.read_text(), key
