"""Images and registries that nobody expects: very many layers, one layer several times, names and depths at the limits;
registries that are busy, slow, or send one elsewhere; work directories that a hostile fetcher left.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from enclos.runtime.images.layout import Store
from enclos.runtime.images.manifest import part_key
from enclos.runtime.images.order import Limits, Packing
from layers import Entry, layer, listing, umoci_unpack, write_layout
from registries import served
from test_image_import import USER, Import, blob, home, imported, index_of, left, store
from test_image_merge import mounted

__all__ = ["home", "store"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

Handler = http.server.BaseHTTPRequestHandler
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


@contextlib.contextmanager
def scripted(layout: Path, answer: Callable[[Handler, str], bool], name: str = "") -> Iterator[str]:
    """A registry with the image of a layout, also as a proxy to one of that name; its address.

    Args:
        answer: asked first, with the digits or the tag that are wanted; whether it answered.
    """

    class Scripted(Handler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2].removeprefix("sha256:")
            if answer(self, name):
                return
            found = blob(layout, f"sha256:{name}" if len(name) == 64 else index_of(layout))
            send(self, found)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with served(Scripted, name) as address:
        yield address


def send(handler: Handler, data: bytes, begun: threading.Event | None = None) -> None:
    """Answer with a manifest or a blob; the second half of it a second after `begun`."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if handler.command == "GET":
        half = len(data) // 2 if begun is not None else 0
        handler.wfile.write(data[:half])
        if begun is not None and begun.wait(30):
            time.sleep(1)
        handler.wfile.write(data[half:])


def test_a_layer_that_needs_those_below_stops_no_download(store: Store, tmp_path: Path) -> None:
    """What the image has to be merged for is known while its large layer is on its way: it is fetched once."""
    layers = [layer([Entry("d", "dir"), Entry("large", data=os.urandom(30 << 20))]), layer([Entry("d/x")])]
    write_layout(tmp_path / "layout", layers)
    large, small = (
        row["digest"][7:] for row in json.loads(blob(tmp_path / "layout", index_of(tmp_path / "layout")))["layers"]
    )
    asked, begun = [], threading.Event()

    def answer(handler: Handler, name: str) -> bool:
        if name == small:
            begun.set()
        if name == large and handler.command == "GET":
            asked.append(name)
            send(handler, blob(tmp_path / "layout", f"sha256:{large}"), begun)
            return True
        return False

    with scripted(tmp_path / "layout", answer) as address:
        keys, _ = imported(f"docker://{address}/needs:t", store)
    assert len(keys) == 1 and len(asked) == 1


def test_a_registry_that_is_busy(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", [layer([Entry("x")])])

    def answer(handler: Handler, name: str) -> bool:
        if "/manifests/" in handler.path:
            handler.send_error(503)
        return "/manifests/" in handler.path

    with scripted(tmp_path / "layout", answer) as address:
        said = Import(f"docker://{address}/busy:t", store).error()
    assert said == f"the registry {address} does not serve it now (503 Service Unavailable)"


def test_the_right_to_a_blob_is_not_told(store: Store, tmp_path: Path) -> None:
    """Registries send their clients to a store of objects, with a signature that is as good as a password."""
    write_layout(tmp_path / "layout", [layer([Entry("x")])])
    (row,) = json.loads(blob(tmp_path / "layout", index_of(tmp_path / "layout")))["layers"]

    def answer(handler: Handler, name: str) -> bool:
        if name != row["digest"][7:] and "Signature" not in name:
            return False
        handler.send_response(307)  # And there again, until the client gives up.
        place = f"http://user:secret-word@{handler.headers['Host']}/blob?Signature=secret-word"
        handler.send_header("Location", place)
        handler.end_headers()
        return True

    with scripted(tmp_path / "layout", answer) as address:
        running = Import(f"docker://{address}/signed:t", store)
        running.receive()
        running.go()
        message = running.receive()
    assert message["state"] == ["error"] and "secret-word" not in str(message), message


def test_a_link_in_a_work_directory_is_not_followed(store: Store, tmp_path: Path) -> None:
    """As a fetcher could leave it that a registry had taken over: root makes files there for the next one."""
    write_layout(tmp_path / "layout", [layer([Entry("x")])])
    outside = tmp_path / "outside"
    outside.mkdir()
    work = Path(store.work_path(index_of(tmp_path / "layout"), USER))
    for place in (work, work / "blobs", work / "blobs/sha256"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(outside)
        with scripted(tmp_path / "layout", lambda handler, name: False) as address:
            imported(f"docker://{address}/link:t", store)
        assert os.listdir(outside) == [] and outside.stat().st_uid == 0
        assert left(store)["work"] == []


@pytest.mark.parametrize("more", [-100, 100])
def test_a_manifest_whose_sizes_are_wrong(store: Store, tmp_path: Path, more: int) -> None:
    """The only layer is read while it arrives: nobody waits for bytes that do not come."""
    write_layout(tmp_path / "layout", [layer([Entry("x", data=os.urandom(1 << 20))])])
    described = json.loads(blob(tmp_path / "layout", index_of(tmp_path / "layout")))
    described["layers"][0]["size"] += more

    def answer(handler: Handler, name: str) -> bool:
        if "/manifests/" in handler.path:
            send(handler, json.dumps(described).encode())
        return "/manifests/" in handler.path

    with scripted(tmp_path / "layout", answer) as address:
        said = Import(f"docker://{address}/sizes:t", store).error()
    assert said.endswith("(a layer has another size than its manifest says)")
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_a_proxy_of_the_site(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose only way out is one, named in the agent's environment."""
    write_layout(tmp_path / "layout", [layer([Entry("x")])])
    asked = []

    def answer(handler: Handler, name: str) -> bool:
        asked.append(handler.path)
        return False

    with scripted(tmp_path / "layout", answer, "upstream.invalid") as address:
        monkeypatch.setenv("http_proxy", f"http://{address}")
        imported("docker://upstream.invalid/proxied:t", store)
    assert {path.partition("/v2/")[0] for path in asked} == {"http://upstream.invalid"}
