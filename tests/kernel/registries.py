"""Real registries for the tests: Debian's docker-registry on loopback, with and without TLS and a password."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "alice", "correct-horse"
START_SECONDS = 10


@dataclass(frozen=True)
class Registry:
    """One that runs. `address` is what stands in a reference; `folder` holds its data and its certificate."""

    address: str
    folder: Path
    password: bool
    tls: bool

    def push(self, layout: Path, name: str, tag: str = "t", layout_tag: str = "t") -> None:
        """Copy an image of an OCI layout into it, its digests unchanged."""
        login = ["--dest-creds", f"{USER}:{PASSWORD}"] if self.password else []
        command = ["skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false", *login]
        target = f"docker://{self.address}/{name}:{tag}"
        subprocess.run([*command, f"oci:{layout}:{layout_tag}", target], check=True, capture_output=True, timeout=60)

    def put_manifest(self, name: str, tag: str, data: bytes, media_type: str) -> None:
        """Store a manifest as it is; plain HTTP only."""
        url = f"http://{self.address}/v2/{name}/manifests/{tag}"
        request = urllib.request.Request(url, data, {"Content-Type": media_type}, method="PUT")
        with urllib.request.urlopen(request, timeout=START_SECONDS):
            pass

    def auth_json(self, password: str = PASSWORD) -> str:
        """What `skopeo login` writes."""
        text = base64.b64encode(f"{USER}:{password}".encode()).decode()
        return json.dumps({"auths": {self.address: {"auth": text}}})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def serve(folder: Path, *, password: bool = False, tls: bool = False, host: str = "127.0.0.1") -> Iterator[Registry]:
    """Run a registry until the end of the `with`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "config.yml"
    config.write_text(_config(folder, f"{host}:{port}", password, tls))
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        _await(host, port, process, folder / "log")
        yield Registry(f"{host}:{port}", folder, password, tls)
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def _config(folder: Path, address: str, password: bool, tls: bool) -> str:
    text = f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
    text += f"http:\n  addr: {address}\n"
    if tls:
        _certificate(folder)
        text += f"  tls: {{certificate: {folder}/cert.pem, key: {folder}/key.pem}}\n"
    if password:
        made = subprocess.run(["htpasswd", "-nbB", USER, PASSWORD], check=True, capture_output=True, text=True)
        (folder / "htpasswd").write_text(made.stdout)
        text += f"auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}\n"
    return text


def _certificate(folder: Path) -> None:
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    outputs = ["-addext", names, "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *outputs], check=True, capture_output=True)


def _await(host: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"docker-registry did not start: {log.read_text()}")
        time.sleep(0.02)


def make_insecure(registries: list[Registry], path: Path) -> None:
    """A registries.conf drop-in by which this machine speaks plain HTTP with them, as a site would write it."""
    rows = [f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n' for registry in registries]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    os.chmod(path, 0o644)


@contextlib.contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler], name: str = "") -> Iterator[str]:
    """A server of a test's own answers, for skopeo a registry without TLS, also by another name; its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"127.0.0.1:{server.server_port}"
    conf = Path(f"/etc/containers/registries.conf.d/enclos-test-{server.server_port}-{os.getpid()}.conf")
    conf.write_text(f'[[registry]]\nlocation = "{name or address}"\ninsecure = true\n')
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address
    finally:
        conf.unlink()
        server.shutdown()
        thread.join()
        server.server_close()
