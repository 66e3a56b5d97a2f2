"""Importing images: from a local registry into the node's cache, against what one would do without Enclos.

    sudo .venv/bin/python -m benchmarks images [--quick]

Two images made of this machine's own files: 200 MB in one layer, 1 GB in ten. Each round times every way once, so that
what the machine does besides weighs on all of them. Ways:

    cold       our importer, nothing cached
    tools      `skopeo copy` to a directory, then `tar2sqfs` of the finished tar, with the same compression
    umoci      `skopeo copy` to a layout, `umoci unpack`, `mksquashfs`, with the same compression
    cached     our importer, all layers there, none converted
    merge      our importer on the OCI layout itself: the merge alone, no transport
    top        our importer, one changed top layer, the parts below it cached
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enclos.runtime import protocol
from enclos.runtime.images import manifest
from enclos.runtime.images.layout import Store
from enclos.runtime.images.manifest import LayerInfo
from enclos.runtime.images.order import Limits, Order, Packing

from benchmarks.machine import describe
from benchmarks.result import Claim, Result, Table

NAME = "images"
TITLE = "imports of images, against skopeo with tar2sqfs and umoci with mksquashfs"
PACKING = Packing("zstd", 1, 131072)
SLOT = 65520
MEMORY = 228 << 20  # imports.memory as shipped.
MEMORY_MB = 300
SAMPLE_SECONDS = 0.02
ONE, TEN = "200 MB, one layer", "1 GB, ten layers"


@dataclass
class Image:
    """An image in a registry, in the forms that the ways start from."""

    name: str
    folder: Path
    reference: str = ""
    digest: str = ""
    layers: tuple[LayerInfo, ...] = ()
    samples: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: float = 0.0


def run(*, quick: bool) -> Result:
    """Both images, all ways."""
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory(prefix="enclos-bench-", dir="/var/tmp") as name, _registry(Path(name)) as address:
        images = [_make(Path(name), address, ONE, 1, 200), _make(Path(name), address, TEN, 10, 1000)]
        os.sync()  # What making them has left to write would weigh on the first round.
        for _ in range(rounds):
            for image in images:
                _round(image, address)
        return _result(images, _metadata(images[1]))


# --- the images ------------------------------------------------------------------------------------------------------


def _make(folder: Path, address: str, name: str, count: int, megabytes: int) -> Image:
    """Layers of this machine's files, pushed; a second image has another top layer."""
    image = Image(name, folder / f"image{count}")
    image.folder.mkdir()
    files = _files()
    layout = f"{image.folder}/layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:base"], check=True)
    flat = image.folder / "flat.tar"
    with tarfile.open(flat, "w", format=tarfile.PAX_FORMAT) as whole:
        for number in range(count):
            path = image.folder / "layer.tar"
            _write_layer(path, files, f"layer{number}", (megabytes << 20) // count, whole)
            source = f"{layout}:base" if number == 0 else f"{layout}:t"
            command = ["umoci", "raw", "add-layer", "--image", source, "--tag", "t", str(path)]
            if number == count - 1:
                subprocess.run([*command[:-2], "top", _other_top(image.folder)], check=True)
            subprocess.run(command, check=True)
    target = f"docker://{address}/image{count}"
    for tag in ("t", "top"):
        push = ["skopeo", "copy", "-q", "--dest-tls-verify=false", "--preserve-digests"]
        subprocess.run([*push, f"oci:{layout}:{tag}", f"{target}:{tag}"], check=True)
    image.reference = f"{target}:t"
    return image


def _files() -> Iterator[Path]:
    """Files below /usr, over and over."""
    found = [Path(directory, name) for directory, _, names in os.walk("/usr") for name in sorted(names)]
    small = [path for path in found if path.is_file() and not path.is_symlink() and path.stat().st_size < 20 << 20]
    while True:
        yield from small


def _write_layer(path: Path, files: Iterator[Path], prefix: str, size: int, whole: tarfile.TarFile) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        made: set[str] = set()
        while archive.offset < size:
            source = next(files)
            name = f"{prefix}{source}"
            for parent in [*reversed(Path(name).parents)][1:]:
                if str(parent) not in made:
                    made.add(str(parent))
                    info = tarfile.TarInfo(str(parent))
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
                    whole.addfile(info)
            if name in made:
                continue
            made.add(name)
            for each in (archive, whole):
                info = each.gettarinfo(str(source), name)
                info.type = tarfile.REGTYPE
                info.size = source.stat().st_size
                with open(source, "rb") as data:
                    each.addfile(info, data)


def _other_top(folder: Path) -> str:
    path = folder / "top.tar"
    (folder / "changed").write_text("changed\n")
    with tarfile.open(path, "w") as archive:
        archive.add(str(folder / "changed"), "changed")
    return str(path)


@contextlib.contextmanager
def _registry(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: {address}}}\n"
    )
    conf = Path(f"/etc/containers/registries.conf.d/enclos-bench-{os.getpid()}.conf")
    conf.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        host, port = address.split(":")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                break
            time.sleep(0.05)
        yield address
    finally:
        conf.unlink()
        process.terminate()
        process.wait()


