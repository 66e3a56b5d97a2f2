"""Transport: skopeo asks the registry what a reference is, and brings the blobs.

Credentials, TLS, mirrors, signatures and the site's policy are skopeo's (containers-registries.conf(5),
containers-policy.json(5)). Runs in a sandbox with the node's network. Both jobs send packets to the importer:

    resolve    `resolved`: digest, layer=DIGEST SIZE (several), config=DIGEST SIZE
    download   `blob` for each one that has arrived, `growing` for the last one when it has begun to arrive, then
               `config` with the image's configuration
    either     `error` with the parts of an EnclosError
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import select
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from enclos.runtime import errors, linux
from enclos.runtime.images import manifest
from enclos.runtime.images.manifest import BadManifest, LayerInfo, Manifest, NoSuchPlatform
from enclos.runtime.images.reference import Reference
from enclos.runtime.protocol import send

AUTH_FILE = "/tmp/auth.json"
WORK = "/work"
BLOBS = f"{WORK}/blobs/sha256"
UNFINISHED = "oci-put-blob"  # How skopeo's names of blobs begin that it has not finished.
AUTH_LIMIT_BYTES = 1 << 20
OUTPUT_LIMIT = 1 << 16
# Go takes a thread and more for each processor, also on a node that has hundreds: beyond a sandbox's processes.
PROCESSORS = 8
# skopeo's copy to an OCI layout keeps blobs as they are, and takes those that are there already for fetched.
COPY = ("copy", "--quiet", "--dest-oci-accept-uncompressed-layers")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Open files with the user's words to his registries: auth.json files, the first one foremost, and enroot's netrc.

    Only descriptors: the importer, whose memory its other children inherit, never reads them.
    """

    auth_fds: tuple[int, ...] = ()
    netrc_fds: tuple[int, ...] = ()

    @property
    def fds(self) -> tuple[int, ...]:
        return self.auth_fds + self.netrc_fds

    def write(self, reference: Reference, path: str) -> bool:
        """Write an auth.json with what there is for this registry alone; whether there is anything.

        Without credential helpers: those are programs of the user's own, on a machine of his.
        """
        found = (_auths(os.pread(fd, AUTH_LIMIT_BYTES, 0), reference) for fd in self.auth_fds)
        auths: dict[str, object] = next((each for each in found if each), {})
        logins = (_login(os.pread(fd, AUTH_LIMIT_BYTES, 0), reference) for fd in self.netrc_fds)
        if not auths and (login := next((each for each in logins if each), "")):
            auths = {reference.registry: {"auth": base64.b64encode(login.encode()).decode()}}
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            json.dump({"auths": auths}, file)
        return bool(auths)


def _auths(text: bytes, reference: Reference) -> dict[str, object]:
    try:
        found = json.loads(text or b"{}").get("auths", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _is_for(key, reference)}


def _is_for(key: str, reference: Reference) -> bool:
    """auth.json names registries, also with a path or as the URL of Docker's hub (containers-auth.json(5))."""
    key = key.partition("://")[2] or key
    host, _, path = key.strip("/").partition("/")
    if reference.registry == "docker.io" and host in ("index.docker.io", "docker.io"):
        return True
    same = host in (reference.registry, reference.registry.removesuffix(":443"))
    return same and (path in ("", "v1", "v2") or f"{reference.name}/".startswith(f"{path}/"))


def _login(text: bytes, reference: Reference) -> str:
    """USER:PASSWORD of a netrc (enroot's .credentials): `machine HOST login USER password PASSWORD`."""
    words = text.decode("utf-8", "surrogateescape").split()
    entries: list[dict[str, str]] = []
    for word, value in itertools.pairwise(words):
        if word == "machine":
            entries.append({"machine": value})
        elif word in ("login", "password") and entries:
            entries[-1].setdefault(word, value)
    hosts = [reference.registry, reference.registry.partition(":")[0]]
    hosts += ["auth.docker.io"] if reference.registry == "docker.io" else []
    for entry in entries:
        if entry["machine"] in hosts and {"login", "password"} <= entry.keys():
            if reference.user and entry["login"] != reference.user:
                continue
            return f"{entry['login']}:{entry['password']}"
    return ""


