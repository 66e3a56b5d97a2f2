"""`enclos check`, the part about the kernel: features by use, and the sysctls that forbid them.

Runs as whoever types the command.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime import cgroup, presence
from enclos.runtime.cli import probe
from enclos.runtime.cli.finding import Finding, mend, note, ok, skipped
from enclos.runtime.errors import namespace_limit


@dataclass(frozen=True, slots=True)
class Feature:
    """A probe, what it is for, and what usually helps; `instead` is what happens where the kernel lacks just this.

    `lacking` is the error by which the kernel says so, `newer` who needs a kernel that has it. `slurm_only` is what a
    machine without Slurm can do without.
    """

    subject: str
    probe: Callable[[], None]
    hint: str
    root_only: bool = False
    instead: str = ""
    lacking: int = errno.EINVAL
    newer: str = ""
    slurm_only: bool = False


_LIMITS = "raise user.max_{mnt,net,ipc,uts,cgroup}_namespaces (sysctl)"
_OVERLAY = "it needs overlayfs with userxattr (Linux 5.11, module overlay)"
_SQUASHFS = "it needs squashfs and loop devices (modules squashfs, loop)"
_NO_IDMAP = "no idmapped mounts of squashfs (Linux 6.2): squashfuse serves every image, slower"
_NO_ATTRIBUTES = (
    "tmpfs has no user attributes (Linux 6.6): in a container, a directory of the image that was removed cannot be "
    "made again (Input/output error)"
)
_FUSE = "images of users need FUSE (module fuse), or images.user_files: refuse"

FEATURES = (
    Feature("user namespaces", probe.user_namespace, "raise user.max_user_namespaces (sysctl)"),
    Feature("other namespaces", probe.other_namespaces, _LIMITS),
    Feature("overlay", probe.overlay_in_a_user_namespace, _OVERLAY),
    Feature("squashfs", probe.squashfs_shown_to_a_user, _SQUASHFS, root_only=True, instead=_NO_IDMAP,
            newer="a newer kernel, if images are read much"),
    Feature("tmpfs attributes", probe.user_attributes_of_tmpfs, _OVERLAY, instead=_NO_ATTRIBUTES,
            lacking=errno.EOPNOTSUPP, newer="a newer kernel, or containers kept on a disk (named.directory)"),
    Feature("fuse", probe.fuse_shown_to_a_user, _FUSE, root_only=True),
    Feature("vxlan", probe.vxlan, "it needs the module vxlan"),
    Feature("nftables", probe.nftables, "it needs the nft command and the module nf_tables", slurm_only=True),
)


# What --container-limit can name.
CONTROLLERS = ("memory", "cpu", "cpuset", "pids", "io", "hugetlb", "rdma")


def findings() -> Iterator[Finding]:
    """Sysctls first: a feature that they forbid is explained by them."""
    yield from sysctl_findings()
    yield cgroup_finding()
    slurm = presence.found()
    for feature in FEATURES:
        if slurm or not feature.slurm_only:
            yield feature_finding(feature, os.geteuid() == 0)


def cgroup_finding(mount_point: Path = Path(cgroup.MOUNT_POINT)) -> Finding:
    """Nothing but limits needs cgroup v2, so its absence has not to be mended."""
    subject = "cgroup v2"
    if not (mount_point / "cgroup.controllers").exists():
        how = "boot with systemd.unified_cgroup_hierarchy=1 if users are to have it"
        return note(subject, "not there: --container-limit is refused", how)
    known = _read(mount_point / "cgroup.controllers").split()
    missing = [name for name in CONTROLLERS if name not in known]
    if missing:
        what = f"without {', '.join(missing)}: limits of these are refused"
        return note(subject, what, "see the kernel's configuration")
    return ok(subject, " ".join(CONTROLLERS))


def feature_finding(feature: Feature, is_root: bool) -> Finding:
    """What the probe says. A user without user namespaces can tell nothing: the agent may have them."""
    if feature.root_only and not is_root:
        return skipped(feature.subject, "needs root to test")
    refused = probe.refusal(feature.probe)
    if refused is None:
        return ok(feature.subject)
    if feature.instead and refused.startswith(os.strerror(feature.lacking)):
        return note(feature.subject, feature.instead, feature.newer)
    limit = namespace_limit()
    if not is_root and not limit:
        return skipped(feature.subject, f"a user cannot test it here ({refused})")
    return mend(
        feature.subject, limit or refused, f"set {limit.split()[0]} higher" if limit else feature.hint
    )


def sysctl_findings(root: Path = Path("/proc/sys")) -> Iterator[Finding]:
    """The settings of the kernel that decide about namespaces."""
    text = _read(root / "user/max_user_namespaces")
    if text == "0":
        yield mend("user.max_user_namespaces", "is 0", "set it to at least 10000 in /etc/sysctl.d")
    elif text:
        yield ok("user.max_user_namespaces", text)
    if _read(root / "kernel/unprivileged_userns_clone") == "0":
        yield ok(
            "kernel.unprivileged_userns_clone", "0; the agent makes the namespaces and is not bound by it"
        )
    if _read(root / "kernel/apparmor_restrict_unprivileged_userns") == "1":
        yield note(
            "kernel.apparmor_restrict_unprivileged_userns",
            "1: programs in containers cannot make user namespaces of their own",
            "set it to 0 if users nest containers",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
