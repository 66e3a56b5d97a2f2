"""Make the small images of the demo and the tests: busybox, bash, ip and a compiled MPI program.

An image is made from this machine's own files, so nothing is fetched. It is kept in a cache that is named after what
went into it: made once, found ever after. Runs as root, without any privilege of root but owning the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster.layout import project_root

RING_SOURCE = Path(__file__).with_name("ring.c")
MODEX_SOURCE = Path(__file__).with_name("modex.c")
DIRECTORIES = ("etc", "proc", "sys", "dev", "run", "root", "home", "mnt", "opt", "srv", "var/tmp", "usr/bin", "usr/lib")
MERGED = {"bin": "usr/bin", "sbin": "usr/bin", "usr/sbin": "bin", "lib": "usr/lib", "lib64": "usr/lib64"}
PROGRAMS = ("/bin/bash", "/sbin/ip")

# `traffic CMD…` runs a command and tells what crossed the container's overlay device meanwhile; `tenant PORT CMD…`
# serves a greeting on a port while a command runs. The first task of a node does the extra work.
SCRIPTS = {
    "traffic": """\
#!/bin/bash
[ "${SLURM_LOCALID:-0}" = 0 ] || exec "$@"
count() { for device in /sys/class/net/[!l]*; do cat "$device"/statistics/{tx_packets,rx_packets,tx_bytes}; done; }
before=($(count))
"$@"
status=$?
sleep 0.2
after=($(count))
device=$(cd /sys/class/net; echo [!l]*)
echo "$(hostname): $device sent ${before[0]} -> ${after[0]} packets, received ${before[1]} -> ${after[1]} packets;" \
     "$(((after[2] - before[2]) / 1000000)) MB sent"
exit $status
""",
    "tenant": """\
#!/bin/bash
port=$1; shift
[ "${SLURM_LOCALID:-0}" = 0 ] || exec "$@"
busybox nc -ll -p "$port" -e echo "hello from a job of $(id -un)" > /dev/null 2>&1 &
service=$!
"$@"
status=$?
kill "$service"
exit $status
""",
}

# What OpenMPI needs when slurmstepd starts its ranks: shared memory and TCP. The network hardware's
# components are left out, and with them UCX and libfabric.
# fmt: off
OPENMPI_COMPONENTS = [
    "allocator_basic", "allocator_bucket", "bml_r2", "btl_self", "btl_tcp", "btl_vader", "coll_basic",
    "coll_inter", "coll_libnbc", "coll_self", "coll_sm", "coll_sync", "coll_tuned", "errmgr_default_app",
    "ess_env", "ess_pmi", "ess_singleton", "grpcomm_direct", "mpool_hugepage", "op_avx", "osc_pt2pt",
    "osc_rdma", "osc_sm", "patcher_overwrite", "pmix_ext3x", "pmix_isolated", "pml_ob1", "pstat_linux",
    "rcache_grdma", "reachable_weighted", "rml_oob", "routed_direct", "schizo_ompi", "schizo_slurm",
    "shmem_mmap", "shmem_posix", "shmem_sysv", "state_app", "topo_basic",
]
# fmt: on
OPENMPI_PARAMETERS = """\
# This machine has no fast network, and more ranks than processors.
pml = ob1
btl = self,vader,tcp
osc = ^ucx
mpi_yield_when_idle = 1
hwloc_base_binding_policy = none
"""
OPENMPI_DATA = ("usr/share/openmpi/help-mpi-errors.txt", "usr/share/openmpi/help-mpi-runtime.txt")


class ImageError(RuntimeError):
    """An image cannot be made; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image in its two forms, with the same files."""

    directory: Path
    squashfs: Path


def cache() -> Path:
    """Where images are kept: in the checkout's build folder, or the machine's cache."""
    root = project_root()
    return root / "build" / "images" if root else Path("/var/cache/enclos-cluster/images")


def make(mpi: str = "openmpi") -> Image:
    """The image with the MPI program, made when it is not in the cache.

    Args:
        mpi: `openmpi` (started by PMIx) or `mpich` (started by PMI-2).

    Raises:
        ImageError: a compiler, tool or library is missing.
    """
    if mpi not in ("openmpi", "mpich"):
        raise ImageError(f"no MPI {mpi}; there are openmpi and mpich")
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{mpi}-{_fingerprint(mpi)}"
    image = Image(folder / name, folder / f"{name}.sqsh")
    with _locked(folder):
        if not image.squashfs.exists():
            _fill(image, mpi)
    return image


def install(images: Path, mpi: str = "openmpi") -> Image:
    """Put the image into a cluster's folder of images, where only root writes: `MPI.sqsh` and the folder `MPI`."""
    made = make(mpi)
    placed = Image(images / mpi, images / f"{mpi}.sqsh")
    for source, target in ((made.squashfs, placed.squashfs), (made.directory, placed.directory)):
        if not target.exists():
            # Copied aside and renamed, so that nobody sees half of it.
            subprocess.run(["cp", "-a", str(source), f"{target}.new"], check=True)
            Path(f"{target}.new").rename(target)
    return placed


