"""Images that nobody expects: very many layers, one layer several times, names and depths at the limits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from enclos.runtime.images.layout import Store
from enclos.runtime.images.manifest import part_key
from enclos.runtime.images.order import Limits, Packing
from layers import Entry, layer, listing, umoci_unpack, write_layout
from test_image_import import blob, home, imported, index_of, left, store
from test_image_merge import mounted

__all__ = ["home", "store"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PACKING = Packing("zstd", 1, 131072)  # That of `imported`.


def in_layout(home: Path, layers: list[bytes], **more: object) -> str:
    write_layout(home / "layout", layers, **more)  # type: ignore[arg-type]
    for path in (home / "layout").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (home / "layout").chmod(0o755)
    return f"oci:{home}/layout:t"


@pytest.mark.parametrize("whole", [False, True])
def test_very_many_layers(store: Store, home: Path, tmp_path: Path, whole: bool) -> None:
    """More layers than a sandbox may open files."""
    layers = [layer([Entry("names", "dir"), Entry(f"names/{number}", data=b"%d" % number)]) for number in range(900)]
    keys, _ = imported(in_layout(home, layers), store, whole=whole)
    with mounted([Path(store.part_path(key)) for key in keys], tmp_path) as root:
        assert sorted(map(int, os.listdir(root / "names"))) == list(range(900))


def test_a_deep_directory_that_is_made_opaque(store: Store, home: Path, tmp_path: Path) -> None:
    deep = [Entry("/".join(["d"] * depth), "dir") for depth in range(1, 1900)]
    layers = [layer(deep), layer([*deep, Entry("d/.wh..wh..opq")])]
    keys, _ = imported(in_layout(home, layers), store)
    with mounted([Path(store.part_path(key)) for key in keys], tmp_path) as root:
        found = subprocess.run(["find", root, "-type", "d"], check=True, capture_output=True, text=True).stdout
        assert len(found.splitlines()) == 1900


def test_the_same_large_layer_several_times(store: Store, home: Path, tmp_path: Path) -> None:
    """Each would become a part of the same name, and an overlay takes a file only once."""
    noise = os.urandom(25 << 20)
    base = layer([Entry("d", "dir"), Entry("d/of-base"), Entry("gone"), Entry("large", data=noise)])
    large = layer(
        [
            Entry("d", "dir", mode=0o750),
            Entry("d/large", data=noise),
            Entry("e", "dir"),
            Entry("e/x"),
            Entry(".wh.gone"),
        ]
    )
    between = layer([Entry(".wh.d"), Entry("gone", data=b"again"), Entry("e"), Entry("between", data=noise)])
    keys, _ = imported(in_layout(home, [base, large, between, large, large]), store)
    assert len(keys) == 3
    described = json.loads(blob(home / "layout", index_of(home / "layout")))["layers"]
    order = [row["digest"] for row in (described[0], described[2], described[4])]
    paths = [Path(store.part_path(part_key([digest], not at, PACKING))) for at, digest in enumerate(order)]
    with mounted(paths, tmp_path) as root:
        assert listing(root) == listing(umoci_unpack(home / "layout", tmp_path / "bundle"))


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_layers_of_nothing(store: Store, home: Path, tmp_path: Path, compression: str) -> None:
    """No member at all, an archive without a byte, one file without bytes."""
    layers = [b"", layer([]), layer([Entry("empty")]), b""]
    keys, _ = imported(in_layout(home, layers, compression=compression), store)
    with mounted([Path(store.part_path(key)) for key in keys], tmp_path) as root:
        assert os.listdir(root) == ["empty"] and (root / "empty").stat().st_size == 0


def test_names_in_any_language_and_as_long_as_can_be(store: Store, home: Path, tmp_path: Path) -> None:
    names = ["ü" * 127, "日本語", "n" * 255, "a b\tc\nd", "\\", "-rf", "x" * 100, "\udcff\udcfe"]
    layers = [layer([Entry(name, data=name.encode("utf-8", "surrogateescape")) for name in names])]
    keys, _ = imported(in_layout(home, layers), store, limits=Limits(1000, 1 << 30))
    with mounted([Path(store.part_path(key)) for key in keys], tmp_path) as root:
        assert sorted(os.listdir(root)) == sorted(names)
    assert left(store)["work"] == []
