"""The shim as a file: it builds without a warning, exports no more than it must, and its wire survives any reply."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPANK = ROOT / "spank"

needs_slurm = pytest.mark.skipif(not Path("/usr/include/slurm/spank.h").exists(), reason="no Slurm headers here")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler here")


def run(*words: str | Path, timeout: float = 120) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shim built apart from the checkout's."""
    build = tmp_path_factory.mktemp("build")
    run("make", "-C", SPANK, f"BUILD={build}")
    return build / "spank_enclos.so"


@needs_slurm
@needs_gcc
def test_exports_only_what_slurm_looks_up(shim: Path) -> None:
    symbols = {line.split()[-1] for line in run("nm", "-D", "--defined-only", shim).splitlines()}
    assert symbols == {
        "plugin_name",
        "plugin_type",
        "plugin_version",
        "spank_plugin_version",
        "slurm_spank_init",
        "slurm_spank_init_post_opt",
        "slurm_spank_user_init",
        "slurm_spank_task_init_privileged",
        "slurm_spank_task_init",
        "slurm_spank_task_exit",
        "slurm_spank_job_prolog",
        "slurm_spank_job_epilog",
    }


@needs_slurm
@needs_gcc
def test_needs_nothing_but_libc_and_binds_at_load(shim: Path) -> None:
    dynamic = run("readelf", "-d", shim)
    assert re.findall(r"NEEDED.*\[(.*)\]", dynamic) == ["libc.so.6"]
    assert "BIND_NOW" in dynamic
    assert "GNU_RELRO" in run("readelf", "-lW", shim)


@needs_slurm
@needs_gcc
def test_calls_nothing_that_reads_the_images_files(shim: Path) -> None:
    """After setns(mnt) a look-up of users or locales would load the image's libraries beside slurmstepd's memory."""
    wanted = {line.split()[-1].partition("@")[0] for line in run("nm", "-D", "--undefined-only", shim).splitlines()}
    forbidden = re.compile(r"^(getpw|getgr|getaddrinfo|gethostby|getlogin|setlocale|iconv|dlopen|initgroups|wordexp)")
    assert not {name for name in wanted if forbidden.match(name)}


@needs_gcc
def test_wire_under_sanitizers(tmp_path: Path) -> None:
    assert "wire: ok" in run("make", "-C", SPANK, f"BUILD={tmp_path}", "test")


@needs_slurm
@pytest.mark.skipif(shutil.which("clang-tidy") is None, reason="no clang-tidy here")
def test_lint() -> None:
    run("make", "-C", SPANK, "tidy", timeout=300)
