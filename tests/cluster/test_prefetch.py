"""The image of a job is fetched when its prolog runs: Debian's docker-registry on n2, the job on n1."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Result, said
from enclos.runtime.cluster.cluster import Cluster, Running
from enclos.runtime.cluster.nodes import enter_command
from faults import processes

PORT = 5099
ADDRESS = f"n2:{PORT}"
IMAGE = f"docker://{ADDRESS}/tools:1"
SILENT = ("n2:5098", "n2:5097")  # They accept, and say nothing.
STALLS = "n2:5096"


@pytest.fixture(scope="module")
def registry(make_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """A cluster of its own with a registry in it, and an image of 20 MB there."""
    cluster = make_cluster(2)
    shared = cluster.layout.shared
    (shared / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {shared}/registry}}}}\n"
        f"http: {{addr: 0.0.0.0:{PORT}}}\n"
    )
    # The machines' /etc is the cluster's own.
    places = "".join(f'[[registry]]\nlocation = "{place}"\ninsecure = true\n' for place in (ADDRESS, *SILENT, STALLS))
    for node in (None, "n1", "n2"):
        write = "mkdir -p /etc/containers/registries.conf.d; cat > /etc/containers/registries.conf.d/test.conf"
        assert cluster.run(write, node=node, input=places).returncode == 0
    # This machine's program in the node's network: the roots of other releases of Slurm have none.
    serve = [*enter_command(cluster.machine("n2"), ["--net"]), "docker-registry", "serve", str(shared / "registry.yml")]
    server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    make_layout(shared / "layout")
    command = ["skopeo", "copy", "-q", "--dest-tls-verify=false", "oci:/shared/layout:1", IMAGE]
    deadline = time.monotonic() + 20 * PATIENCE
    while (pushed := cluster.run(command, node="n2")).returncode != 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pushed.returncode == 0, pushed.stderr
    yield cluster
    stop(server)


def stop(running: Running | subprocess.Popen[str]) -> None:
    running.terminate()
    running.communicate(timeout=20)


def make_layout(folder: Path) -> None:
    """An OCI layout with one layer: busybox, and something to fetch."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(busybox, "bin/busybox")
        for name in ("cat", "sh", "true"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        random = tarfile.TarInfo("random")
        random.size = 20 << 20
        archive.addfile(random, io.BytesIO(os.urandom(random.size)))
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def store(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    layer = store(buffer.getvalue(), "layer.v1.tar")
    config = {"architecture": "amd64", "os": "linux", "config": {"Env": ["FROM_IMAGE=yes"], "WorkingDir": "/work"}}
    config["rootfs"] = {"type": "layers", "diff_ids": [layer["digest"]]}
    described = store(json.dumps(config).encode(), "config.v1+json")
    text = json.dumps({"schemaVersion": 2, "config": described, "layers": [layer]})
    manifest = store(text.encode(), "manifest.v1+json")
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "1"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def allocate(cluster: Cluster, *options: str, user: str = "usera") -> str:
    done = cluster.run(["salloc", "--no-shell", "-w", "n1", *options], user, timeout=30)
    assert done.returncode == 0, done.stderr
    return next(word for word in done.stderr.split() if word.isdigit())


def cached(cluster: Cluster) -> list[str]:
    """Names of the records in the cache of n1."""
    folder = cluster.path_on("n1", "/var/cache/enclos/images")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def empty(cluster: Cluster) -> None:
    cluster.stop_agent("n1")
    shutil.rmtree(cluster.path_on("n1", "/var/cache/enclos"), ignore_errors=True)
    cluster.path_on("n1", "/var/cache/enclos").mkdir(exist_ok=True)
    cluster.start_agent("n1")


@pytest.fixture
def fresh(registry: Cluster) -> Iterator[Cluster]:
    """n1 has no image."""
    registry.await_idle()
    empty(registry)
    yield registry
    registry.run("scancel --user=usera")
    registry.await_idle()


def await_cached(cluster: Cluster, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not cached(cluster):
        assert time.monotonic() < deadline, cluster.agent_log("n1")
        time.sleep(0.05)


@pytest.mark.releases
def test_the_image_is_there_before_the_first_step(fresh: Cluster) -> None:
    job = allocate(fresh, f"--container-image={IMAGE}")
    await_cached(fresh)
    deadline = time.monotonic() + 10 * PATIENCE
    while f"image={IMAGE} is here" not in fresh.agent_log("n1") and time.monotonic() < deadline:
        time.sleep(0.05)
    script = "echo $FROM_IMAGE; pwd"
    done = fresh.run(["srun", f"--jobid={job}", f"--container-image={IMAGE}", "sh", "-c", script], "usera")
    assert (done.returncode, done.stdout, said(done.stderr)) == (0, "yes\n/work\n", []), done.stderr


def listen(cluster: Cluster, port: int) -> Running:
    """A registry that accepts and says nothing. The kernel does it: nobody has to take the connections."""
    code = f"import socket, time; server = socket.create_server(('', {port})); print(flush=True); time.sleep(300)"
    running = cluster.popen(["python3", "-c", code], node="n2")
    assert running.stdout is not None and running.stdout.readline() == "\n"
    return running


def test_the_prolog_does_not_wait(fresh: Cluster) -> None:
    silent = listen(fresh, 5098)
    begin = time.monotonic()
    allocate(fresh, "--container-image=docker://n2:5098/tools:1")
    done = fresh.run(["srun", "-w", "n1", "--overlap", "true"], "usera")
    assert done.returncode == 0 and time.monotonic() - begin < 10
    stop(silent)


def test_a_name_that_makes_no_sense_hurts_nobody(fresh: Cluster) -> None:
    """It comes from the user's environment, whatever the plugin's options say."""
    for value in ("docker://", "/etc/passwd", "x" * 5000, "docker://n2:1/none:1", "oci:/etc", "a\tb\x1b[2J"):
        done = fresh.run(["salloc", "--no-shell", "-w", "n1"], "usera", env={"SPANK_ENCLOS_IMAGE": value})
        assert done.returncode == 0, done.stderr
        fresh.run("scancel --user=usera")
    fresh.await_idle()
    assert set(fresh.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) == {"idle"}
    assert cached(fresh) == []


def test_a_job_that_ends_stops_it(fresh: Cluster) -> None:
    silent = listen(fresh, 5097)
    job = allocate(fresh, "--container-image=docker://n2:5097/tools:1")
    assert importers(fresh, wanted=True)
    fresh.run(["scancel", job])
    fresh.await_idle()
    assert not importers(fresh, wanted=False)
    stop(silent)


STALLING = """
import http.server, json, sys, time
folder = "/shared/layout/blobs/sha256/"
manifest = json.load(open("/shared/layout/index.json"))["manifests"][0]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        described = json.load(open(folder + manifest["digest"][7:]))
        if "/manifests/" in self.path:
            self.answer(manifest["mediaType"], open(folder + manifest["digest"][7:], "rb").read())
        elif name == described["config"]["digest"]:
            self.answer("application/octet-stream", open(folder + name[7:], "rb").read())
        elif "/blobs/" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(described["layers"][0]["size"]))
            self.end_headers()
            self.wfile.write(open(folder + name[7:], "rb").read(1 << 20))
            self.wfile.flush()
            time.sleep(300)
        else:
            self.answer("application/json", b"{}")
    def answer(self, kind, data):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)
    do_HEAD = do_GET
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler)
print(flush=True)
server.serve_forever()
"""


def test_one_that_is_stopped_leaves_nothing(fresh: Cluster) -> None:
    """Of a layer that has not arrived as a whole there is nothing to go on with."""
    server = fresh.popen(["python3", "-c", STALLING, STALLS.partition(":")[2]], node="n2")
    assert server.stdout is not None and server.stdout.readline() == "\n"
    work = fresh.path_on("n1", "/var/cache/enclos/work")
    job = allocate(fresh, f"--container-image=docker://{STALLS}/tools:1")
    deadline = time.monotonic() + 20 * PATIENCE
    while not any(path.stat().st_size for path in work.rglob("*") if path.is_file()):
        assert time.monotonic() < deadline, (list(work.rglob("*")), fresh.agent_log("n1"))
        time.sleep(0.02)
    fresh.run(["scancel", job])
    fresh.await_idle()
    deadline = time.monotonic() + 5 * PATIENCE
    while (left := list(work.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == [] and not importers(fresh, wanted=False)
    server.kill()
    server.communicate(timeout=20)


# --- before it starts: enclos image pull --job ------------------------------------------------------------------------


def submit(cluster: Cluster, text: str, *options: str) -> str:
    """Hand in a script that has to wait until it is released; the job's id."""
    (cluster.layout.shared / "job.sh").write_text(text)
    words = ["sbatch", "--hold", "--parsable", "-w", "n1", "-o", "/shared/out", *options, "/shared/job.sh"]
    done = cluster.run(words, "usera")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pull(cluster: Cluster, job: str, user: str = "usera", *options: str) -> Result:
    return cluster.run(["enclos", "image", "pull", f"--job={job}", *options], user)


def finish(cluster: Cluster, job: str) -> str:
    """Let the job run; what it printed."""
    (cluster.layout.shared / "out").unlink(missing_ok=True)
    assert cluster.run(["scontrol", "release", job]).returncode == 0
    cluster.await_idle()
    deadline = time.monotonic() + 30 * PATIENCE
    while cluster.run(["squeue", "-h", "-j", job]).stdout and time.monotonic() < deadline:
        time.sleep(0.05)
    return (cluster.layout.shared / "out").read_text()


@pytest.mark.parametrize(("script", "options"), [
    pytest.param(f"#!/bin/sh\n#SBATCH --container-image={IMAGE}\necho $FROM_IMAGE\n", [], marks=pytest.mark.releases),
    (f"#!/bin/sh\nIMAGE={IMAGE}\nsrun --container-image=$IMAGE sh -c 'echo $FROM_IMAGE'\n", []),
    (f"#!/bin/sh\nsrun --container-image={IMAGE} sh -c 'echo $FROM_IMAGE'\n", ["--array=1-2"]),
])  # fmt: skip
def test_a_pending_jobs_images(fresh: Cluster, script: str, options: list[str]) -> None:
    """They are in the user's store before the job starts: no node imports anything."""
    shutil.rmtree(fresh.layout.homes / "usera/.local/share/enclos", ignore_errors=True)
    job = submit(fresh, script, *options)
    done = pull(fresh, job, "usera", "--json")
    assert done.returncode == 0, done.stderr
    assert [image["source"] for image in json.loads(done.stdout)] == [IMAGE]
    assert pull(fresh, job).stderr.count("is here already") == 1
    assert set(finish(fresh, job).splitlines()) == {"yes"}
    assert cached(fresh) == []


@pytest.mark.releases
def test_sbatchs_own_option(fresh: Cluster, release: str) -> None:
    """Slurm shows the command line after 24.11; before, only where it keeps accounts, which these clusters do not."""
    shutil.rmtree(fresh.layout.homes / "usera/.local/share/enclos", ignore_errors=True)
    job = submit(fresh, "#!/bin/sh\necho $FROM_IMAGE\n", f"--container-image={IMAGE}")
    done = pull(fresh, job, "usera", "--json")
    if release in ("22.05", "24.11"):
        assert done.returncode == 1 and "it names no image" in done.stderr, done.stderr
    else:
        assert [image["source"] for image in json.loads(done.stdout)] == [IMAGE], done.stderr
        assert finish(fresh, job) == "yes\n"
        assert cached(fresh) == []


def test_a_profile_names_an_image(fresh: Cluster) -> None:
    """One of the site's path, and a file beside the job's: relative paths are seen from its directory."""
    shutil.rmtree(fresh.layout.homes / "usera/.local/share/enclos", ignore_errors=True)
    profiles = fresh.layout.homes / "usera/.edf"
    profiles.mkdir(exist_ok=True)
    (profiles / "tools.toml").write_text(f'image = "{IMAGE}"\n')
    (fresh.layout.shared / "beside.toml").write_text(f'base = "tools"\nimage = "{IMAGE}"\n')
    for name in ("tools", "./beside.toml"):
        script = f"#!/bin/sh\nsrun --container-profile={name} sh -c 'echo $FROM_IMAGE'\n"
        job = submit(fresh, script, "-D", "/shared")
        done = pull(fresh, job, "usera", "--json")
        assert [image["source"] for image in json.loads(done.stdout)] == [IMAGE], done.stderr
        assert finish(fresh, job) == "yes\n"
    assert cached(fresh) == []


def test_one_that_is_missing_leaves_the_others(fresh: Cluster) -> None:
    """Of a job's images and of those on the command line: the exit status tells."""
    shutil.rmtree(fresh.layout.homes / "usera/.local/share/enclos", ignore_errors=True)
    names = (f"docker://{ADDRESS}/none:1", IMAGE)
    job = submit(fresh, "#!/bin/sh\n" + "".join(f"srun --container-image={name} true\n" for name in names))
    for words in ([f"--job={job}"], names):
        done = fresh.run(["enclos", "image", "pull", "--json", *words], "usera")
        assert done.returncode == 1 and f"enclos: {names[0]}: image not found" in done.stderr, done.stderr
        assert [image["source"] for image in json.loads(done.stdout)] == [IMAGE]


def test_a_job_is_only_its_users(fresh: Cluster) -> None:
    """Nobody fetches for another; root neither, who would do it with root's credentials and for everybody."""
    job = submit(fresh, f"#!/bin/sh\nsrun --container-image={IMAGE} true\n")
    for user in ("userb", "root"):
        done = pull(fresh, job, user)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"enclos: --job={job}: it is another user's" in done.stderr
    program = fresh.run("command -v enclos").stdout.strip()
    done = fresh.run(["runuser", "-l", "usera", "-c", f"{program} image pull --job={job} --json"])
    assert done.returncode == 0, done.stderr
    assert [image["path"].startswith("/home/usera/") for image in json.loads(done.stdout)] == [True]


@pytest.mark.parametrize(("script", "status", "text"), [
    ("#!/bin/sh\nsrun hostname\n", 1, "it names no image"),
    ("#!/bin/sh\nsrun --container-image=$1 hostname\n", 0, "$1: not fetched: what it stands for is known when the job"),
    ("#!/bin/sh\nsrun --container-image=/images/x.sqsh true\n", 0, "/images/x.sqsh: not fetched: it is no image of a"),
    ("#!/bin/sh\nsrun --container-image=docker://n2:5099/UP true\n", 0, "UP: not fetched: 'UP' is no name in a"),
    ("#!/bin/sh\nsrun --container-image=docker://n2:5099/none:1 true\n", 1, "docker://n2:5099/none:1: image not found"),
])  # fmt: skip
def test_a_job_whose_images_cannot_be_fetched(fresh: Cluster, script: str, status: int, text: str) -> None:
    done = pull(fresh, submit(fresh, script))
    assert done.returncode == status and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", ["99999", "x", "1;id", "-1", "1.0"])
def test_a_job_that_is_none(fresh: Cluster, job: str) -> None:
    done = pull(fresh, job)
    assert done.returncode == 1 and f"enclos: --job={job}: no such job" in done.stderr


def importers(cluster: Cluster, *, wanted: bool) -> bool:
    """Whether an importer's sandbox is on n1, after waiting for it to be as wanted."""
    deadline = time.monotonic() + 10 * PATIENCE
    while (found := bool(processes(cluster, "n1", "enclos-holder"))) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
