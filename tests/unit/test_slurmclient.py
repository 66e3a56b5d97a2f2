"""What srun consists of, as it is found on a node: with files made here, and this machine's Slurm where it has one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from enclos.runtime import slurmclient
from enclos.runtime.errors import EnclosError

needs_slurm = pytest.mark.skipif(shutil.which("srun") is None, reason="no srun here")


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slurm.conf with an include, a plugstack.conf with another, and munge at a place of its own."""
    (tmp_path / "munge").mkdir()
    (tmp_path / "plugin.so").touch()
    (tmp_path / "more.conf").write_text(f"SlurmUser=daemon # comment\nAuthInfo=socket={tmp_path}/munge/socket,ttl=5\n")
    (tmp_path / "plugstack.conf").write_text("include plugstack.d/*.conf\noptional absent.so\n")
    (tmp_path / "plugstack.d").mkdir()
    (tmp_path / "plugstack.d/x.conf").write_text(f"required {tmp_path}/plugin.so word\n# required /none.so\n")
    (tmp_path / "slurm.conf").write_text("ClusterName=x\ninclude more.conf\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    return tmp_path


@needs_slurm
def test_what_is_found(configuration: Path) -> None:
    found = slurmclient.find()
    names = [os.path.basename(path) for path, _ in found.commands]
    assert {"srun", "sbatch", "squeue", "scancel"} <= set(names)
    assert os.path.isfile(found.loader) and "ld" in os.path.basename(found.loader)
    assert {str(configuration), f"{configuration}/plugin.so", f"{configuration}/munge"} <= set(found.places)
    assert found.accounts == ("root", "daemon")
    assert found.program[:4] == b"\x7fELF"
    targets = [mount.target for mount in found.mounts()]
    assert "/run/enclos/slurm/bin/srun" in targets and "/run/enclos/slurm/loader" in targets
    assert all(mount.read_only and mount.kind == "bind" for mount in found.mounts())


@needs_slurm
def test_it_is_looked_for_again_when_a_file_has_changed(configuration: Path) -> None:
    first = slurmclient.find()
    assert slurmclient.find() is first
    (configuration / "slurm.conf").write_text("SlurmUser=bin\n")
    os.utime(configuration / "slurm.conf", ns=(1, 1))
    assert slurmclient.find().accounts == ("root", "bin")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnclosError, match="srun is not in the agent's PATH"):
        slurmclient.find()


def test_library_that_a_plugin_opens_by_its_path(tmp_path: Path) -> None:
    """A path and a name among the texts of a compiled plugin; what is not there is none."""
    place = tmp_path / "pmix/lib"
    place.mkdir(parents=True)
    texts = [b"/usr/share", str(place).encode(), b"libpmix.so", b"%s/x"]
    plugin = b"\x7fELF\0" + b"\0".join(texts) + b"\0"
    assert list(slurmclient.opened_by_path(plugin)) == []
    (place / "libpmix.so").touch()
    assert list(slurmclient.opened_by_path(plugin)) == [f"{place}/libpmix.so"]
    assert list(slurmclient.opened_by_path(plugin.replace(b"libpmix.so", b"libother.so"))) == []
