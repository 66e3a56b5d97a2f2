"""The importer against real registries: its way from a reference to squashfs files in a store, as root runs it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.server
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import quotas
from enclos.runtime import protocol
from enclos.runtime.images import manifest, sandbox
from enclos.runtime.images.layout import Store
from enclos.runtime.images.order import Limits, Order, Packing
from enclos.runtime.images.parts import finish_part
from enclos.runtime.images.sandbox import Rights
from layers import Entry, layer, listing, umoci_unpack, write_layout
from registries import PASSWORD, Registry, free_port, make_insecure, serve, served
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
def home() -> Iterator[Path]:
    """A folder that users can enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"))
    made.make()
    os.chmod(tmp_path, 0o755)
    return made


class Import:
    """One importer, seen as the agent sees it."""

    def __init__(self, image: str, store: Store, **changes: object) -> None:
        """`policy`: a policy.json that is the node's for this importer alone."""
        policy = changes.pop("policy", None)
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
        if policy is not None:
            over = f'mount --bind {policy} /etc/containers/policy.json && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", over, "sh", *command]
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

    def receive_or_look(self, seconds: float) -> Message:
        """As `receive`, or {"state": ["look"]} when nothing has come for a while."""
        ready, _, _ = select.select([self.channel], [], [], seconds)
        return self.receive() if ready else {"state": ["look"]}

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


def test_a_changed_top_layer_is_imported_alone(registry: Registry, store: Store, tmp_path: Path) -> None:
    """The part below it is taken from the cache, and its blobs are not even fetched."""
    write_layout(tmp_path / "one", LAYERS)
    registry.push(tmp_path / "one", "base")
    first, _ = imported(f"docker://{registry.address}/base:t", store)
    changed = [*LAYERS[:2], layer([Entry("top", data=b"another")])]
    write_layout(tmp_path / "two", changed)
    registry.push(tmp_path / "two", "base", "two")
    sizes = [os.stat(store.part_path(key)).st_size for key in first]
    lower = first[sizes.index(max(sizes))]
    second, _ = imported(f"docker://{registry.address}/base:two", store, reuse=[lower])
    assert len(second) == 1 and second[0] not in first
    with mounted([Path(store.part_path(key)) for key in (lower, second[0])], tmp_path) as root:
        assert (root / "top").read_bytes() == b"another" and (root / "gone").exists()


