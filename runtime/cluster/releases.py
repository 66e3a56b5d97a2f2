"""Other Slurm releases than the machine's own: roots that debootstrap makes, and what is built for them.

A root is made once per Debian release and list of packages, from the mirror that this machine's apt uses, and is kept
outside of any checkout. Clusters share it, read-only, below overlays. What is built against its Slurm and its Python
belongs to the checkout, in build/releases. Runs as root; knows nothing of nodes and daemons.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster.layout import project_root, release_build

# Which Debian release has which Slurm. sid moves on: what it has is looked at when its root has been made.
SUITES = {"22.05": "bookworm", "24.11": "trixie", "26.05": "sid"}

# Sections of .ci/packages that a root needs. What comes to the machine by pip has to come from Debian here: a cluster
# has no way to the Internet. The rest is what tests use on nodes.
SECTIONS = ("to build", "to run", "the trial cluster")
ADDED = (
    "python3-cffi",
    "python3-pip",
    "python3-psutil",
    "python3-rich",
    "python3-setuptools",
    "python3-yaml",
    "busybox-static",
    "procps",
)

# In a mount namespace of its own: what debootstrap mounts must not be there when a failed root is removed.
MAKE_ROOT = """\
set -eu
debootstrap --variant=minbase "$suite" "$root" "$mirror"
# Daemons are the cluster's to start. Documents are not read, and nothing here has to survive a power failure.
printf '#!/bin/sh\\nexit 101\\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
printf '%s\\n' force-unsafe-io 'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/man/*' \\
    'path-exclude=/usr/share/locale/*' > "$root/etc/dpkg/dpkg.cfg.d/enclos"
# A mirror may be older than unstable's Release file says that it may.
echo 'Acquire::Check-Valid-Until "false";' > "$root/etc/apt/apt.conf.d/enclos"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
mount -t proc proc "$root/proc"
chroot "$root" apt-get -q update
chroot "$root" apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends $packages
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/*
"""

# On the submit host of a cluster of that release: its compiler, its headers, its Python.
BUILD = """\
set -eu
mkdir -p "$build"
exec 9> "$build/lock"
flock 9
if [ "$(cat "$build/root" 2> /dev/null)" != "$root" ]; then
    rm -rf "$build/spank" "$build/venv" "$build/python" "$build/spank_enclos.so"
    echo "$root" > "$build/root"
fi
make --no-print-directory -s -C "$checkout/spank" BUILD="$build"
# `make install` puts these beside the folder of the package.
place() { cp "$build/slurm-command" "$build/slurm-opened.so" "$build"/venv/lib/python3*/; }
if [ "$(cat "$build/python" 2> /dev/null)" = "$digest" ]; then place; exit 0; fi
[ -x "$build/venv/bin/python3" ] || python3 -m venv --system-site-packages "$build/venv"
copy=$(mktemp -d)
cd "$checkout"
cp -r setup.py pyproject.toml README.md enclos runtime netns "$copy"
# Those of the machine's own Python and libc.
rm -f "$copy"/runtime/linux/_linux*.so "$copy"/runtime/linux/_linux.c
rm -f "$copy"/runtime/squash/_squash*.so "$copy"/runtime/squash/_squash.c
"$build/venv/bin/python3" -m pip install --quiet --no-index --no-deps --no-build-isolation --force-reinstall "$copy"
"$build/venv/bin/python3" -m pip check > /dev/null
rm -rf "$copy"
place
echo "$digest" > "$build/python"
"""


class ReleaseError(RuntimeError):
    """A release cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Root:
    """The root file system of a release, ready to be used read-only."""

    slurm: str
    path: Path


def cache() -> Path:
    """Where roots are kept; ENCLOS_CLUSTER_CACHE names another place."""
    return Path(os.environ.get("ENCLOS_CLUSTER_CACHE", "/var/cache/enclos-cluster")) / "roots"


def own_slurm() -> str:
    """The release of the machine's Slurm as `24.11`, or "" where there is none."""
    path = shutil.which("slurmd", path="/usr/local/sbin:/usr/sbin:/sbin")
    if path is None:
        return ""
    shown = subprocess.run([path, "-V"], capture_output=True, text=True, check=False).stdout
    return _release(shown)


def _release(shown: str) -> str:
    found = re.search(r"(\d+\.\d+)\.\d+", shown)
    return found[1] if found else ""


