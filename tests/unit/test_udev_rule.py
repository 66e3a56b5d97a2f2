"""conf/60-enclos.rules: which device nodes it is about, and that no later rule has the last word.

No test has a udev: what it does with the rule was tried in a guest (docs/design.md).
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

RULES = Path(__file__).resolve().parents[2] / "conf/60-enclos.rules"


def test_nodes_of_soft_devices_alone_stay_their_users() -> None:
    (line,) = (line for line in RULES.read_text().splitlines() if line and not line.startswith("#"))
    terms = {key: (operator, value) for key, operator, value in re.findall(r'([A-Z]+(?:{\w+})?)(:?=+)"([^"]*)"', line)}
    name = terms.pop("ATTR{ibdev}")[1]
    assert terms == {"SUBSYSTEM": ("==", "infiniband_verbs"), "MODE": (":=", "0600")}
    # As holdings.py names them; and hardware's.
    assert fnmatchcase("enclos4711n0", name) and fnmatchcase("enclos4711n12", name)
    assert not any(fnmatchcase(other, name) for other in ("mlx5_0", "rocep1s0", "enclos", "rxe0"))
