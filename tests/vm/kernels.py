"""Debian kernels as folders: fetched once as packages, unpacked, kept in a cache outside the checkout.

The package lists come by apt's own tools from the archive that this machine already uses, with another suite: no host
is named here. Nothing is installed. Runs as root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITES = {"6.1": "bookworm", "new": "sid"}
"""What a kernel is called here, and the suite whose `linux-image-amd64` it is."""

META_PACKAGE = "linux-image-amd64"
# An image package is, by suite, the kernel itself, or one that depends on these.
PARTS = ("linux-base-", "linux-binary-", "linux-modules-")
# A mirror that is being updated lists packages that it no longer has; the next list is right.
ATTEMPTS = 3
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class KernelUnavailable(RuntimeError):
    """A kernel could not be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel; `modules` holds a folder by the name of its release."""

    name: str
    release: str
    image: Path
    modules: Path

    @property
    def base(self) -> Path:
        """Where depmod and modprobe find `lib/modules`."""
        return self.modules.parents[1]


def cache() -> Path:
    """The folder that outlives checkouts and runs."""
    return Path(os.environ.get("ENCLOS_VM_CACHE", "/var/cache/enclos-vm"))


def fetch(name: str) -> Kernel:
    """The kernel of that name: from the cache, or downloaded.

    A kernel in the cache stays until the cache is removed: tests should not change because the archive did.

    Raises:
        KernelUnavailable: no such name, no archive, or no package.
    """
    if name not in SUITES:
        raise KernelUnavailable(f"no kernel {name}; there are {', '.join(SUITES)}")
    folder = cache() / "kernels" / name
    with locked(folder.parent):
        if not folder.is_dir():
            fresh = folder.with_suffix(".new")
            for attempt in range(1, ATTEMPTS + 1):
                shutil.rmtree(fresh, ignore_errors=True)
                try:
                    _download(SUITES[name], fresh)
                    break
                except KernelUnavailable as error:
                    if attempt == ATTEMPTS:
                        raise KernelUnavailable(f"kernel {name} cannot be fetched: {error}") from error
            fresh.rename(folder)
    return _find(name, folder)


def _find(name: str, folder: Path) -> Kernel:
    images = [*folder.glob("boot/vmlinuz-*"), *folder.glob("usr/lib/modules/*/vmlinuz")]
    if not images:
        raise KernelUnavailable(f"no kernel image in {folder}; remove it to fetch it again")
    image = images[0]
    modules = next(path for path in (folder / "usr/lib/modules", folder / "lib/modules") if path.is_dir())
    (release,) = (path.name for path in modules.iterdir())
    return Kernel(name, release, image, modules)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One download or build at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _download(suite: str, folder: Path) -> None:
    packages = folder / "packages"
    apt = Apt(packages, suite)
    run(["apt-get", "-qq", "update"], apt.environment)
    names = apt.parts()
    run(["apt-get", "-qq", "download", *names], apt.environment, cwd=packages)
    for package in packages.glob("*.deb"):
        run(["dpkg-deb", "--extract", str(package), str(folder)])
    shutil.rmtree(packages)
    kernel = _find("", folder)
    # What the kernel's package would do when it is installed: modprobe needs the list of dependencies.
    run(["depmod", "--basedir", str(kernel.base), kernel.release])


class Apt:
    """apt with a package list of its own: one suite of the archive that this machine's own list names."""

    def __init__(self, folder: Path, suite: str) -> None:
        self._suite = suite
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        (folder / "sources.list").write_text(f"deb {signed}{_archive()} {suite} main\n")
        (folder / "apt.conf").write_text(
            f'Dir::State::lists "{folder}/lists";\n'
            f'Dir::Cache "{folder}/cache";\n'
            f'Dir::Etc::sourcelist "{folder}/sources.list";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            'Dir::State::status "/dev/null";\n'
            'Acquire::Languages "none";\n'
            'APT::Sandbox::User "root";\n'
            # As shipped, a list that cannot be had is a warning, and the kernel "is not found".
            'APT::Update::Error-Mode "any";\n'
        )
        self.environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}

    def parts(self) -> list[str]:
        """The packages that make the suite's newest kernel."""
        (image,) = (name for name in self.depends(META_PACKAGE) if name.startswith("linux-image-"))
        parts = [name for name in self.depends(image) if name.startswith(PARTS)]
        return parts or [image]

    def depends(self, package: str) -> list[str]:
        """The names of the packages that one depends on."""
        return [part.split()[0] for part in self.field(package, "Depends").split(",")]

    def field(self, package: str, name: str) -> str:
        """What the archive says of a package."""
        text = run(["apt-cache", "show", "--no-all-versions", package], self.environment)
        rows = [row.removeprefix(f"{name}: ") for row in text.splitlines() if row.startswith(f"{name}: ")]
        if not rows:
            raise KernelUnavailable(f"{package} is not in {self._suite}")
        return rows[0]


def _archive() -> str:
    """The address of the Debian archive in this machine's own package sources."""
    form = "$(ORIGIN) $(COMPONENT) $(REPO_URI)"
    rows = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).splitlines()
    found = [row.split()[2] for row in rows if row.startswith("Debian main ")]
    # Security updates have an archive of their own, without the other suites.
    plain = [address for address in found if "security" not in address]
    if not plain:
        raise KernelUnavailable("apt's sources name no Debian archive (try apt-get update)")
    return plain[0]


def run(command: Sequence[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command prints; KernelUnavailable where it fails."""
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelUnavailable(f"{' '.join(command[:3])}: {done.stderr.strip()}")
    return done.stdout