def find(slurm: str) -> Root | None:
    """The root for a release, made when it is not in the cache; None for the machine's own Slurm ("" means that).

    Raises:
        ReleaseError: no such release, or its root cannot be made.
    """
    if slurm in ("", own_slurm()):
        return None
    if slurm not in SUITES:
        raise ReleaseError(f"--slurm={slurm}: no such release; there are {', '.join(SUITES)}")
    checkout = project_root()
    if checkout is None:
        raise ReleaseError(f"--slurm={slurm}: only from a checkout; the plugin has to be built for that Slurm")
    wanted = packages(checkout / ".ci/packages")
    digest = hashlib.sha256("\n".join([MAKE_ROOT, *wanted]).encode()).hexdigest()[:12]
    root = Root(slurm, cache() / f"{SUITES[slurm]}-{digest}")
    root.path.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.path.with_suffix(".lock")):
        if not root.path.is_dir():
            _make(root, wanted)
    return root


def debootstrap(suite: str, path: Path, wanted: list[str]) -> None:
    """Make a root of a Debian release with some packages; the log is beside it.

    Raises:
        ReleaseError: it cannot be made.
    """
    if shutil.which("debootstrap", path="/usr/sbin:/usr/bin") is None:
        raise ReleaseError("debootstrap is not installed; `make deps` installs it")
    shutil.rmtree(path, ignore_errors=True)
    values = {"suite": suite, "root": str(path), "mirror": mirror(), "packages": " ".join(wanted)}
    run(MAKE_ROOT, values, path.with_suffix(".log"), f"a root of Debian's {suite}")


def run(script: str, values: Mapping[str, str], log: Path, made: str) -> None:
    """Run a shell script in a mount namespace of its own, with values as its variables.

    Raises:
        ReleaseError: it failed; the text has the end of its log.
    """
    command = ["unshare", "--mount", "--fork", "--kill-child", "sh", "-c", script]
    with log.open("w") as output:
        done = subprocess.run(
            command, env=_environment(values), stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise ReleaseError(f"cannot make {made} ({log}):\n{tail}")


def packages(listed: Path) -> list[str]:
    """The Debian packages of a root: those sections of .ci/packages that it needs, and the added ones."""
    found = list(ADDED)
    wanted = False
    for line in listed.read_text().splitlines():
        if line.startswith("# "):
            wanted = line[2:].partition(":")[0].partition(";")[0] in SECTIONS
        elif wanted and line:
            found.append(line.partition("#")[0].strip())
    return sorted(set(found))


def mirror() -> str:
    """The address from which this machine's apt has Debian's packages."""
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI) $(CODENAME)", "Created-By: Packages"]
    shown = _output(command)
    rows = [row.split() for row in shown.splitlines()]
    suites = {"bookworm", "trixie", "sid", _codename()}
    found = next((row[1] for row in rows if len(row) == 3 and row[0] == "Debian" and row[2] in suites), None)
    if found is None:
        raise ReleaseError("apt knows no mirror of Debian on this machine; `apt-get update` reads its sources")
    return found


def _codename() -> str:
    found = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else ""


def _make(root: Root, wanted: list[str]) -> None:
    fresh = root.path.with_suffix(".new")
    debootstrap(SUITES[root.slurm], fresh, wanted)
    found = _release(_output(["chroot", str(fresh), "slurmd", "-V"]))
    if found != root.slurm:
        raise ReleaseError(f"--slurm={root.slurm}: Debian's {SUITES[root.slurm]} has Slurm {found or 'none'} now")
    fresh.rename(root.path)


def build_script(root: Root) -> str:
    """What the submit host runs to build plugin and Python package for its Slurm; quick when nothing changed."""
    checkout = project_root()
    assert checkout is not None
    values = {
        "checkout": str(checkout),
        "build": str(release_build(root.slurm)),
        "root": root.path.name,
        "digest": _sources_digest(checkout),
    }
    return "".join(f"{name}='{value}'\n" for name, value in values.items()) + BUILD


def _sources_digest(checkout: Path) -> str:
    """Of everything that the installed Python package is made of."""
    digest = hashlib.sha256(BUILD.encode())
    files = [checkout / "setup.py", checkout / "pyproject.toml"]
    for folder in ("enclos", "runtime", "netns"):
        files += [path for path in (checkout / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
    for path in sorted(files):
        if path.name not in ("_linux.c", "_squash.c"):
            digest.update(f"{path.relative_to(checkout)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _environment(values: Mapping[str, str]) -> dict[str, str]:
    """Settings of the network and of temporary folders are the caller's; the language is not."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return {**kept, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **values}


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