def test_layers_that_need_those_below_are_merged_with_them(registry: Registry, store: Store, tmp_path: Path) -> None:
    """A layer with a file in a directory that only the part below describes: its mode has to survive."""
    layers = [
        layer([Entry("tmp", "dir", mode=0o1777), Entry("lib", "symlink", target="usr/lib"), Entry("usr/lib", "dir")]),
        layer([Entry("big", data=os.urandom(30 << 20))]),
        layer([Entry("tmp/x"), Entry("lib/y")]),
    ]
    write_layout(tmp_path / "layout", layers)
    registry.push(tmp_path / "layout", "needs")
    keys, _ = imported(f"docker://{registry.address}/needs:t", store)
    with mounted([Path(store.part_path(keys[-1]))], tmp_path) as root:
        assert listing(root) == listing(umoci_unpack(tmp_path / "layout", tmp_path / "bundle"))
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777 and (root / "usr/lib/y").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_a_manifest_of_docker(registry: Registry, store: Store, tmp_path: Path, whole: bool) -> None:
    """Schema 2, as docker pushes it; skopeo writes another manifest and configuration for the layout on disk."""
    write_layout(tmp_path / "layout", LAYERS, config={"Env": ["A=1"], "WorkingDir": "/etc", "Cmd": ["sh"]})
    address = f"docker://{registry.address}/schema2:t"
    copy = ["skopeo", "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false", f"oci:{tmp_path}/layout:t", address]
    subprocess.run(copy, check=True, capture_output=True)
    shown = ["skopeo", "inspect", "--raw", "--tls-verify=false", address]
    raw = subprocess.run(shown, check=True, capture_output=True).stdout
    assert json.loads(raw)["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    keys, message = imported(address, store, whole=whole)
    assert json.loads(message["config"][0]) == {"Env": ["A=1"], "WorkingDir": "/etc", "Cmd": ["sh"]}
    assert len(keys) == (1 if whole else 2)
    assert left(store)["work"] == []


def test_a_mirror_of_the_site(registry: Registry, store: Store, tmp_path: Path) -> None:
    """registries.conf says where a registry's images are; the reference stays as its user wrote it."""
    write_layout(tmp_path / "layout", LAYERS[:1])
    registry.push(tmp_path / "layout", "mirrored")
    conf = Path(f"/etc/containers/registries.conf.d/enclos-mirror-{os.getpid()}.conf")
    conf.write_text(
        f'[[registry]]\nlocation = "upstream.invalid"\n'
        f'[[registry.mirror]]\nlocation = "{registry.address}"\ninsecure = true\n'
    )
    try:
        imported("docker://upstream.invalid/mirrored:t", store)
    finally:
        conf.unlink()


SIGNED = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/dev/null"}


@pytest.mark.parametrize("rule", [{"type": "reject"}, SIGNED], ids=["none at all", "unsigned"])
def test_a_policy_that_wants_signatures(registry: Registry, store: Store, tmp_path: Path, rule: dict[str, str]) -> None:
    write_layout(tmp_path / "layout", LAYERS[:1])
    registry.push(tmp_path / "layout", "unsigned")
    (tmp_path / "policy.json").write_text(json.dumps({"default": [rule]}))
    image = f"docker://{registry.address}/unsigned:t"
    words = "image is rejected by the policy of this site (/etc/containers/policy.json)"
    assert Import(image, store, policy=tmp_path / "policy.json").error() == words
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_an_index_gives_the_image_of_this_machine(registry: Registry, store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS[:1])
    registry.push(tmp_path / "layout", "multi")
    for name, platform in (("multi", "amd64"), ("foreign", "sparc")):
        manifest = json.loads((tmp_path / "layout/index.json").read_text())["manifests"][0]
        manifest.pop("annotations")
        entry = manifest | {"platform": {"os": "linux", "architecture": platform}}
        media_type = "application/vnd.oci.image.index.v1+json"
        index = {"schemaVersion": 2, "mediaType": media_type, "manifests": [entry]}
        registry.put_manifest("multi", name, json.dumps(index).encode(), media_type)
    keys, _ = imported(f"docker://{registry.address}/multi:multi", store)
    assert len(keys) == 1
    said = Import(f"docker://{registry.address}/multi:foreign", store).error()
    assert said == "image is not for this kind of node (no image for linux/amd64, only for linux/sparc)"


LOCAL = {
    "oci": "oci:{}/layout:t",
    "oci without a tag": "oci:{}/layout",
    "oci-archive": "oci-archive:{}/oci.tar:t",
    "docker-archive": "docker-archive:{}/docker.tar",
    "dir": "dir:{}/dir",
}


@pytest.mark.parametrize("kind", LOCAL)
def test_an_image_on_disk(store: Store, tmp_path: Path, home: Path, kind: str) -> None:
    """Read as its user, whose home is closed to everybody else; nothing of it is copied."""
    write_layout(home / "layout", LAYERS, config={"Env": ["A=1"]})
    source = f"oci:{home}/layout:t"
    for target in (f"oci-archive:{home}/oci.tar:t", f"docker-archive:{home}/docker.tar:a:t", f"dir:{home}/dir"):
        subprocess.run(["skopeo", "copy", "-q", source, target], check=True, capture_output=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(home)], check=True)
    subprocess.run(["chmod", "-R", "go=", str(home)], check=True)
    image = LOCAL[kind].format(home)
    keys, message = imported(image, store)
    assert message["config"] == ['{"Env": ["A=1"]}'] and left(store)["work"] == []
    paths = sorted((Path(store.part_path(key)) for key in keys), key=lambda path: -path.stat().st_size)
    with mounted(paths, tmp_path) as root:
        assert listing(root) == listing(umoci_unpack(home / "layout", tmp_path / "bundle"))
    said = Import(image, store, uid=USER + 1, gid=USER + 1).error()
    assert said == "image is not readable (permission denied)"


def saved(path: Path, layers: Sequence[tuple[str, bytes]], *, diff_ids: Sequence[str] | None = None) -> str:
    """An archive as `docker save` writes it, of layers with their names in it; its reference."""
    if diff_ids is None:
        diff_ids = [manifest.digest_of(gunzipped(data)) for _, data in layers]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    listed = [{"Config": "config.json", "RepoTags": ["a:t"], "Layers": [name for name, _ in layers]}]
    files = {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(listed).encode(), **dict(layers)}
    path.write_bytes(layer([Entry(name, data=data) for name, data in files.items()]))
    path.chmod(0o644)
    return f"docker-archive:{path}"