def job_resolve(reference: Reference, credentials: Credentials, limit_bytes: int) -> Callable[[socket.socket], None]:
    """The sandbox's job: find out the digest and the layers."""

    def run(channel: socket.socket) -> None:
        with _told(channel):
            private = credentials.write(reference, AUTH_FILE)
            digest, found = resolve(reference)
            _check_size(reference, found, limit_bytes)
            layers = [("layer", f"{layer.digest} {layer.bytes}") for layer in found.layers]
            config = ("config", f"{found.config.digest} {found.config.bytes}")
            send(channel, [("state", "resolved"), ("digest", digest), ("private", str(int(private))), config, *layers])

    return run


def job_download(
    reference: Reference, credentials: Credentials, digest: str, layers: Sequence[LayerInfo], config: LayerInfo
) -> Callable[[socket.socket], None]:
    """The sandbox's job: bring the blobs that are not in the work directory, and say of each when it is there."""

    def run(channel: socket.socket) -> None:
        with _told(channel):
            credentials.write(reference, AUTH_FILE)
            _download(channel, reference.pinned(digest), layers, config)

    return run


def resolve(reference: Reference) -> tuple[str, Manifest]:
    """The digest that names the image (an index's, where the tag is one), and the manifest for this node.

    Raises:
        EnclosError.
    """
    data = _inspect(reference)
    digest = manifest.digest_of(data)
    if reference.digest and digest != reference.digest:
        raise errors.image_digest_mismatch(reference.text, reference.digest, digest)
    try:
        found = manifest.parse(data)
        if isinstance(found, list):
            chosen = manifest.choose(found, os.uname().machine)
            data = _inspect(reference.pinned(chosen))
            if manifest.digest_of(data) != chosen:
                raise errors.image_digest_mismatch(reference.text, chosen, manifest.digest_of(data))
            found = manifest.parse(data)
        if isinstance(found, list):
            raise BadManifest("its index names another index")
    except NoSuchPlatform as error:
        raise errors.image_no_platform(reference.text, str(error)) from error
    except BadManifest as error:
        raise errors.image_bad_manifest(reference.text, str(error)) from error
    return digest, found


def _inspect(reference: Reference) -> bytes:
    data = _skopeo(reference, ["inspect", "--raw", "--authfile", AUTH_FILE, reference.canonical()])
    if len(data) > manifest.MANIFEST_LIMIT_BYTES:
        raise errors.image_bad_manifest(reference.text, "its manifest is too large")
    return data


def _check_size(reference: Reference, found: Manifest, limit_bytes: int) -> None:
    total = sum(layer.bytes for layer in found.layers)
    if total > limit_bytes:
        raise errors.image_too_large(reference.text, f"{total} bytes to download", "imports.limit_bytes")


def _download(channel: socket.socket, reference: Reference, layers: Sequence[LayerInfo], config: LayerInfo) -> None:
    os.makedirs(BLOBS, 0o700, exist_ok=True)
    arrivals = _Arrivals(channel, layers, config)
    _clear(arrivals.wanted)
    watches = [linux.watch_directory(directory) for directory in (WORK, BLOBS)]
    command = ["skopeo", *COPY, "--src-authfile", AUTH_FILE, reference.canonical(), f"oci:{WORK}:image"]
    process = _start(command)
    assert process.stderr is not None
    messages = b""
    with process, contextlib.ExitStack() as stack:
        poller = select.poll()
        poller.register(process.stderr, select.POLLIN)
        for fd in watches:
            stack.callback(os.close, fd)
            poller.register(fd, select.POLLIN)
        arrivals.tell()
        while True:
            ready = [fd for fd, _ in poller.poll()]
            for fd in watches:
                if fd in ready:
                    os.read(fd, 65536)
            arrivals.tell()
            if process.stderr.fileno() in ready:
                text = os.read(process.stderr.fileno(), 4096)
                messages = (messages + text)[-OUTPUT_LIMIT:]
                if not text:
                    break
    if process.returncode != 0:
        raise _worded(reference, messages.decode("utf-8", "replace"))
    arrivals.tell()
    if arrivals.is_short():
        raise errors.image_bad_manifest(reference.text, "a layer has another size than its manifest says")
    send(channel, [("state", "config"), ("text", _read_config(reference, config))])


