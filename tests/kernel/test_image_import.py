"""The importer against real registries: its way from a reference to squashfs files in a store, as root runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from enclos.runtime import protocol
from enclos.runtime.images.layout import Store
from enclos.runtime.images.order import Limits, Order, Packing
from layers import Entry, layer, listing, umoci_unpack, write_layout
from registries import Registry, make_insecure, serve
from test_image_merge import mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SLOT = 65520
USER = 12345
Message = dict[str, list[str]]


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with serve(tmp_path_factory.mktemp("registry")) as running:
        conf = Path(f"/etc/containers/registries.conf.d/enclos-test-{os.getpid()}.conf")
        make_insecure([running], conf)
        yield running
        conf.unlink()


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """With TLS and a password; its certificate is trusted, as a site would do it."""
    with serve(tmp_path_factory.mktemp("private"), password=True, tls=True) as running:
        folder = Path("/etc/containers/certs.d", running.address)
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes((running.folder / "cert.pem").read_bytes())
        yield running
        (folder / "ca.crt").unlink()
        folder.rmdir()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"))
    made.make()
    os.chmod(tmp_path, 0o755)
    return made


class Import:
    """One importer, seen as the agent sees it."""

    def __init__(self, image: str, store: Store, **changes: object) -> None:
        values: dict[str, object] = {
            "image": image,
            "default_registry": "",
            "digest": "",
            "uid": USER,
            "gid": USER,
            "groups": (),
            "slot": SLOT,
            "store": store.directory,
            "auth_files": (),
            "netrc_files": (),
            "limits": Limits(100_000, 1 << 30),
            "memory": 1 << 30,
            "packing": Packing("zstd", 1, 131072),
        }
        order = Order(**values | changes)  # type: ignore[arg-type]
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order_fd = os.memfd_create("order", 0)
        os.write(order_fd, protocol.encode(order.fields()))
        code = "from enclos.runtime.images.importer import main; main()"
        command = [sys.executable, "-c", code, str(theirs.fileno()), str(order_fd)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno(), order_fd], stderr=subprocess.PIPE)
        theirs.close()
        os.close(order_fd)

    def receive(self) -> Message:
        """The next message but progress; an empty one at the end. A bug of ours fails the test."""
        while (message := protocol.receive(self.channel)) is not None:
            if message.get("state") != "progress":
                return dict(message.values)
        if text := self.end():
            pytest.fail(text)
        return {}

    def go(self, reuse: Sequence[str] = ()) -> None:
        protocol.send(self.channel, [("state", "build"), *(("part", key) for key in reuse)])

    def end(self) -> str:
        self.channel.close()
        assert self.process.stderr is not None
        if self.process.stderr.closed:
            return ""
        with self.process.stderr as stream:
            text = stream.read().decode()
        self.process.wait(20)
        return text

    def error(self) -> str:
        """The error's line, to the end."""
        while message := self.receive():
            if message["state"] == ["resolved"]:
                self.go()
            if message["state"] == ["error"]:
                assert self.end() == ""
                return f"{message['what'][0]} ({message['cause'][0]})"
        pytest.fail(f"no error: {self.end()}")


def imported(image: str, store: Store, reuse: Sequence[str] = (), **changes: object) -> tuple[list[str], Message]:
    """Import; the keys of the new parts in order of their arrival, and the last message."""
    running = Import(image, store, **changes)
    keys: list[str] = []
    message: Message = {}
    while following := running.receive():
        message = following
        if message["state"] == ["error"]:
            pytest.fail(f"{message} {running.end()}")
        if message["state"] == ["resolved"]:
            running.go(reuse)
        if message["state"] == ["part"]:
            keys += message["key"]
    assert running.end() == ""
    assert message["state"] == ["done"], message
    return keys, message


def left(store: Store) -> dict[str, list[str]]:
    return {name: sorted(os.listdir(f"{store.directory}/{name}")) for name in ("images", "parts", "work")}


LAYERS = [
    layer([Entry("etc", "dir", mode=0o755), Entry("etc/os-release", data=b"NAME=test\n"), Entry("gone")]),
    layer([Entry("big", data=os.urandom(30 << 20))]),
    layer([Entry(".wh.gone"), Entry("top", data=b"top\n")], cut=True),
]


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_an_image_arrives(registry: Registry, store: Store, tmp_path: Path, compression: str) -> None:
    config = {"Env": ["A=1"], "Cmd": ["sh"], "Secret": 1}
    digest = write_layout(tmp_path / "layout", LAYERS, compression=compression, config=config)
    registry.push(tmp_path / "layout", f"arrives{compression}")
    running = Import(f"docker://{registry.address}/arrives{compression}:t", store)
    resolved = running.receive()
    assert resolved["digest"] == [digest] and len(resolved["layer"]) == 3 and resolved["private"] == ["0"]
    running.go()
    parts = [running.receive(), running.receive()]
    done = running.receive()
    assert (done["state"], done["config"]) == (["done"], ['{"Env": ["A=1"], "Cmd": ["sh"]}'])
    assert running.end() == ""
    for part in parts:
        status = os.stat(store.part_path(part["key"][0]))
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o444)
        assert status.st_size == int(part["bytes"][0])
    assert left(store) == {"images": [], "parts": sorted(f"{part['key'][0]}.sqsh" for part in parts), "work": []}
    # The one with the large layer is the lower one.
    paths = sorted((Path(store.part_path(part["key"][0])) for part in parts), key=lambda path: -path.stat().st_size)
    with mounted(paths, tmp_path) as root:
        if compression != "zstd":  # umoci knows none.
            assert listing(root) == listing(umoci_unpack(tmp_path / "layout", tmp_path / "bundle"))
        assert (root / "top").read_bytes() == b"top\n" and not (root / "gone").exists()