def gunzipped(data: bytes) -> bytes:
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


PACKED = [gzip.compress(data, mtime=0) for data in LAYERS]
SAVED = {
    "docker": [(f"{number}/layer.tar", data) for number, data in enumerate(LAYERS)],
    "compressed": [(f"{number}/layer.tar", data) for number, data in enumerate(PACKED)],
    "docker 25": [(f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data) for data in LAYERS],
    "containerd": [(f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data) for data in PACKED],
}


@pytest.mark.parametrize("by", SAVED)
@pytest.mark.parametrize("diff_ids", [None, []], ids=["", "without diff_ids"])
def test_an_archive_that_docker_saved(
    store: Store, tmp_path: Path, home: Path, by: str, diff_ids: list[str] | None
) -> None:
    """However it names and packs the layers, they have the digests that their files have."""
    running = Import(saved(home / "saved.tar", SAVED[by], diff_ids=diff_ids), store)
    told = running.receive()["layer"]
    assert told == [f"{manifest.digest_of(data)} {len(data)}" for _, data in SAVED[by]]
    running.go()
    while (message := running.receive())["state"] != ["done"]:
        assert message["state"] in (["part"], ["whole"]), message
    running.end()


def test_layers_of_an_archive_are_not_read_to_find_out_whether_it_is_there(store: Store, home: Path) -> None:
    """Each step on each node asks that: here of a layer that would take minutes."""
    data = layer([Entry("f")])
    image = saved(home / "saved.tar", [("layer.tar", data)])
    archive = (home / "saved.tar").read_bytes()
    head = archive.index(b"layer.tar\0")
    block = bytearray(archive[head : head + 512])
    block[124:136] = (1 << 95 | 1 << 40).to_bytes(12, "big")  # Of a terabyte.
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    with open(home / "saved.tar", "r+b") as file:
        file.seek(head)
        file.write(block)
        file.truncate(head + 512 + (1 << 40))
    running = Import(image, store, limits=Limits(1000, 1 << 41))
    begin = time.monotonic()
    assert running.receive()["layer"] == [f"{manifest.digest_of(data)} {1 << 40}"]
    assert time.monotonic() - begin < 20
    running.end()


def test_an_archive_whose_layers_are_not_what_it_says(store: Store, home: Path) -> None:
    """Knowing digests gives nothing: what is not there already is compared with them."""
    ours, theirs = layer([Entry("ours")]), layer([Entry("theirs")])
    digest = hashlib.sha256(theirs).hexdigest()
    for name, diff_id in (("layer.tar", f"sha256:{digest}"), (f"blobs/sha256/{digest}", "")):
        image = saved(home / "saved.tar", [(name, ours)], diff_ids=[diff_id])
        said = Import(image, store).error()
        assert said == f"layer {digest[:12]} of the image is not usable (it does not match its digest)"
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_what_is_no_image_on_disk(store: Store, tmp_path: Path, home: Path) -> None:
    write_layout(home / "layout", LAYERS[:1])
    write_layout(home / "layout", LAYERS[1:2], tag="other")
    (home / "text").write_text("hello" * 1000)
    (home / "empty").mkdir()
    (home / "escape").mkdir()
    (home / "escape/index.json").symlink_to("/etc/passwd")
    (home / "out.tar").write_bytes(layer([Entry("manifest.json", "symlink", target="/etc/passwd")]))
    (home / "saved.tar.gz").write_bytes(gzip.compress((home / "out.tar").read_bytes()))
    assert {image: Import(image.format(home), store).error() for image in NO_IMAGES} == NO_IMAGES
    assert left(store) == {"images": [], "parts": [], "work": []}


NO_IMAGES = {
    "oci:{}/nothing": "image not found ()",
    "oci-archive:{}/nothing": "image not found ()",
    "oci:{}/layout:x": "image cannot be used (it has no tag x; its tags: other, t)",
    "oci:{}/layout": "image cannot be used (which of its tags: other, t)",
    "oci:{}/text": "image cannot be used (it is no directory)",
    "oci:{}/empty": "image cannot be used (it has no file index.json)",
    "oci:{}/escape": "image cannot be used (it has no file index.json)",
    "oci-archive:{}/empty": "image cannot be used (it is no regular file)",
    "oci-archive:{}/text": "image cannot be used (no tar archive: no header of a member at byte 0)",
    "docker-archive:{}/saved.tar.gz": "image cannot be used (the archive is compressed as a whole; decompress it)",
    "docker-archive:{}/out.tar": "image cannot be used (the archive has no file manifest.json)",
}


