"""The image with what speaks verbs: made from this machine's files, and kept where the trial cluster's images are.

`vm test` makes it before a guest starts: a squashfs file is a matter of a second here, and of twenty in a guest.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from enclos.runtime.cluster import image

from vm.kernels import locked

IMAGE = "/images/verbs.sqsh"
PROGRAMS = ("ibv_rc_pingpong", "ibv_devinfo", "ib_write_bw", "ib_write_lat", "rping")
# What ldd does not show: the driver's user part, and what threads of rping end with.
LOADED = ("libibverbs/librxe-rdmav34.so", "libgcc_s.so.1")
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


# Ours, with how they are linked: where there is no container the system's libraries may be another release's.
SOURCES = {"netadmin": ("-static",), "indexes": ("-libverbs",)}


def install(images: Path) -> None:
    """Put the image into a cluster's folder of images, and the program that runs outside of it, too."""
    shutil.copy(make(), images / Path(IMAGE).name)
    shutil.copy(programs() / "netadmin", images)


def programs() -> Path:
    """The folder with the programs of our own: netadmin.c and indexes.c beside this file, compiled once."""
    sources = [Path(__file__).with_name(f"{name}.c") for name in SOURCES]
    digest = hashlib.sha256(repr([path.read_text() for path in sources]).encode()).hexdigest()[:12]
    folder = image.cache() / f"verbs-programs-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(image.cache()):
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            for source, (name, options) in zip(sources, SOURCES.items(), strict=True):
                command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(fresh / name), str(source), *options]
                subprocess.run(command, check=True)
            fresh.rename(folder)
    return folder


def make() -> Path:
    """The trial image with verbs, as a squashfs file: programs, and the driver's user part."""
    base = image.make("openmpi")
    own = programs()
    found = [Path(path) for name in PROGRAMS if (path := shutil.which(name))]
    assert len(found) == len(PROGRAMS), "`make deps` installs what is missing"
    wanted = [*found, *(LIBRARIES / name for name in LOADED)]
    files = sorted({path.resolve() for path in [*wanted, *_libraries(wanted)]})
    stamps = [(str(path), path.stat().st_mtime) for path in files]
    origin = (base.squashfs.name, own.name, Path(__file__).read_text(), stamps)
    target = image.cache() / f"verbs-{hashlib.sha256(repr(origin).encode()).hexdigest()[:12]}.sqsh"
    with locked(image.cache()):
        if not target.exists():
            _fill(base.directory, wanted, own, target)
    return target


def _libraries(files: list[Path]) -> list[Path]:
    return [library for path in files for library in image.libraries(path)]


def _fill(base: Path, wanted: list[Path], own: Path, squashed: Path) -> None:
    with tempfile.TemporaryDirectory(dir=squashed.parent) as scratch:
        root = Path(scratch) / "root"
        subprocess.run(["cp", "-a", str(base), str(root)], check=True)
        add_driver(root, [*wanted, *_libraries(wanted)])
        for name in SOURCES:
            shutil.copy(own / name, root / "usr/bin")
        fresh = Path(scratch) / squashed.name
        options = ["-all-root", "-noappend", "-quiet", "-no-progress"]
        subprocess.run(["mksquashfs", str(root), str(fresh), *options], check=True, stdout=subprocess.DEVNULL)
        fresh.chmod(0o644)
        fresh.rename(squashed)


def add_driver(root: Path, files: list[Path]) -> None:
    """Put files of this machine into an image, among them the driver's user part, and say that it is there."""
    for path in files:
        target = root / path.parent.resolve().relative_to("/") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy(path, target)
    (root / "etc/libibverbs.d").mkdir()
    (root / "etc/libibverbs.d/rxe.driver").write_text("driver rxe\n")