# --- the ways --------------------------------------------------------------------------------------------------------


def _round(image: Image, address: str) -> None:
    def note(way: str, seconds: float) -> None:
        image.samples.setdefault(way, []).append(seconds)

    with new_store(image) as store:
        note("cold", import_image(image, store, image.reference, measure=True))
        parts = [path.removesuffix(".sqsh") for path in os.listdir(f"{store.directory}/parts")]
        top = image.reference.removesuffix(":t") + ":top"
        note("top", import_image(image, store, top, reuse=parts))
    note("tools", _timed(lambda: _tools(image)))
    with new_store(image) as store:
        blobs = f"{store.work_path(image.digest)}/blobs/sha256"
        shutil.copytree(f"{image.folder}/layout/blobs/sha256", blobs)
        note("cached", import_image(image, store, image.reference))
    with new_store(image) as store:
        note("merge", import_image(image, store, f"oci:{image.folder}/layout:t"))
    note("umoci", _timed(lambda: _umoci(image)))


@contextlib.contextmanager
def new_store(image: Image) -> Iterator[Store]:
    store = Store(str(image.folder / "store"))
    store.make()
    yield store
    shutil.rmtree(store.directory)


class ImportFailed(Exception):
    """An importer that gave up."""


def import_image(image: Image, store: Store, reference: str, reuse: Sequence[str] = (), measure: bool = False) -> float:
    """Seconds that an importer takes, its start included. Raises ImportFailed with what its user would read."""
    limits = Limits(1_000_000, 100 << 30)
    order = Order(reference, "", "", 0, 0, (), SLOT, store.directory, (), (), limits, MEMORY, PACKING)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    order_fd = os.memfd_create("order", 0)
    os.write(order_fd, protocol.encode(order.fields()))
    code = "from enclos.runtime.images.importer import main; main()"
    begin = time.monotonic()
    command = [sys.executable, "-c", code, str(theirs.fileno()), str(order_fd)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno(), order_fd])
    theirs.close()
    stop = threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(image, process.pid, stop), daemon=True)
    if measure:
        watcher.start()
    try:
        with mine:
            _follow(image, mine, reuse)
        process.wait()
        return time.monotonic() - begin
    finally:
        process.wait()
        stop.set()
        if measure:
            watcher.join()
        os.close(order_fd)


def _follow(image: Image, importer: socket.socket, reuse: Sequence[str]) -> None:
    """Have the image made; what the importer finds out is noted with it."""
    while (message := protocol.receive(importer)) is None or message.get("state") != "done":
        if message is None:
            raise ImportFailed(f"the importer of {image.name} ended early")
        if message.get("state") == "error":
            raise ImportFailed(f"{message.get('what')}: {message.get('cause')}")
        if message.get("state") == "resolved":
            if not image.digest:
                image.digest = message.get("digest")
                rows = (text.partition(" ") for text in message.all("layer"))
                image.layers = tuple(LayerInfo(digest, int(size)) for digest, _, size in rows)
            protocol.send(importer, [("state", "build"), *(("part", key) for key in reuse)])


