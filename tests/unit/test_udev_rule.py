"""conf/60-enclos.rules: which device nodes it is about, and that no later rule has the last word.

What a real udev does with the rule is seen in a guest (cluster/test_rdma_soft.py).
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from enclos.runtime.cli import check_devices

RULES = Path(__file__).resolve().parents[2] / "conf/60-enclos.rules"


def test_nodes_of_soft_devices_alone_stay_their_users() -> None:
    (line,) = (line for line in RULES.read_text().splitlines() if line and not line.startswith("#"))
    terms = {key: (operator, value) for key, operator, value in re.findall(r'([A-Z]+(?:{\w+})?)(:?=+)"([^"]*)"', line)}
    name = terms.pop("ATTR{ibdev}")[1]
    assert terms == {"SUBSYSTEM": ("==", "infiniband_verbs"), "MODE": (":=", "0600")}
    # As holdings.py names them; and hardware's.
    assert fnmatchcase("enclos4711n0", name) and fnmatchcase("enclos4711n12", name)
    assert not any(fnmatchcase(other, name) for other in ("mlx5_0", "rocep1s0", "enclos", "rxe0"))


def test_check_misses_the_rule_where_there_is_udev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RULES.name == check_devices.RULE
    control, folder = tmp_path / "control", tmp_path / "rules.d"
    monkeypatch.setattr(check_devices, "UDEV", str(control))
    monkeypatch.setattr(check_devices, "RULE_FOLDERS", (str(folder),))
    assert list(check_devices.udev_findings()) == []
    control.touch()
    (finding,) = check_devices.udev_findings()
    assert "60-enclos.rules is missing" in str(finding)
    folder.mkdir()
    (folder / RULES.name).touch()
    assert list(check_devices.udev_findings()) == []
