"""Images of Debian releases with the MPI libraries that they have, and a compiled program for each library.

That of the machine's own Debian is the trial cluster's (image.py). Another is made of the root that clusters of its
Slurm have (releases.py), with the libraries installed in an overlay above it: quicker than a root of its own. It is
kept beside the roots. Runs as root.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster import image, releases

LIBRARIES = ("openmpi", "mpich", "pmix")
PROGRAMS = {"openmpi": "ring-openmpi", "mpich": "ring-mpich", "pmix": "modex"}
PACKAGES = ("openmpi-bin", "mpich")
HEADERS = ("libopenmpi-dev", "libmpich-dev")
# Which packages' versions tell what a program runs with.
VERSIONS = {"openmpi-bin": "openmpi", "libmpich12": "mpich", "libpmix2": "pmix", "libpmix2t64": "pmix"}
# Not unpacked at all: GPUs' compilers, of which only plugins of UCX that are not used have need.
NOT_UNPACKED = ("libLLVM*", "libamd_comgr*", "libamdhip64*", "libz3*", "libclang*")
LEFT_OUT = (
    *("proc/*", "sys/*", "dev/*", "root/*", "var/cache/*", "var/lib/apt/*", "... *.a", "usr/include", "usr/lib/cni"),
    *("usr/lib/gcc*", "usr/libexec/gcc*", "usr/lib/python3*", "usr/lib/*/perl", "usr/lib/*/slurm*", "usr/lib/systemd"),
    *("usr/bin/*-linux-gnu-*", "usr/share/doc", "usr/share/fonts", "usr/share/locale", "usr/share/man"),
    *("usr/share/perl", "usr/share/python*"),
)

# In a mount namespace of its own, as is the tmpfs of the overlay: nothing has to be cleaned up.
MAKE_IMAGE = """\
set -eu
mount -t tmpfs -o mode=755,size=1g enclos-mpi "$folder"
cd "$folder"
mkdir upper work merged
mount -t overlay -o "lowerdir=$root,upperdir=$PWD/upper,workdir=$PWD/work" overlay merged
mount -t proc proc merged/proc
cp -L /etc/resolv.conf merged/etc/resolv.conf
for file in $not_unpacked; do echo "path-exclude=*/$file" >> merged/etc/dpkg/dpkg.cfg.d/enclos; done
cp "$sources"/ring.c "$sources"/modex.c merged/root
chroot merged apt-get -q update
chroot merged apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends $packages
# Not installed: what they depend on, compilers of other languages, would be most of the work.
chroot merged sh -euc 'cd /root
apt-get -q -o APT::Sandbox::User=root download '"$headers"'
for package in *.deb; do dpkg-deb -x "$package" /; done
for library in openmpi mpich; do mpicc.$library -O2 -o /usr/bin/ring-$library ring.c; done
gcc -O2 -o /usr/bin/modex -I/usr/lib/"$(gcc -print-multiarch)"/pmix2/include modex.c -l:libpmix.so.2'
# Debian's unstable keeps OpenMPI from every interface but lo, to be quiet where packages are tested.
sed -i '/^btl_tcp_if_include *= *lo$/d' merged/etc/openmpi/openmpi-mca-params.conf
chroot merged dpkg-query -W -f '${Package} ${Version}\\n' > "$versions"
umount merged/proc
eval "mksquashfs merged '$fresh' -comp zstd -Xcompression-level 1 -noappend -all-root -quiet -no-progress \\
    -wildcards -e $left_out"
"""


@dataclass(frozen=True, slots=True)
class MpiImage:
    """What a Debian release has: for each library a squashfs file with a program, and the libraries' versions."""

    suite: str
    files: dict[str, Path]
    programs: dict[str, str]
    versions: dict[str, str]

    def install(self, images: Path) -> None:
        """Put its files into a cluster's folder of images."""
        for source in self.files.values():
            target = images / source.name
            if not target.exists():
                # Copied aside and renamed, so that nobody sees half of it.
                shutil.copyfile(source, fresh := target.with_suffix(".new"))
                fresh.rename(target)

    def path(self, library: str) -> str:
        """The image with the program of that library, on every machine of a cluster."""
        return f"/images/{self.files[library].name}"


def make(suite: str) -> MpiImage:
    """The image of a Debian release, made where it is not in the cache.

    Raises:
        ReleaseError: it cannot be made; the text says why. Unstable cannot always be installed.
        ImageError: the trial cluster's cannot.
    """
    slurm = next(slurm for slurm, name in releases.SUITES.items() if name == suite)
    root = releases.find(slurm)
    if root is None:
        openmpi, mpich = (image.make(library).squashfs for library in ("openmpi", "mpich"))
        files = {"openmpi": openmpi, "mpich": mpich, "pmix": openmpi}
        return MpiImage(suite, files, {"openmpi": "ring", "mpich": "ring", "pmix": "modex"}, own_versions())
    sources = [image.RING_SOURCE, image.MODEX_SOURCE]
    content = [repr((MAKE_IMAGE, PACKAGES, HEADERS, NOT_UNPACKED, LEFT_OUT)), *(path.read_text() for path in sources)]
    digest = hashlib.sha256("".join([root.path.name, *content]).encode()).hexdigest()[:12]
    made = releases.cache() / f"mpi-{suite}-{digest}.sqsh"
    with releases.locked(made.with_suffix(".lock")):
        if not made.exists():
            _make(root, suite, made)
    versions = read_versions(made.with_suffix(".versions").read_text())
    return MpiImage(suite, dict.fromkeys(LIBRARIES, made), PROGRAMS, versions)


def make_all() -> dict[str, MpiImage | Exception]:
    """Those of all releases, side by side: the first time they wait for a mirror. An error stands for its image."""
    suites = list(releases.SUITES.values())
    with ThreadPoolExecutor(len(suites)) as pool:
        return dict(zip(suites, pool.map(_try, suites), strict=True))


def _try(suite: str) -> MpiImage | Exception:
    try:
        return make(suite)
    except (releases.ReleaseError, image.ImageError) as error:
        return error


def _make(root: releases.Root, suite: str, made: Path) -> None:
    folder, fresh = made.with_suffix(".folder"), made.with_suffix(".new")
    folder.mkdir(exist_ok=True)
    values = {
        "root": str(root.path),
        "folder": str(folder),
        "fresh": str(fresh),
        "versions": str(made.with_suffix(".versions")),
        "sources": str(image.RING_SOURCE.parent),
        "packages": " ".join(PACKAGES),
        "headers": " ".join(HEADERS),
        "not_unpacked": " ".join(NOT_UNPACKED),
        "left_out": " ".join(shlex.quote(name) for name in LEFT_OUT),
    }
    releases.run(MAKE_IMAGE, values, made.with_suffix(".log"), f"an image of Debian's {suite} with MPI libraries")
    folder.rmdir()
    fresh.rename(made)


def own_versions() -> dict[str, str]:
    """Those of the machine's own Debian."""
    command = ["dpkg-query", "-W", "-f", "${Package} ${Version}\\n"]
    return read_versions(subprocess.run(command, capture_output=True, text=True, check=False).stdout)


def read_versions(shown: str) -> dict[str, str]:
    """Upstream's versions by library, from rows of package and version."""
    found = {}
    for row in shown.splitlines():
        package, _, version = row.partition(" ")
        if package in VERSIONS and version:
            # Debian writes 4.3.0+really4.2.1-1 where it went back.
            upstream = version.rpartition("+really")[2].partition("+")[0]
            found[VERSIONS[package]] = upstream.rpartition("-")[0] or upstream
    return found
