"""Roots of other Slurm releases: what goes into them, from where, and what is refused."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from enclos.runtime.cluster import releases

ROOT = Path(__file__).resolve().parents[2]
LISTED = ROOT / ".ci/packages"
# Debian's names of what pyproject.toml asks for.
DEBIAN = {"pyyaml": "python3-yaml"}


def test_packages_are_those_to_build_run_and_start_a_cluster() -> None:
    found = releases.packages(LISTED)
    assert {"gcc", "libslurm-dev", "nftables", "slurmctld", "munge", "python3-cffi"} <= set(found)
    assert not {"mpich", "clang-tidy", "squashfs-tools", "docker-registry"} & set(found)
    assert found == sorted(set(found))


def test_every_section_is_in_the_list() -> None:
    headings = re.findall(r"^# (to build|to run|the trial cluster)\b", LISTED.read_text(), re.MULTILINE)
    assert tuple(headings) == releases.SECTIONS


def test_each_python_dependency_has_its_debian_package() -> None:
    """A cluster has no way to the Internet, so pip can fetch nothing there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~ \[]", row)[0].lower() for row in project["dependencies"]]
    wanted = {DEBIAN.get(name, f"python3-{name}") for name in names}
    assert wanted - set(releases.packages(LISTED)) == set(), "add it to releases.ADDED"


def test_unknown_release_is_refused() -> None:
    with pytest.raises(releases.ReleaseError, match=r"--slurm=23.02: no such release; there are 22.05, 24.11, 26.05"):
        releases.find("23.02")


def test_machines_own_release_needs_no_root() -> None:
    assert releases.find("") is None
    own = releases.own_slurm()
    if not own:
        pytest.skip("no slurmd is installed")
    assert own in subprocess.run(["/usr/sbin/slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    assert releases.find(own) is None


def test_build_changes_with_every_source(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "runtime/linux/kernel.c", "netns/link.py", "enclos/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    digests = {releases._sources_digest(tmp_path)}
    for name in ("setup.py", "pyproject.toml", "runtime/linux/kernel.c", "netns/link.py", "enclos/__init__.py"):
        (tmp_path / name).write_text("changed")
        digests.add(releases._sources_digest(tmp_path))
    (tmp_path / "runtime/linux/_linux.c").write_text("made by the build")
    digests.add(releases._sources_digest(tmp_path))
    assert len(digests) == 6
