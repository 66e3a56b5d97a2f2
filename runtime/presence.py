"""Whether this machine is a node of Slurm's: if not, it has no tunnels to guard, and users may start containers.

Looked at once, when the agent starts; it learns of Slurm later by the first job that is announced. Looks only.
"""

from __future__ import annotations

import os

from enclos.runtime.devices.gres import slurmd_path
from enclos.runtime.journal import Journal
from enclos.runtime.slurmclient import CONFIGURATIONS


def found() -> str:
    """The file that shows it; "" where there is none."""
    paths = (slurmd_path(), os.environ.get("SLURM_CONF", ""), *CONFIGURATIONS)
    return next((path for path in paths if path and os.path.exists(path)), "")


def of_slurm(journal: Journal) -> str:
    """The same for an agent that starts: it may know of a job from an agent before it."""
    return found() or ("a job's record" if any(True for _ in journal.read("job")) else "")
