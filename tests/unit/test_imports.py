"""The borders between modules, read from the imports: what a file may not know is as telling as what it holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = sorted([*(ROOT / "runtime").rglob("*.py"), *(ROOT / "netns").rglob("*.py")])

# Modules that make no system call: they may not import what makes one.
PURE_NAMES = {
    *("names.py", "batch.py", "hosts.py", "spec.py"),
    *("catalogue.py", "choice.py", "ldcache.py"),
    *("request.py", "mounts.py", "hostlist.py", "policy.py", "limits.py", "idmap.py", "reference.py"),
    *("flatten.py", "rules.py", "merge.py", "once.py"),
}
PURE = [path for path in MODULES if path.name in PURE_NAMES and path.parent.name != "linux"]
IMPURE_MODULES = {"os", "socket", "subprocess", "fcntl", "ctypes", "asyncio", "enclos.runtime.linux"}


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports at run time; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_pure_modules_make_no_system_call(path: Path) -> None:
    assert not imported(path) & IMPURE_MODULES


def test_networks_know_neither_slurm_nor_images() -> None:
    for path in (ROOT / "netns").rglob("*.py"):
        others = {name for name in imported(path) if name.startswith("enclos.runtime")}
        assert not {name for name in others if not name.startswith("enclos.runtime.linux")}, path.name


def test_only_linux_makes_raw_system_calls() -> None:
    """Beside it, `squash` has C of its own, for one library."""
    for path in MODULES:
        if path.parent.name != "linux":
            assert "enclos.runtime.linux._linux" not in imported(path), path.name
        if path.parent.name != "squash":
            assert not {name for name in imported(path) if name.startswith("enclos.runtime.squash._")}, path.name
        if path.parent.name not in ("linux", "squash"):
            assert not imported(path) & {"ctypes", "cffi"}, path.name


def test_the_runtime_sends_no_netlink() -> None:
    """But for `enclos check`, which tries out what the kernel can do."""
    for path in (ROOT / "runtime").rglob("*.py"):
        assert path.name == "probe.py" or "enclos.netns.netlink" not in imported(path), path.name


@pytest.mark.parametrize("module", ["enclos.runtime.daemon", "enclos.runtime.zygote"])
def test_the_daemons_do_without_heavy_modules(module: str) -> None:
    """pyroute2 costs 14 MB and 100 ms, jsonschema and rich about as much; libsquashfs is the importer's."""
    heavy = ("pyroute2", "jsonschema", "rich", "matplotlib", "pytest", "enclos.runtime.squash")
    code = f"import {module}, sys; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert result.stdout.strip() == "[]"


def test_the_zygote_does_without_an_event_loop() -> None:
    code = "import enclos.runtime.zygote, sys; print('asyncio' in sys.modules, 'yaml' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert result.stdout.split() == ["False", "False"]
