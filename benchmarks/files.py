"""Peak memory of an import by the number of its files, not by their size.

    sudo .venv/bin/python -m benchmarks files [--quick]

A million empty files, the limit as shipped, a thousand to a directory: in one layer, and in two that become one file.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from benchmarks.imports import MEMORY_MB, Image, import_image, new_store
from benchmarks.machine import describe
from benchmarks.result import Claim, Result, Table

NAME = "files"
TITLE = "memory of an import with a million files"
# With their directories no more than a million.
FILES, QUICK_FILES, PER_DIRECTORY = 999_000, 50_000, 1000


def run(*, quick: bool) -> Result:
    """Both images, once each."""
    count = QUICK_FILES if quick else FILES
    with tempfile.TemporaryDirectory(prefix="enclos-bench-", dir="/var/tmp") as name:
        images = [_measured(Path(name), layers, count) for layers in (1, 2)]
    rows = [(image.name, f"{image.samples['merge'][0]:.1f} s", f"{image.peak_mb:.0f} MB") for image in images]
    result = Result(NAME, TITLE, machine=describe())
    result.tables.append(Table("imports", ("image", "time", "peak memory"), tuple(rows)))
    for image in images:
        words = f"{image.name}: peak memory is at most {MEMORY_MB} MB"
        result.claims.append(Claim(words, f"{image.peak_mb:.0f} MB", image.peak_mb <= MEMORY_MB))
    return result


def _measured(folder: Path, layers: int, count: int) -> Image:
    image = Image(f"{count} empty files in {layers} layer{'s'[: layers - 1]}", folder / str(layers))
    image.folder.mkdir()
    layout = f"{image.folder}/layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:t"], check=True)
    for number in range(layers):
        path = image.folder / "layer.tar"
        _write_layer(path, number * count // layers, (number + 1) * count // layers)
        subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:t", str(path)], check=True)
        path.unlink()
    with new_store(image) as made:
        image.samples["merge"] = [import_image(image, made, f"oci:{layout}:t", measure=True)]
    return image


def _write_layer(path: Path, begin: int, end: int) -> None:
    with open(path, "wb", 1 << 20) as file:
        for number in range(begin, end):
            directory = f"directory{number // PER_DIRECTORY:04d}"
            if number % PER_DIRECTORY == 0:
                info = tarfile.TarInfo(directory)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.write(tarfile.TarInfo(f"{directory}/file{number:07d}").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(io.DEFAULT_BUFFER_SIZE))