def _clear(wanted: dict[str, int]) -> None:
    """What an interrupted download left: halves of blobs, and blobs whose rest a power cut took.

    An empty file stands for a layer that is not needed: skopeo takes it for fetched.
    """
    for name in os.listdir(WORK):
        if name.startswith(UNFINISHED):
            os.unlink(f"{WORK}/{name}")
    for name in os.listdir(BLOBS):
        if os.stat(f"{BLOBS}/{name}").st_size not in (0, wanted.get(name, -1)):
            os.unlink(f"{BLOBS}/{name}")


class _Arrivals:
    """What the importer has been told of the blobs in the work directory."""

    def __init__(self, channel: socket.socket, layers: Sequence[LayerInfo], config: LayerInfo) -> None:
        self._channel = channel
        self._layers = {_name(layer) for layer in layers}
        self.wanted = {_name(blob): blob.bytes for blob in (*layers, config)}
        self._told: set[str] = set()
        self._told_growing = False

    def tell(self) -> None:
        """Send what is new."""
        there = set(os.listdir(BLOBS))
        for name in (there & self.wanted.keys()) - self._told:
            if os.stat(f"{BLOBS}/{name}").st_size == self.wanted[name]:
                self._told.add(name)
                send(self._channel, [("state", "blob"), ("digest", f"sha256:{name}")])
        missing = self._layers - there
        if len(missing) == 1 and not self._told_growing:
            self._tell_growing(missing.pop())

    def is_short(self) -> bool:
        """Whether a blob is finished that is not of the size that it should have; skopeo compares digests alone."""
        # An empty file stands for a layer that is not needed, and its size may be anything.
        sizes = {name: os.stat(f"{BLOBS}/{name}").st_size for name in os.listdir(BLOBS)}
        return any(sizes.get(name, 0) not in (0, size) for name, size in self.wanted.items())

    def _tell_growing(self, name: str) -> None:
        """The names of unfinished blobs do not say whose they are: only the last one's is known."""
        unfinished = [file for file in os.listdir(WORK) if file.startswith(UNFINISHED)]
        if len(unfinished) == 1:
            self._told_growing = True
            fields = [("state", "growing"), ("digest", f"sha256:{name}"), ("file", unfinished[0])]
            send(self._channel, fields)


def _read_config(reference: Reference, config: LayerInfo) -> str:
    try:
        digest = config.digest
        if not os.path.exists(_blob_path(digest)):
            digest = _converted_config()
        data = _read_blob(digest)
        if manifest.digest_of(data) != digest:
            raise errors.image_digest_mismatch(reference.text, digest, manifest.digest_of(data))
        return manifest.configuration(data)
    except BadManifest as error:
        raise errors.image_bad_manifest(reference.text, str(error)) from error


def _converted_config() -> str:
    """The digest of the configuration in the layout, where Docker's schema 2 gave skopeo reason to write a new one.

    It has compared the one that it made it of with the digest in the image's manifest.
    """
    with open(f"{WORK}/index.json", "rb") as file:
        entry = json.load(file)["manifests"][-1]  # One: skopeo replaces that of its name.
    found = manifest.parse(_read_blob(entry["digest"]))
    if isinstance(found, list):
        raise BadManifest("its index names another index")
    return found.config.digest


def _read_blob(digest: str) -> bytes:
    with open(_blob_path(digest), "rb") as file:
        return file.read(manifest.MANIFEST_LIMIT_BYTES)


def _name(blob: LayerInfo) -> str:
    return blob.digest.partition(":")[2]