BAD_LAYERS = {
    "dots": (layer([Entry("../etc/passwd")]), "the member ../etc/passwd has '..' in its path"),
    "absolute": (layer([Entry("/etc/passwd")]), "the member /etc/passwd has an absolute path"),
    "escape": (
        layer([Entry("a", "symlink", target="../.."), Entry("a/etc/passwd")]),
        "a member that leads out of the image through a symlink (a/etc)",
    ),
    "text": (b"hello world" * 1000, "no tar archive: no header of a member at byte 0"),
    "cut": (layer([Entry("f", data=b"x" * 5000)])[:2000], "no tar archive: it ends in the middle of a file"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_a_bad_layer(registry: Registry, store: Store, tmp_path: Path, name: str) -> None:
    data, words = BAD_LAYERS[name]
    write_layout(tmp_path / "layout", [data])
    registry.push(tmp_path / "layout", f"bad-{name}")
    said = Import(f"docker://{registry.address}/bad-{name}:t", store).error()
    assert re.match(r"layer [0-9a-f]{12} of the image is not usable \(", said) and words in said
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_limits_of_the_site(registry: Registry, store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "bomb", [layer([Entry("zeros", data=bytes(100 << 20))])])
    write_layout(tmp_path / "files", [layer([Entry(f"f{number}") for number in range(2000)])])
    registry.push(tmp_path / "bomb", "bomb")
    registry.push(tmp_path / "files", "files")
    small = Limits(1000, 10 << 20)
    said = Import(f"docker://{registry.address}/bomb:t", store, limits=small).error()
    assert said == "image is larger than the site allows (more than 10485760 bytes unpacked)"
    said = Import(f"docker://{registry.address}/files:t", store, limits=small).error()
    assert said == "image is larger than the site allows (more than 1000 files)"
    said = Import(f"docker://{registry.address}/bomb:t", store, limits=Limits(1000, 1000)).error()
    assert re.fullmatch(r"image is larger than the site allows \(\d+ bytes to download\)", said)
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_what_registries_answer(
    registry: Registry, private: Registry, store: Store, tmp_path: Path, home: Path
) -> None:
    write_layout(tmp_path / "layout", LAYERS[:1])
    registry.push(tmp_path / "layout", "there")
    private.push(tmp_path / "layout", "secret")
    (home / "wrong.json").write_text(private.auth_json("wrong"))
    address, port = registry.address, free_port()
    no_image = f"image not found (the registry {address} has no such name or tag)"
    refused = f"not allowed to pull the image (the registry {private.address} refuses)"
    answers = {
        f"docker://{address}/nothing:t": no_image,
        f"docker://{address}/there:nothing": no_image,
        f"docker://{address}/there@sha256:{'0' * 64}": no_image,
        f"docker://{private.address}/secret:t": refused,
        f"docker://127.0.0.1:{port}/x:t": f"cannot reach the registry 127.0.0.1:{port} (connection refused)",
    }
    assert {image: Import(image, store).error() for image in answers} == answers
    # A guest has no network at all: one row in there, the header.
    if len(Path("/proc/net/route").read_text().splitlines()) > 1:
        nowhere = "no such registry: nowhere.invalid (its name has no address)"
    else:
        nowhere = "cannot reach the registry nowhere.invalid (network is unreachable)"
    assert Import("docker://nowhere.invalid/x:t", store).error() == nowhere
    wrong = Import(f"docker://{private.address}/secret:t", store, auth_files=(str(home / "wrong.json"),))
    assert wrong.error() == refused
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_a_registry_whose_certificate_nobody_trusts(store: Store, tmp_path: Path) -> None:
    with serve(tmp_path / "untrusted", tls=True) as untrusted:
        said = Import(f"docker://{untrusted.address}/x:t", store).error()
    assert said.startswith(f"no secure connection to the registry {untrusted.address} (x509: ")
    with serve(tmp_path / "plain") as plain:
        said = Import(f"docker://{plain.address}/x:t", store).error()
    assert said.startswith(f"no secure connection to the registry {plain.address} (")


def test_credentials_of_the_user(private: Registry, store: Store, tmp_path: Path, home: Path) -> None:
    """Of his auth.json or enroot's file, opened as him: another's file is none, though root could read it."""
    write_layout(tmp_path / "layout", LAYERS[:1])
    private.push(tmp_path / "layout", "secret")
    image = f"docker://{private.address}/secret:t"
    mine, theirs, netrc = home / "mine.json", home / "theirs.json", home / "netrc"
    login = f"machine 127.0.0.1 login alice password {PASSWORD}\n"
    for path, owner in ((mine, USER), (theirs, USER + 1), (netrc, USER)):
        path.write_text(login if path == netrc else private.auth_json())
        os.chown(path, owner, owner)
        path.chmod(0o600)
    assert "not allowed" in Import(image, store, auth_files=(str(theirs),)).error()
    _, message = imported(image, store, auth_files=(str(theirs), str(mine)))
    assert message["state"] == ["done"]
    imported(image, store, netrc_files=(str(netrc),))


def test_what_a_look_at_the_importer_shows(private: Registry, store: Store, tmp_path: Path, home: Path) -> None:
    """While it waits: no password in any process's arguments or environment; the sandboxes have no rights."""
    write_layout(tmp_path / "layout", LAYERS)
    private.push(tmp_path / "layout", "looked-at")
    auth = home / "auth.json"
    auth.write_text(private.auth_json())
    os.chown(auth, USER, USER)
    auth.chmod(0o600)
    running = Import(f"docker://{private.address}/looked-at:t", store, auth_files=(str(auth),))
    secret = json.loads(private.auth_json())["auths"][private.address]["auth"].encode()
    seen: dict[str, dict[str, str]] = {}
    looked_at = 0
    while message := running.receive_or_look(0.002):
        if message == {"state": ["look"]}:
            for pid, status in below(running.process.pid):
                with contextlib.suppress(OSError):
                    texts = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
                    assert not any(secret in text or PASSWORD.encode() in text for text in texts)
                    looked_at += 1
                if status.get("Uid", "").split()[:1] == [str(SLOT)]:
                    seen[status["Name"]] = status
                    with contextlib.suppress(OSError):
                        limits = Path(f"/proc/{pid}/limits").read_text()
                        assert re.search(r"^Max core file size +1 +1 ", limits, re.MULTILINE), limits
        elif message["state"] == ["resolved"]:
            running.go()
        elif message["state"] == ["error"]:
            pytest.fail(str(message))
    assert looked_at and seen, "nothing was seen of it"
    for status in seen.values():
        assert status["Uid"].split() == [str(SLOT)] * 4 and status["Groups"] == ""
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1" and len(status["NSpid"].split()) == 2


def test_an_import_finds_nothing_of_the_one_before(
    private: Registry, store: Store, tmp_path: Path, home: Path
) -> None:
    """The same slot, two users: no process of the first lives, its layers are out of reach for their owner."""
    write_layout(tmp_path / "layout", [LAYERS[0], layer([Entry("own", data=os.urandom(30 << 20))])])
    private.push(tmp_path / "layout", "before")
    (home / "auth.json").write_text(private.auth_json())
    (home / "auth.json").chmod(0o644)
    first = Import(f"docker://{private.address}/before:t", store, auth_files=(str(home / "auth.json"),))
    first.receive()
    first.go()
    while not list(Path(store.directory).glob("work/*/blobs/sha256/*")):
        time.sleep(0.001)
    first.process.kill()
    first.end()
    deadline = time.monotonic() + 10
    while of_slot() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert of_slot() == []
    (left_there,) = left(store)["work"]
    path = os.path.join(store.directory, "work", left_there)
    assert os.stat(path).st_uid == SLOT

    def look(channel: socket.socket) -> None:
        reached = [name for name in (path, f"{path}/blobs/sha256", "/tmp/auth.json") if os.path.lexists(name)]
        others = [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]
        root = os.listdir("/work")
        ipc = Path("/proc/sysvipc/shm").read_text().count("\n") - 1
        protocol.send(channel, [("found", repr((reached, others, root, ipc)))])

    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, SLOT, SLOT)
    running = sandbox.start("look", look, Rights(SLOT, True, 1 << 30, 1 << 20), str(own))
    message = protocol.receive(running.channel)
    assert message is not None and message.get("found") == repr(([], [], [], 0))
    running.end()


def of_slot() -> list[str]:
    """Processes with the slot's uid, anywhere."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(entry).st_uid == SLOT or f"\nUid:\t{SLOT}\t" in (entry / "status").read_text():
                found.append(entry.name)
    return found


def test_a_work_directory_with_links_in_it(registry: Registry, store: Store, tmp_path: Path) -> None:
    """As a fetcher that was taken over could leave it: the next import of this user follows none."""
    digest = write_layout(tmp_path / "layout", LAYERS)
    registry.push(tmp_path / "layout", "led")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "sha256").mkdir(parents=True)
    work = Path(store.work_path(digest, USER))
    for link, target in ((work / "blobs", elsewhere), (work / "blobs/sha256", elsewhere / "sha256")):
        link.parent.mkdir(parents=True)
        link.symlink_to(target)
        imported(f"docker://{registry.address}/led:t", store)
        assert os.listdir(elsewhere) == ["sha256"] and os.listdir(elsewhere / "sha256") == []
        assert left(store)["work"] == []


def test_a_killed_import_leaves_nothing_but_layers_and_resumes(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    write_layout(tmp_path / "layout", [*LAYERS, layer([Entry("own", data=os.urandom(30 << 20))])])
    registry.push(tmp_path / "layout", "resumes")
    image = f"docker://{registry.address}/resumes:t"
    running = Import(image, store)
    running.receive()
    running.go()
    small = json.loads(blob(tmp_path / "layout", index_of(tmp_path / "layout")))["layers"][2]["digest"][7:]
    deadline = time.monotonic() + 20
    while not list(Path(store.directory).glob(f"work/*/blobs/sha256/{small}")):
        assert time.monotonic() < deadline, "no layer arrived"
    children = [pid for pid, _ in below(running.process.pid)]
    running.process.kill()
    running.process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "a sandbox survived its importer"
        time.sleep(0.01)
    (work,) = left(store)["work"]
    blobs = os.path.join(store.directory, "work", work, "blobs/sha256")
    # Manifest and configuration are written anew each time.
    described = json.loads(blob(tmp_path / "layout", index_of(tmp_path / "layout")))["layers"]
    kept = sorted({row["digest"][7:] for row in described} & set(os.listdir(blobs)))
    assert kept, "no layer was there yet"
    # One was cut by a power cut, and is fetched again. The others are gone from the registry, which is not asked.
    (Path(blobs) / kept[0]).write_bytes(b"cut")
    for name in kept[1:]:
        (path,) = (registry.folder / "data").rglob(f"{name}/data")
        path.unlink()
    imported(image, store)
    assert left(store)["work"] == []


def test_what_one_user_fetched_is_not_given_to_another(
    private: Registry, store: Store, tmp_path: Path, home: Path
) -> None:
    """An import with credentials is interrupted; a registry of somebody else's has all but the layers."""
    write_layout(tmp_path / "layout", [LAYERS[0], layer([Entry("own", data=os.urandom(30 << 20))])])
    private.push(tmp_path / "layout", "secret")
    (home / "auth.json").write_text(private.auth_json())
    (home / "auth.json").chmod(0o644)
    running = Import(f"docker://{private.address}/secret:t", store, auth_files=(str(home / "auth.json"),))
    running.receive()
    running.go()
    digest = index_of(tmp_path / "layout")
    manifest = blob(tmp_path / "layout", digest)
    described = json.loads(manifest)
    blobs = [row["digest"][7:] for row in (*described["layers"], described["config"])]
    fetched: dict[str, bytes] = {}
    while message := running.receive_or_look(0.001):
        for path in Path(store.directory).glob("work/*/blobs/sha256/*"):
            with contextlib.suppress(FileNotFoundError):
                fetched[path.name] = path.read_bytes()
        if message["state"] == ["done"]:
            break
    running.end()
    assert set(blobs) <= set(fetched)
    # As an interrupted import leaves it.
    work = Path(store.work_path(digest, USER), "blobs/sha256")
    work.mkdir(parents=True)
    for name in blobs:
        (work / name).write_bytes(fetched[name])
    with liar(manifest, {blobs[-1]: fetched[blobs[-1]]}) as address:
        image = f"docker://{address}/secret@{digest}"
        said = Import(image, store, uid=USER + 1, gid=USER + 1).error()
        assert said == f"image not found (the registry {address} has no such name or tag)"
        imported(image, store)  # The same registry would do, with what is there.


@contextlib.contextmanager
def liar(manifest: bytes, blobs: dict[str, bytes]) -> Iterator[str]:
    """A registry that has a manifest, and not all that is named in it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = blobs.get(self.path.rpartition(":")[2]) if "/blobs/" in self.path else manifest
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with served(Handler) as address:
        yield address


def test_a_full_disk(registry: Registry, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS)
    registry.push(tmp_path / "layout", "full")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=45m,mode=755", "tmpfs", str(small)], check=True)
    try:
        store = Store(str(small / "store"))
        store.make()
        said = Import(f"docker://{registry.address}/full:t", store).error()
        assert said == "no space left for images (disk or quota is full)"
        assert left(store)["work"] == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        said = Import(f"docker://{registry.address}/full:t", store).error()
        assert said == f"cannot write to the image cache {store.directory} (read-only file system)"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_full_quota(registry: Registry, tmp_path: Path) -> None:
    """Both where a layer is written, and where the file is."""
    write_layout(tmp_path / "layout", LAYERS)
    registry.push(tmp_path / "layout", "quota")
    os.chmod(tmp_path, 0o755)
    with quotas.limited(tmp_path) as (folder, limit):
        store = Store(str(folder / "store"))
        store.make()
        for size in ("10M", "45M"):
            limit(size)
            said = Import(f"docker://{registry.address}/quota:t", store).error()
            assert said == "no space left for images (disk or quota is full)"
            # The small layer's file may have been finished; the agent removes what it did not put on record.
            assert (left(store)["images"], left(store)["work"]) == ([], []) and len(left(store)["parts"]) <= 1
        limit("none")
        imported(f"docker://{registry.address}/quota:t", store)


def test_a_file_that_outgrows_the_cache(registry: Registry, store: Store, tmp_path: Path) -> None:
    """Layers say what they take compressed; what comes of them is bounded as it is written."""
    write_layout(tmp_path / "layout", LAYERS)
    registry.push(tmp_path / "layout", "outgrows")
    for room in (20 << 20, 30 << 20):
        said = Import(f"docker://{registry.address}/outgrows:t", store, room=room).error()
        assert said == f"image is larger than the site allows (more than {room} bytes on disk)"
        assert left(store)["work"] == [] and left(store)["images"] == []
    for name in left(store)["parts"]:
        assert (Path(store.directory) / "parts" / name).stat().st_size < 1 << 20
    imported(f"docker://{registry.address}/outgrows:t", store, room=40 << 20)


def test_a_connection_that_ends_midway(store: Store, tmp_path: Path) -> None:
    """A proxy that stops in the middle of the large layer; the other layer is there and stays."""
    with serve(tmp_path / "behind") as behind:
        write_layout(tmp_path / "layout", LAYERS[:2], compression="")
        behind.push(tmp_path / "layout", "midway")
        with cut_after(behind.address, 5 << 20) as address:
            conf = Path(f"/etc/containers/registries.conf.d/enclos-test-cut-{os.getpid()}.conf")
            conf.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
            try:
                said = Import(f"docker://{address}/midway:t", store).error()
            finally:
                conf.unlink()
    assert said == f"lost the connection to the registry {address} ()"
    assert left(store)["parts"] == [] and left(store)["images"] == []
    for work in left(store)["work"]:
        names = os.listdir(os.path.join(store.directory, "work", work))
        assert not [name for name in names if name.startswith("oci-put-blob")], "half a layer was left"


def test_the_last_layer_is_converted_while_it_arrives(store: Store, tmp_path: Path) -> None:
    """The proxy holds back the last megabytes of the large layer until its converter runs."""
    with serve(tmp_path / "behind") as behind:
        write_layout(tmp_path / "layout", LAYERS[:2], compression="")
        behind.push(tmp_path / "layout", "growing")
        converting = threading.Event()
        with cut_after(behind.address, 28 << 20, converting) as address:
            conf = Path(f"/etc/containers/registries.conf.d/enclos-test-growing-{os.getpid()}.conf")
            conf.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
            try:
                running = Import(f"docker://{address}/growing:t", store)
                assert running.receive()["state"] == ["resolved"]
                running.go()
                deadline = time.monotonic() + 30
                while not any(status["Name"] == "enclos-convert" for _, status in below(running.process.pid)):
                    assert time.monotonic() < deadline, "no converter began before the layer was there"
                    time.sleep(0.01)
                converting.set()
                states = [*iter(lambda: running.receive().get("state", [""])[0], "")]
            finally:
                converting.set()
                conf.unlink()
    assert states == ["part", "done"]
    (part,) = left(store)["parts"]
    with mounted([Path(store.directory, "parts", part)], tmp_path) as root:
        assert listing(root) == listing(umoci_unpack(tmp_path / "layout", tmp_path / "bundle"))


def test_a_blob_that_its_registry_has_damaged(store: Store, tmp_path: Path) -> None:
    with serve(tmp_path / "damaged") as damaged:
        conf = Path(f"/etc/containers/registries.conf.d/enclos-test-damaged-{os.getpid()}.conf")
        make_insecure([damaged], conf)
        try:
            write_layout(tmp_path / "layout", LAYERS[:1])
            damaged.push(tmp_path / "layout", "damaged")
            digest = json.loads((tmp_path / "layout/index.json").read_text())["manifests"][0]["digest"]
            manifest = json.loads((tmp_path / "layout/blobs/sha256" / digest[7:]).read_text())
            blob = manifest["layers"][0]["digest"][7:]
            (path,) = (tmp_path / "damaged/data").rglob(f"{blob}/data")
            data = bytearray(path.read_bytes())
            data[-20] ^= 1
            path.write_bytes(data)
            said = Import(f"docker://{damaged.address}/damaged:t", store).error()
        finally:
            conf.unlink()
    assert said.startswith("image does not match its digest")
    assert left(store) == {"images": [], "parts": [], "work": []}


def test_where_the_file_system_has_no_leases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS: a part is copied, so that whoever may still write to the first one changes nothing."""
    lease = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "Invalid argument")
        return lease(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    fd = store.part_file()
    os.write(fd, b"hsqs")
    writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    assert finish_part(store, fd, "ab" * 32) == (4, hashlib.sha256(b"hsqs").hexdigest())
    os.write(writer, b"evil")
    path = Path(store.part_path("ab" * 32))
    assert path.read_bytes() == b"hsqs" and path.stat().st_mode & 0o7777 == 0o444
    assert left(store)["parts"] == [path.name]
    os.close(writer)
    os.close(fd)


def test_a_part_that_somebody_writes_to_is_not_taken(store: Store) -> None:
    fd = store.part_file()
    os.write(fd, b"hsqs")
    writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    with pytest.raises(BlockingIOError):
        finish_part(store, fd, "ab" * 32)
    assert left(store)["parts"] == []
    os.close(writer)
    os.close(fd)


def index_of(layout: Path) -> str:
    """The digest of a layout's only manifest."""
    return str(json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])


def blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs/sha256" / digest[7:]).read_bytes()


def below(pid: int) -> Iterator[tuple[int, dict[str, str]]]:
    """All processes below one, with what /proc says of each."""
    for child in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{child}/status").read_text()
            status = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
            parent = int(status["PPid"])
            while parent not in (0, 1, pid):
                found = re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{parent}/status").read_text(), re.MULTILINE)
                parent = int(found[1]) if found else 0
            if parent == pid:
                yield child, status


@contextlib.contextmanager
def cut_after(address: str, limit: int, go_on: threading.Event | None = None) -> Iterator[str]:
    """A proxy in front of a registry that ends a connection when so many bytes have come back over it.

    Args:
        go_on: do not end it, but wait for this.
    """
    host, port = address.split(":")
    server = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket, most: int) -> None:
        with contextlib.suppress(OSError):
            while most > 0 and (data := source.recv(min(65536, most))):
                target.sendall(data)
                most -= len(data)
                if most <= 0 and go_on is not None and go_on.wait(60):
                    most = 1 << 40
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                upstream = socket.create_connection((host, int(port)))
                for ends in ((client, upstream, 1 << 40), (upstream, client, limit)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_a_sandbox_that_has_begun_holds_no_file_of_another(store: Store) -> None:
    """Parts are finished while other sandboxes start, and a part that somebody can write to is not taken."""
    rights = Rights(SLOT, False, 1 << 30, 1 << 20)
    for number in range(20):
        fd = store.part_file()
        os.write(fd, b"hsqs")
        running = sandbox.start("test", lambda channel: None, rights)
        finish_part(store, fd, f"{number:064x}")
        os.close(fd)
        running.end()
    assert len(left(store)["parts"]) == 20
