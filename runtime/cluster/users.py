"""The people of the trial cluster: their accounts, groups and homes.

The machine's own /etc/passwd is never changed. Copies with these rows added are put into the cluster's own /etc.
Pure but for `make_homes`, which runs as root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class User:
    """One ordinary user, with the Slurm account that the cluster charges."""

    name: str
    uid: int
    account: str
    groups: tuple[str, ...]

    @property
    def home(self) -> str:
        return f"/home/{self.name}"


# Far above what Debian gives to people (1000-59999), below nobody (65534): no clash with the machine's own.
GROUPS = {"projecta": 61101, "projectb": 61102, "common": 61100}
USERS = (
    User("usera", 61001, "alpha", ("projecta", "common")),
    User("userb", 61002, "beta", ("projectb", "common")),
)


def user(name: str) -> User:
    """The user of this name; KeyError when there is none."""
    for one in USERS:
        if one.name == name:
            return one
    raise KeyError(name)


def passwd(own: str) -> str:
    """The machine's passwd with the cluster's users added; rows with their names or ids give way."""
    rows = [f"{one.name}:x:{one.uid}:{one.uid}:{one.account}:{one.home}:/bin/bash" for one in USERS]
    return _merged(own, rows)


def group(own: str) -> str:
    """The machine's groups with the users' own and shared ones added."""
    rows = [f"{one.name}:x:{one.uid}:" for one in USERS]
    for name, number in GROUPS.items():
        members = ",".join(one.name for one in USERS if name in one.groups)
        rows.append(f"{name}:x:{number}:{members}")
    return _merged(own, rows)


def _merged(own: str, rows: Iterable[str]) -> str:
    fresh = list(rows)
    names = {row.split(":")[0] for row in fresh}
    numbers = {row.split(":")[2] for row in fresh}
    kept = [row for row in own.splitlines() if _keep(row.split(":"), names, numbers)]
    return "\n".join([*kept, *fresh]) + "\n"


def _keep(fields: list[str], names: set[str], numbers: set[str]) -> bool:
    return len(fields) > 2 and fields[0] not in names and fields[2] not in numbers


def make_homes(homes: Path) -> None:
    """Make the homes, each readable by its user only, as on most clusters."""
    for one in USERS:
        home = homes / one.name
        home.mkdir()
        for name in (".bashrc", ".profile"):
            skeleton = Path("/etc/skel") / name
            if skeleton.is_file():
                shutil.copyfile(skeleton, home / name)
                os.chown(home / name, one.uid, one.uid)
        os.chown(home, one.uid, one.uid)
        home.chmod(0o700)