def _blob_path(digest: str) -> str:
    return f"{BLOBS}/{digest.partition(':')[2]}"


# --- skopeo ----------------------------------------------------------------------------------------------------------


def _start(command: Sequence[str], output: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    environment = os.environ | {"GOMAXPROCS": str(min(len(os.sched_getaffinity(0)), PROCESSORS))}
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, env=environment
        )
    except FileNotFoundError as error:
        raise errors.program_missing("skopeo") from error


def _skopeo(reference: Reference, arguments: Sequence[str]) -> bytes:
    process = _start(["skopeo", *arguments], subprocess.PIPE)
    output, messages = process.communicate()
    if process.returncode != 0:
        raise _worded(reference, messages.decode("utf-8", "replace"))
    return output


# What skopeo's last line says, in its order of precedence; its words differ between registries.
_CAUSES: tuple[tuple[str, Callable[[Reference, str], errors.EnclosError]], ...] = (
    (r"no space left on device|disk quota exceeded|file too large", lambda r, t: errors.store_full(r.text)),
    (r"unauthorized|authentication required|access to the resource is denied|denied:|403 \(Forbidden\)|401 ",
     lambda r, t: errors.image_unauthorized(r.text, r.registry)),
    (r"manifest unknown|name unknown|repository name not known|404 \(Not Found\)|not found$",
     lambda r, t: errors.image_unknown(r.text, r.registry)),
    (r"no such host|server misbehaving|Temporary failure in name resolution",
     lambda r, t: errors.registry_unknown(r.text, r.registry)),
    (r"TLS handshake timeout|context deadline exceeded|Client.Timeout exceeded.*|timeout awaiting response headers",
     lambda r, t: errors.registry_unreachable(r.text, r.registry, t)),
    (r"toomanyrequests.*|429 .*|HTTP status: 5\d\d .*",
     lambda r, t: errors.registry_busy(r.text, r.registry, t.removeprefix("HTTP status: "))),
    (r"x509: .*|tls: .*|server gave HTTP response to HTTPS client|certificate .*|malformed HTTP response",
     lambda r, t: errors.registry_tls(r.text, r.registry, t)),
    (r"connection refused|no route to host|network is unreachable|i/o timeout|connection timed out",
     lambda r, t: errors.registry_unreachable(r.text, r.registry, t)),
    (r"dial tcp.*", lambda r, t: errors.registry_unreachable(r.text, r.registry, t)),
    (r"unexpected EOF|connection reset by peer|EOF$|broken pipe|http2: .*closed|use of closed network connection",
     lambda r, t: errors.registry_lost(r.text, r.registry)),
    (r"[Dd]igest did not match|digest mismatch|[Mm]anifest does not match|does not match (?:the )?(?:expected )?digest",
     lambda r, t: errors.image_digest_mismatch(r.text, "", "")),
    (r"rejected by policy|Source image rejected: .*", lambda r, t: errors.image_policy(r.text)),
)  # fmt: skip


def _worded(reference: Reference, messages: str) -> errors.EnclosError:
    """skopeo's message as an error of ours."""
    lines = [line for line in messages.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    quoted = re.search(r'msg="(.*)"$', last)
    # What is behind a `?` may be the right to a blob, as of S3; what is before an `@`, a password.
    text = re.sub(r"(https?://)[^/\s\"]*@", r"\1", quoted[1].replace('\\"', '"') if quoted else last)
    text = re.sub(r"(https?://[^\s\"?]*\?)[^\s\"]*", r"\1…", text)
    for pattern, make in _CAUSES:
        if found := re.search(pattern, text):
            return make(reference, found[0][:200])
    return errors.import_failed(reference.text, text[-300:] or "skopeo gave no reason")


@contextlib.contextmanager
def _told(channel: socket.socket) -> Iterator[None]:
    """Send an EnclosError to the importer instead of raising it."""
    try:
        yield
    except errors.EnclosError as error:
        send(channel, error.fields())
