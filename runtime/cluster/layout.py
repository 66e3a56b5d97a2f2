"""Where a cluster keeps its things: paths, and the record of what was started.

Holds no behaviour beyond reading and writing that record. Runs as root; everything below the state directory is
root's, except the users' homes and the shared directory.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from enclos.runtime.cluster.processes import Process

SUBMIT = "submit"
DEFAULT_NAME = "trial"


def base() -> Path:
    """The folder of all clusters. Not below /run: many sites mount that noexec and small."""
    return Path(os.environ.get("ENCLOS_CLUSTER_BASE", "/var/lib/enclos-cluster"))


def project_root() -> Path | None:
    """The checkout this package runs from, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "spank" / "Makefile").is_file() or (root / "pyproject.toml").is_file() else None


def release_build(slurm: str) -> Path:
    """Where the checkout keeps what is built for another Slurm release than the machine's own (releases.py)."""
    root = project_root()
    assert root is not None
    return root / "build/releases" / slurm


def programs_path(slurm: str = "") -> Path:
    """The folder with `enclos` and `enclosd`: beside the running program, or of the virtual environment.

    For another release than the machine's own it is the environment of that release's Python.
    """
    if slurm:
        return release_build(slurm) / "venv/bin"
    beside = Path(sys.argv[0]).resolve().parent
    return beside if (beside / "enclosd").is_file() else Path(sysconfig.get_path("scripts"))


def shim_path(slurm: str = "") -> Path | None:
    """The Slurm plugin: named by ENCLOS_SHIM, built in the checkout, or installed; None where there is none.

    That of another release is built when a cluster of it comes up.
    """
    if slurm:
        return release_build(slurm) / "spank_enclos.so"
    named = os.environ.get("ENCLOS_SHIM")
    root = project_root()
    candidates = [Path(named)] if named else []
    candidates += [root / "build" / "spank_enclos.so"] if root else []
    # `make install` puts it beside the folder `python` that holds the package.
    candidates += [Path(__file__).resolve().parents[4] / "spank_enclos.so"]
    return next((path for path in candidates if path.is_file()), None)


def agent_command(slurm: str = "") -> list[str] | None:
    """What starts the agent in the foreground, or None where no agent is installed."""
    program = programs_path(slurm) / "enclosd"
    module = Path(__file__).resolve().parents[1] / "daemon.py"
    return [str(program), "--foreground"] if program.is_file() and module.is_file() else None


def node_names(count: int) -> list[str]:
    """n1, n2, …: as Slurm's n[1-COUNT]."""
    return [f"n{number}" for number in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one cluster, all below its state directory."""

    name: str

    @property
    def state(self) -> Path:
        return base() / self.name

    @property
    def record(self) -> Path:
        return self.state / "cluster.json"

    @property
    def slurm(self) -> Path:
        """Mounted on /etc/slurm of every machine."""
        return self.state / "slurm"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def homes(self) -> Path:
        """Its subdirectories are mounted below /home of every machine."""
        return self.state / "home"

    @property
    def shared(self) -> Path:
        """Mounted on /shared of every machine; anybody may write there."""
        return self.state / "shared"

    @property
    def images(self) -> Path:
        """Mounted on /images of every machine; only root writes there."""
        return self.state / "images"

    @property
    def munge(self) -> Path:
        return self.state / "munge"

    @property
    def root(self) -> Path:
        """An empty folder: where the cluster's mount namespace puts its root file system."""
        return self.state / "root"

    def node_etc(self, machine: str) -> Path:
        """Mounted on /etc/enclos of one machine."""
        return self.state / "nodes" / machine / "enclos"

    def node_cache(self, machine: str) -> Path:
        """Mounted on /var/cache/enclos of one machine."""
        return self.state / "nodes" / machine / "cache"

    def log(self, machine: str, daemon: str) -> Path:
        return self.logs / f"{machine}.{daemon}.log"

    def create(self, machines: list[str]) -> None:
        """Make the folders, each with the access that its readers need."""
        self.state.mkdir(parents=True)
        for path in (self.slurm, self.logs, self.homes, self.images, self.root, self.state / "slurmctld"):
            path.mkdir()
        self.munge.mkdir(mode=0o755)
        self.shared.mkdir()
        self.shared.chmod(0o1777)
        for machine in machines:
            self.node_etc(machine).mkdir(parents=True)
            self.node_cache(machine).mkdir(mode=0o700)


@dataclass(slots=True)
class Record:
    """What was started: written after each start, so that a crash loses at most the newest process.

    The newest is found all the same: every process of a cluster is in the pid namespace of its first one, and that
    one carries the cluster's name in its environment (see nodes.find_stray_inits).
    """

    nodes: int
    cpus: int
    plugstack: str
    # Another Slurm release than the machine's own; "" for that.
    slurm: str = ""
    # False for machines on which nothing of Slurm is to be found.
    with_slurm: bool = True
    version: int = 1
    machines: dict[str, Process] = field(default_factory=dict)
    daemons: dict[str, Process] = field(default_factory=dict)

    def save(self, layout: Layout) -> None:
        """Replace the record in one step, so that a reader never sees half of it."""
        fresh = layout.record.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.rename(layout.record)

    @classmethod
    def load(cls, layout: Layout) -> Record | None:
        """The record of a cluster, or None when there is none that can be read."""
        try:
            data = json.loads(layout.record.read_text())
        except (FileNotFoundError, ValueError):
            return None
        for key in ("machines", "daemons"):
            data[key] = _processes(data[key])
        return cls(**data)


def _processes(rows: Mapping[str, Mapping[str, int]]) -> dict[str, Process]:
    return {name: Process(**row) for name, row in rows.items()}
