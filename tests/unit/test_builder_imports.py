"""Inside a user's image a builder loads no module any more: what it found would be the user's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import os, sys
from enclos.runtime import zygote
from enclos.runtime.operations import assembly
from enclos.runtime.tasks import TASKS
sys.path.insert(0, sys.argv[1])
assert "traceback" not in sys.modules, "loaded already: the test shows nothing"
if sys.argv[2] == "inside":
    assembly.forbid_imports()
try:
    import traceback
except ImportError:
    pass
try:
    raise ValueError("odd\\nthing")
except ValueError as error:
    zygote._report(TASKS["build"], error)
"""


def run(tmp_path: Path, where: str) -> str:
    (tmp_path / "traceback.py").write_text("import sys\nsys.stderr.write('the code of a user\\n')\n")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path), where], capture_output=True, text=True, check=True
    )
    return done.stderr


def test_no_module_is_loaded_inside(tmp_path: Path) -> None:
    assert "the code of a user" in run(tmp_path, "outside"), "the test shows nothing"
    assert run(tmp_path, "inside").splitlines() == [
        r"enclos-build: unexpected ValueError('odd\nthing')",
        "  <string>:15 in <module>",
    ]
