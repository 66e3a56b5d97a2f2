"""The initramfs of a guest: busybox, the modules that reach the host's files, and `init.sh`.

Made for one kernel, in a second, and kept beside it. It mounts; everything else happens after switch_root, with the
host's own programs.
"""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

from vm.kernels import Kernel, KernelUnavailable, cache

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net", "virtio_rng")
INIT = Path(__file__).with_name("init.sh")
BUSYBOX = Path("/bin/busybox")


def build(kernel: Kernel) -> Path:
    """The initramfs for a kernel, made again if init.sh is newer."""
    target = cache() / "kernels" / f"{kernel.name}.{kernel.release}.cpio.gz"
    newest = max(path.stat().st_mtime for path in (INIT, Path(__file__), kernel.image))
    if target.exists() and target.stat().st_mtime > newest:
        return target
    archive = _Archive()
    for folder in ("bin", "dev", "lib", "proc", "sys", "lower", "upper", "new"):
        archive.add(folder, 0o040755)
    archive.add("bin/busybox", 0o100755, BUSYBOX.read_bytes())
    archive.add("init", 0o100755, INIT.read_bytes())
    order = []
    for path in _with_dependencies(kernel):
        name = path.name.removesuffix(".xz")
        content = path.read_bytes()
        archive.add(f"lib/{name}", 0o100644, lzma.decompress(content) if path.suffix == ".xz" else content)
        order.append(name)
    archive.add("lib/order", 0o100644, ("\n".join(order) + "\n").encode())
    fresh = target.with_suffix(".new")
    fresh.write_bytes(gzip.compress(archive.finish(), 1))
    fresh.rename(target)
    return target


def _with_dependencies(kernel: Kernel) -> list[Path]:
    """The files of the modules, each after those that it needs; what is built into the kernel has none."""
    found: dict[Path, None] = {}
    for module in MODULES:
        command = ["modprobe", "--dirname", str(kernel.base), "--set-version", kernel.release, "--show-depends", module]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelUnavailable(f"{kernel.release} has no module {module}: {done.stderr.strip()}")
        for row in done.stdout.splitlines():
            if row.startswith("insmod "):
                found[Path(row.split()[1])] = None
    return list(found)


class _Archive:
    """A cpio archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        numbers = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._parts += [_padded(header + encoded), _padded(content)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