def _watch_memory(image: Image, pid: int, stop: threading.Event) -> None:
    """The most that the importer and everything below it had at a time, shared pages counted once (PSS)."""
    while not stop.wait(SAMPLE_SECONDS):
        total = 0
        for process in _tree(pid):
            with contextlib.suppress(OSError), open(f"/proc/{process}/smaps_rollup") as file:
                total += next((int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
        image.peak_mb = max(image.peak_mb, total / 1024)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    found += [int(child) for child in file.read().split()]
    return found


def _timed(action: Callable[[], None]) -> float:
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def _tools(image: Image) -> None:
    target = image.folder / "tools"
    copy = ["skopeo", "copy", "-q", image.reference, f"dir:{target}"]
    subprocess.run(copy, check=True)
    pack = ["tar2sqfs", "-q", "-s", "-f", "-c", PACKING.compression, "-X", f"level={PACKING.level}"]
    with open(image.folder / "flat.tar", "rb") as flat:
        subprocess.run([*pack, str(image.folder / "tools.sqsh")], stdin=flat, check=True)
    shutil.rmtree(target)


def _umoci(image: Image) -> None:
    layout, bundle = image.folder / "umoci", image.folder / "bundle"
    subprocess.run(["skopeo", "copy", "-q", image.reference, f"oci:{layout}:t"], check=True)
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:t", str(bundle)], check=True, capture_output=True)
    pack = ["mksquashfs", str(bundle / "rootfs"), str(image.folder / "umoci.sqsh"), "-noappend", "-quiet"]
    compression = ["-no-progress", "-comp", "zstd", "-Xcompression-level", str(PACKING.level)]
    subprocess.run([*pack, *compression], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(layout)
    shutil.rmtree(bundle)


# --- parts against one file ------------------------------------------------------------------------------------------


def _metadata(image: Image) -> Table:
    """What parts cost at start-up and for a walk over all files, against the same image as one file."""
    rows = []
    with new_store(image) as store:
        import_image(image, store, image.reference)
        keys = [
            manifest.part_key([layer.digest for layer in group], index == 0, PACKING)
            for index, group in enumerate(manifest.group(image.layers))
        ]
        merged = str(image.folder / "tools.sqsh")
        for name, paths in ((f"{len(keys)} parts", [store.part_path(key) for key in keys]), ("one file", [merged])):
            rows.append((name, *_measure(paths, image.folder / "mnt")))
    headings = ("", "mount ms", "walk cold ms", "walk warm ms")
    return Table("start-up and metadata of the 1 GB image", headings, tuple(rows))


def _measure(paths: Sequence[str], folder: Path) -> tuple[str, str, str]:
    with contextlib.ExitStack() as stack:
        lowers = []
        begin = time.monotonic()
        for index, path in enumerate(paths):
            lower = folder / f"lower{index}"
            lower.mkdir(parents=True)
            subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", path, str(lower)], check=True)
            stack.callback(subprocess.run, ["umount", str(lower)], check=True)
            lowers.insert(0, str(lower))
        root = folder / "root"
        root.mkdir()
        (folder / "empty").mkdir()
        options = f"ro,userxattr,lowerdir={':'.join([*lowers, str(folder / 'empty')])}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(root)], check=True)
        stack.callback(subprocess.run, ["umount", str(root)], check=True)
        mounted = time.monotonic() - begin
        walks = [_timed(lambda: _walk(root)) for _ in range(4)]
    shutil.rmtree(folder)
    return f"{mounted * 1e3:.1f}", f"{walks[0] * 1e3:.0f}", f"{statistics.median(walks[1:]) * 1e3:.0f}"


def _walk(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            os.lstat(os.path.join(directory, name))


# --- the result ------------------------------------------------------------------------------------------------------


def _result(images: Sequence[Image], metadata: Table) -> Result:
    result = Result(NAME, TITLE, machine=describe())
    for image in images:
        result.tables.append(Table.of_samples(f"{image.name}, seconds", image.samples, 2))
        result.data[image.name] = image.samples | {"peak_mb": [image.peak_mb]}
        middle = {way: statistics.median(values) for way, values in image.samples.items()}
        ratio = middle["cold"] / middle["tools"]
        words = f"{image.name}: cold is at most 2.0 times skopeo and tar2sqfs"
        result.claims.append(Claim(words, f"{ratio:.2f}", ratio <= 2))
        ratio = middle["umoci"] / middle["cold"]
        words = f"{image.name}: cold is at least 4 times faster than umoci and mksquashfs"
        result.claims.append(Claim(words, f"{ratio:.1f}", ratio >= 4))
        ratio = middle["cached"] / middle["merge"]
        words = f"{image.name}: with all layers cached it takes the time of the merge alone (at most 1.3 times)"
        result.claims.append(Claim(words, f"{ratio:.2f}", ratio <= 1.3))
        words = f"{image.name}: peak memory is at most {MEMORY_MB} MB"
        result.claims.append(Claim(words, f"{image.peak_mb:.0f} MB", image.peak_mb <= MEMORY_MB))
    middle = {way: statistics.median(values) for way, values in images[1].samples.items()}
    ratio = middle["top"] / middle["cold"]
    words = f"{TEN}: one changed top layer is a small part of the whole import (at most 0.2)"
    result.claims.append(Claim(words, f"{ratio:.2f}", ratio <= 0.2))
    result.tables.append(metadata)
    return result