def _fingerprint(mpi: str) -> str:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), RING_SOURCE, MODEX_SOURCE)))
    compiler = shutil.which(f"mpicc.{mpi}")
    if compiler is None:
        raise ImageError(f"mpicc.{mpi} is not installed; `make deps` installs it")
    shown = subprocess.run([compiler, "-show"], capture_output=True, text=True, check=True).stdout
    libraries = (Path(word[2:]) for word in shown.split() if word.startswith("-L"))
    digest.update(shown.encode())
    digest.update(repr([library.stat().st_mtime for library in libraries]).encode())
    return digest.hexdigest()[:12]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fill(image: Image, mpi: str) -> None:
    """Make both forms; the squashfs is renamed last, so that its being there means that all is."""
    shutil.rmtree(image.directory, ignore_errors=True)
    root = image.directory
    _skeleton(root)
    _busybox(root)
    for name, text in SCRIPTS.items():
        (root / "usr/bin" / name).write_text(text)
        (root / "usr/bin" / name).chmod(0o755)
    program = root / "usr/bin/ring"
    _run([f"mpicc.{mpi}", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(RING_SOURCE)])
    for path in (program, *map(Path, PROGRAMS)):
        if path != program:
            _copy(root, path)
        _copy_libraries(root, [path])
    if mpi == "openmpi":
        _openmpi(root)
    fresh = image.squashfs.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    _run(["mksquashfs", str(root), str(fresh), "-comp", "zstd", "-noappend", "-all-root", "-quiet", "-no-progress"])
    fresh.chmod(0o644)
    fresh.rename(image.squashfs)


def _skeleton(root: Path) -> None:
    for name in (*DIRECTORIES, "usr/lib64"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    for name, target in MERGED.items():
        (root / name).symlink_to(target)
    texts = {
        "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        "group": "root:x:0:\nnogroup:x:65534:\n",
        "os-release": 'NAME="Enclos trial image"\nID=enclos-trial\nPRETTY_NAME="Enclos trial image"\n',
        "hosts": "127.0.0.1 localhost\n",
        "hostname": "",
        "resolv.conf": "",
    }
    for name, text in texts.items():
        (root / "etc" / name).write_text(text)


def _busybox(root: Path) -> None:
    busybox = shutil.which("busybox", path="/bin:/usr/bin")
    if busybox is None:
        raise ImageError("busybox is not installed; `make deps` installs busybox-static")
    shutil.copy(busybox, root / "usr/bin/busybox")
    for applet in _run([busybox, "--list"]).split():
        link = root / "usr/bin" / applet
        if not link.exists():
            link.symlink_to("busybox")


def _openmpi(root: Path) -> None:
    """Add a program for PMIx alone, and what OpenMPI and PMIx open by name, which ldd does not show."""
    library = _library_folder(root, "libmpi.so.40")
    modex = [f"-I{library}/pmix2/include", "-o", str(root / "usr/bin/modex"), str(MODEX_SOURCE), "-l:libpmix.so.2"]
    _run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *modex])
    components = library / "openmpi/lib/openmpi3"
    chosen = [components / f"mca_{name}.so" for name in OPENMPI_COMPONENTS]
    wanted = [path for path in chosen if path.exists()]
    if components / "mca_pmix_ext3x.so" not in wanted:
        raise ImageError(f"OpenMPI's PMIx component is not in {components}")
    pmix = sorted((library / "pmix2/lib/pmix").glob("*.so"))
    for path in (*wanted, *pmix):
        _copy(root, path)
    _copy_libraries(root, [*wanted, *pmix, root / "usr/bin/modex"])
    for folder in (library / "pmix2/share/pmix", Path("/usr/share/pmix")):
        if folder.is_dir():
            shutil.copytree(folder.resolve(), root / folder.relative_to("/"), dirs_exist_ok=True)
    for name in OPENMPI_DATA:
        if Path("/", name).exists():
            _copy(root, Path("/", name))
    (root / "etc/openmpi").mkdir()
    (root / "etc/openmpi/openmpi-mca-params.conf").write_text(OPENMPI_PARAMETERS)


def _library_folder(root: Path, name: str) -> Path:
    """The folder of a library that was copied already, on this machine: /usr/lib/x86_64-linux-gnu."""
    for path in sorted((root / "usr/lib").rglob(name)):
        return Path("/") / path.parent.relative_to(root)
    raise ImageError(f"the MPI program does not use {name}")


def _copy(root: Path, path: Path) -> None:
    """Copy one file to its place, as a plain file: folders through which it is reached are resolved."""
    place = path.parent.resolve() / path.name
    if place.is_relative_to("/usr/sbin"):
        place = Path("/usr/bin") / place.name
    target = root / place.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy(path, target)


def _copy_libraries(root: Path, binaries: Iterable[Path]) -> None:
    for binary in binaries:
        for library in libraries(binary):
            _copy(root, library)


def libraries(binary: Path) -> list[Path]:
    """The shared libraries of a program or library of this machine, the loader included.

    Raises:
        ImageError: one of them is not installed.
    """
    shown = _run(["ldd", str(binary)])
    if "not found" in shown:
        raise ImageError(f"{binary}: {shown.strip()}")
    return [Path(path) for path in re.findall(r"(?:=>\s+|^\s+)(/\S+)\s+\(0x", shown, re.MULTILINE)]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ImageError(f"{command[0]} is not installed; `make deps` installs it") from error
    if done.returncode != 0:
        raise ImageError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
