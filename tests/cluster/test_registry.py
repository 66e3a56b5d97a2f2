"""Images of registries on a real cluster: imported once, shared with whoever may have them, and never half there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from conftest import PATIENCE, said
from enclos.runtime.cluster import daemons, image, registry
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.layout import SUBMIT
from enclos.runtime.cluster.slurm import address4

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
from layers import Entry, layer, write_layout

PRIVATE_PORT, LIAR_PORT, SILENT_PORT = INSECURE = 5001, 5002, 5003
# Of images with 8 MB of noise in them, three fit.
CONFIG = "images:\n  idle_seconds: 0\nimports:\n  cache_size: 40M\n  default_registry: submit:5000\n"
LIAR = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = open(sys.argv[2], "rb").read() if "/manifests/" in self.path else b""
        self.send_response(404 if "/blobs/" in self.path else 200)
        self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)
    do_HEAD = do_GET
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def site(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster with two registries on its submit host: one for everybody, one with a password."""
    made = make_cluster(2, config=CONFIG)
    registry.start(made)
    folder = made.layout.state / "private"
    folder.mkdir()
    hashed = subprocess.run(["htpasswd", "-nbB", "alice", "secret-word"], capture_output=True, text=True, check=True)
    (folder / "htpasswd").write_text(hashed.stdout)
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: {address4(0)}:{PRIVATE_PORT}}}\nauth: {{htpasswd: {{realm: x, path: {folder}/htpasswd}}}}\n"
    )
    log = made.layout.log(SUBMIT, "private")
    daemons.start(made.record.machines[SUBMIT], ["docker-registry", "serve", str(folder / "config.yml")], log)
    rows = [f'[[registry]]\nlocation = "submit:{port}"\ninsecure = true\n' for port in INSECURE]
    made.path_on(SUBMIT, "/etc/containers/registries.conf.d/test.conf").write_text("\n".join(rows))
    return made


def push(
    site: Cluster,
    name: str,
    *,
    port: int = registry.PORT,
    noise: int = 8 << 20,
    more: Sequence[Entry] = (),
    config: Mapping[str, object] | None = None,
    layers: Sequence[bytes] = (),
) -> tuple[str, Path]:
    """An image of one layer with busybox in it, and `more`, or of `layers`; its reference, and its layout."""
    layout = site.layout.state / f"layout-{name}"
    shutil.rmtree(layout, ignore_errors=True)
    environment = {"Env": ["PATH=/bin", f"IMAGE_NAME={name}"]}
    write_layout(layout, layers or [bottom(name, noise, more)], config={**environment, **(config or {})})
    login = ["--dest-creds", "alice:secret-word"] if port == PRIVATE_PORT else []
    command = ["nsenter", f"--net=/proc/{site.record.machines[SUBMIT].pid}/ns/net", "skopeo", "copy", "-q"]
    target = f"docker://{address4(0)}:{port}/{name}:t"
    deadline = time.monotonic() + 20 * PATIENCE
    while True:  # The registry has just been started.
        options = ["--preserve-digests", "--dest-tls-verify=false", *login]
        done = subprocess.run([*command, *options, f"oci:{layout}:t", target], capture_output=True, text=True)
        if done.returncode == 0:
            return f"docker://submit:{port}/{name}:t", layout
        assert "refused" in done.stderr and time.monotonic() < deadline, done.stderr


def bottom(name: str, noise: int, more: Sequence[Entry] = ()) -> bytes:
    """A layer with busybox in it."""
    busybox = Path("/bin/busybox").read_bytes()
    applets = ("sh", "cat", "true", "sleep", "id", "md5sum")
    return layer([
        Entry("bin", "dir", mode=0o755), Entry("bin/busybox", data=busybox, mode=0o755),
        *(Entry(f"bin/{applet}", "link", target="bin/busybox") for applet in applets),
        Entry("name", data=name.encode()), Entry("noise", data=os.urandom(noise)), *more,
    ])  # fmt: skip


def lines(site: Cluster, pattern: str, node: str = "n1") -> list[str]:
    """Lines of a node's agent's log."""
    return [line for line in site.layout.log(node, "enclosd").read_text().splitlines() if re.search(pattern, line)]


def cached(site: Cluster, node: str = "n1") -> dict[str, list[str]]:
    return {name: sorted(os.listdir(site.layout.node_cache(node) / name)) for name in ("images", "parts", "work")}


def importers(site: Cluster) -> list[int]:
    """Pids of the importers of all nodes, as this process sees them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"images.importer" in (entry / "cmdline").read_bytes() and site.layout.name.encode() in (
                entry / "mountinfo"
            ).read_bytes():
                found.append(int(entry.name))
    return found


def run(
    site: Cluster, reference: str, command: str, user: str = "usera", *options: str
) -> subprocess.CompletedProcess[str]:
    words = ["srun", "-w", "n1", *options, f"--container-image={reference}", "sh", "-c", command]
    return site.run(words, user=user, timeout=120)


def test_an_image_comes_and_srun_tells(site: Cluster) -> None:
    reference, layout = push(site, "first")
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    words = ["srun", "-N2", f"--container-image={reference}", "sh", "-c", "cat /name; echo $IMAGE_NAME"]
    done = site.run(words, user="usera")
    assert done.stdout.split() == ["firstfirst", "firstfirst"], done.stderr
    told = said(done.stderr)
    # A node that was done before its task asked has nothing to tell any more.
    assert any(line.startswith(f"enclos: imported {reference} in ") for line in told)
    assert lines(site, rf"image={re.escape(reference)}@{digest} ", "n1") and lines(site, digest, "n2")
    again = site.run(["srun", "-N2", f"--container-image={reference}", "true"], user="userb")
    assert (again.returncode, said(again.stderr)) == (0, [])
    short = run(site, "first:t", "cat /name")
    assert short.stdout == "first", short.stderr


def test_a_container_beside_a_running_one_has_the_images_settings(site: Cluster) -> None:
    """NAME:no_exec: entrypoint, variables and directory are in the configuration, not in files; its fstab is none."""
    entry = b"#!/bin/sh\nexport FROM_ENTRYPOINT=yes\nexec \"$@\"\n"
    more = [Entry("entry", data=entry, mode=0o755), Entry("etc", "dir", mode=0o755), Entry("opt", "dir", mode=0o1777),
            Entry("etc/fstab", data=b"/home /in none bind\n")]  # fmt: skip
    reference, _ = push(site, "beside", more=more, noise=1, config={"Entrypoint": ["/entry"], "WorkingDir": "/opt"})
    script = f"""
        w="srun --overlap -n1 --container-name=w"
        $w --container-image={reference} sh -c 'echo > /opt/on; until [ -e /opt/end ]; do sleep 0.1; done' &
        until $w:exec true 2>/dev/null; do sleep 0.05; done
        $w:no_exec --container-entrypoint sh -c 'echo "$IMAGE_NAME $FROM_ENTRYPOINT $PWD"; test -e /in || >/opt/end'
        wait"""
    done = site.run(["salloc", "-Q", "-w", "n1", "bash", "-c", script], "usera", timeout=60)
    assert (done.returncode, done.stdout) == (0, "beside yes /opt\n"), done.stderr


def test_a_task_that_waits_for_an_import_is_told(site: Cluster) -> None:
    """The registry is held up until the task waits, so that there is something to tell, however fast the machine is."""
    reference, layout = push(site, "awaited")
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    # With its digest, so that srun has nothing to ask the registry.
    pinned = f"{reference.removesuffix(':t')}@{digest}"
    server = site.record.daemons["registry"].pid
    os.kill(server, signal.SIGSTOP)
    try:
        running = site.popen(["srun", "-w", "n1", f"--container-image={pinned}", "cat", "/name"], user="usera")
        deadline = time.monotonic() + 30 * PATIENCE
        while not any(name_of(pid) == "enclos-task" for pid in site.processes("n1")):
            assert time.monotonic() < deadline, "no task waits"
            time.sleep(0.02)
    finally:
        os.kill(server, signal.SIGCONT)
    out, err = running.communicate(timeout=60)
    assert out == "awaited", err
    # On a slow machine the registry was held up for long enough to be told of that, too.
    told = [line for line in said(err) if not line.startswith("enclos: waiting for what the registry says")]
    assert told[0].startswith(f"enclos: importing {pinned}"), told
    assert told[-1].startswith(f"enclos: imported {pinned} in "), told


def name_of(pid: int) -> str:
    """"" for a process that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def test_a_registry_that_says_nothing(site: Cluster) -> None:
    """It takes connections and does not answer: who waits is told what for, and can give up."""
    listen = f"import socket, time; s = socket.create_server(('', {SILENT_PORT})); time.sleep(600)"
    silent = site.popen([sys.executable, "-c", listen])
    image = f"--container-image=docker://submit:{SILENT_PORT}/x@{'sha256:' + '0' * 64}"
    running = site.popen(["srun", "-w", "n1", "--overlap", image, "true"], user="usera")
    assert running.stderr is not None
    while "waiting for what the registry says of" not in (line := running.stderr.readline()):
        assert line, "nothing was said"
    assert f"docker://submit:{SILENT_PORT}/x@sha256:000" in line
    site.run("scancel --user=usera")
    running.communicate(timeout=60)
    deadline = time.monotonic() + 20 * PATIENCE
    while importers(site) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert importers(site) == []
    silent.terminate()
    silent.communicate(timeout=20)


def test_a_tag_that_moves_is_one_image_for_a_step(site: Cluster) -> None:
    """One node has the old image of the tag: it still runs the one that srun found."""
    reference, _ = push(site, "moves")
    assert run(site, reference, "true").returncode == 0
    push(site, "moves", noise=1 << 20)
    words = ["srun", "-N2", f"--container-image={reference}", "busybox", "stat", "-c", "%s", "/noise"]
    done = site.run(words, user="usera")
    assert done.stdout.split() == [str(1 << 20)] * 2, done.stderr


def test_what_a_registry_does_not_have_is_said_at_once(site: Cluster) -> None:
    before = site.run(["sacct", "-n"], user="root").stdout
    done = run(site, "docker://submit:5000/nothing:t", "true")
    assert done.returncode == 1
    assert said(done.stderr)[0] == (
        "srun: error: enclos: --container-image=docker://submit:5000/nothing:t: image not found "
        "(the registry submit:5000 has no such name or tag)"
    )
    assert site.run(["sacct", "-n"], user="root").stdout == before


def test_the_user_of_an_image_is_not_taken(site: Cluster) -> None:
    """Who types srun is who runs, and what the image made for its user alone is his. `inspect` shows the name."""
    home = [
        Entry("home/jovyan", "dir", mode=0o700, uid=1000),
        Entry("home/jovyan/notebook", data=b"notes\n", mode=0o600, uid=1000),
    ]
    config = {"User": "jovyan:users", "WorkingDir": "/home/jovyan"}
    reference, _ = push(site, "user", more=home, config=config)
    done = run(site, reference, "id -u; pwd; cat notebook; echo more >> notebook && echo $HOME")
    assert (done.returncode, done.stdout) == (0, "61001\n/home/jovyan\nnotes\n/home/usera\n"), done.stderr
    done = run(site, reference, "id -u; cat notebook", "usera", "--container-remap-root")
    assert (done.stdout, said(done.stderr)) == ("0\nnotes\n", []), done.stderr
    assert site.run(["enclos", "image", "pull", reference], user="usera").returncode == 0
    shown = json.loads(site.run(["enclos", "image", "inspect", "--json", reference], user="usera").stdout)
    assert (shown["config"]["User"], shown["config"]["WorkingDir"]) == ("jovyan:users", "/home/jovyan")
    site.run(["enclos", "image", "rm", reference], user="usera")


def test_many_ask_and_one_imports(site: Cluster) -> None:
    reference, _ = push(site, "many")
    words = ["srun", "-w", "n1", "--overlap", "-n1", f"--container-image={reference}", "cat", "/name"]
    running = [site.popen(words, user=user) for user in ("usera", "userb") * 3]
    assert [process.communicate(timeout=120)[0] for process in running] == ["many"] * 6
    assert len(lines(site, rf"image={re.escape(reference)} digest=.* imported in")) == 1


def test_an_importer_that_is_killed_is_replaced(site: Cluster) -> None:
    reference, _ = push(site, "killed")
    running = site.popen(["srun", "-w", "n1", f"--container-image={reference}", "cat", "/name"], user="usera")
    killed: set[int] = set()
    deadline = time.monotonic() + 60 * PATIENCE
    while not killed and time.monotonic() < deadline:
        for pid in importers(site):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    output, _ = running.communicate(timeout=120)
    assert killed and output == "killed"
    assert cached(site)["work"] == []


def test_an_agent_that_dies_leaves_nothing_half_made(site: Cluster) -> None:
    reference, _ = push(site, "agent")
    running = site.popen(["srun", "-w", "n1", f"--container-image={reference}", "cat", "/name"], user="usera")
    deadline = time.monotonic() + 60 * PATIENCE
    while not importers(site):
        assert time.monotonic() < deadline, "no import began"
    site.stop_agent("n1", signal.SIGKILL)
    running.communicate(timeout=120)
    assert running.returncode == 1
    while importers(site):
        assert time.monotonic() < deadline, "an importer outlived its agent"
        time.sleep(0.01)
    site.start_agent("n1")
    named = {f"{part['key']}.sqsh" for path in site.layout.node_cache("n1").glob("images/*.json")
             for part in json.loads(path.read_text())["parts"]}  # fmt: skip
    assert set(cached(site)["parts"]) == named
    done = run(site, reference, "cat /name")
    assert done.stdout == "agent", done.stderr


@pytest.fixture
def login(site: Cluster) -> Iterator[Callable[[str], None]]:
    """Write a user's auth.json, as skopeo login does."""
    written = []

    def write(user: str) -> None:
        home = site.path_on(SUBMIT, f"/home/{user}")
        folder = home / ".config/containers"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "auth.json"
        token = "YWxpY2U6c2VjcmV0LXdvcmQ="
        path.write_text(json.dumps({"auths": {f"submit:{PRIVATE_PORT}": {"auth": token}}}))
        for each in (home / ".config", folder, path):
            os.chown(each, home.stat().st_uid, home.stat().st_gid)
        path.chmod(0o600)
        written.append(path)

    yield write
    for path in written:
        path.unlink()


def test_a_private_image_is_given_to_nobody_else(site: Cluster, login: Callable[[str], None]) -> None:
    """By its tag, by its digest, or by a registry of the thief's own that claims to have it."""
    reference, layout = push(site, "private", port=PRIVATE_PORT)
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    by_digest = reference.removesuffix(":t") + f"@{digest}"
    login("usera")
    mine = run(site, reference, "cat /name")
    assert mine.stdout == "private", mine.stderr
    assert run(site, by_digest, "cat /name").stdout == "private"
    for text in (reference, by_digest):
        theirs = run(site, text, "cat /name", "userb")
        assert theirs.returncode == 1 and theirs.stdout == ""
        assert f"not allowed to pull the image (the registry submit:{PRIVATE_PORT} refuses)" in theirs.stderr
    stolen = site.layout.shared / "manifest.json"
    stolen.write_bytes((layout / "blobs/sha256" / digest[7:]).read_bytes())
    script = site.layout.shared / "liar.py"
    script.write_text(LIAR)
    liar = site.popen(["python3", "/shared/liar.py", str(LIAR_PORT), "/shared/manifest.json"], user="userb")
    try:
        claimed = run(site, f"docker://submit:{LIAR_PORT}/private@{digest}", "cat /name", "userb")
        assert claimed.returncode == 1 and claimed.stdout == "", claimed.stderr
    finally:
        liar.send_signal(signal.SIGKILL)
        liar.communicate(timeout=20)
    # Who may have it gets what is there.
    login("userb")
    before = len(lines(site, "imported in"))
    assert run(site, reference, "cat /name", "userb").stdout == "private"
    assert len(lines(site, "imported in")) == before
    assert not lines(site, "secret-word|YWxpY2U6c2VjcmV0LXdvcmQ=")


def test_a_damaged_image_is_found_before_it_runs(site: Cluster) -> None:
    reference, _ = push(site, "damaged")
    assert run(site, reference, "true").returncode == 0
    damage(max(site.layout.node_cache("n1").glob("parts/*"), key=lambda path: path.stat().st_ctime))
    done = run(site, reference, "cat /name")
    assert done.stdout == "damaged", done.stderr
    assert "enclos: the cached image is damaged, importing it again" in said(done.stderr)


def test_a_damaged_part_is_found_where_another_image_takes_it(site: Cluster) -> None:
    """Two images share their lower part, and it is damaged when one of them is there: neither runs with it."""
    lower = bottom("shared", 25 << 20)
    images = [push(site, f"shares{number}", layers=[lower, layer([Entry(f"top{number}")])])[0] for number in (1, 2)]
    whole = run(site, images[0], "md5sum < /noise").stdout
    damage(max(site.layout.node_cache("n1").glob("parts/*"), key=lambda path: path.stat().st_size))
    for reference in reversed(images):
        done = run(site, reference, "md5sum < /noise")
        assert done.stdout == whole, done.stderr
    assert len([part for part in site.layout.node_cache("n1").glob("parts/*") if part.stat().st_size > 24 << 20]) == 1


def test_what_layers_bring_and_delete_above_a_part_is_not_seen(site: Cluster) -> None:
    """Not in listings either, and what a container changes there is as on any disk."""
    new = Entry("new", "dir", mode=0o755)
    above = [[new, Entry("new/brought"), Entry("new/kept")], [new, Entry("new/.wh.brought"), Entry("new/.wh.never")]]
    reference, _ = push(site, "deletes", layers=[bottom("deletes", 25 << 20), *(layer(made) for made in above)])
    words = ["ls /new", "touch /new/brought", "ls /new", "rm -r /new", "mkdir /new", "ls -A /new"]
    done = run(site, reference, "; ".join(f"/bin/busybox {each}" for each in words))
    assert (done.returncode, done.stdout.split()) == (0, ["kept", "brought", "kept"]), done.stderr


def damage(part: Path) -> None:
    part.chmod(0o600)
    with open(part, "r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(b"damage")


def test_the_least_used_goes_and_what_is_in_use_stays(site: Cluster) -> None:
    used, _ = push(site, "used")
    running = site.popen(["srun", "-w", "n1", "--overlap", f"--container-image={used}", "sleep", "100"], user="usera")
    deadline = time.monotonic() + 60 * PATIENCE
    while not lines(site, rf"step=\S+ uid=\d+ image={re.escape(used)}@"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shown = site.run(["enclos", "ps"], user="usera", node="n1").stdout
    assert re.search(rf"{re.escape(used)}@sha256:[0-9a-f]{{12}}\n", shown), shown
    for number in range(5):
        reference, _ = push(site, f"filler{number}")
        assert run(site, reference, "true", "usera", "--overlap").returncode == 0
    size = sum(path.stat().st_blocks * 512 for path in site.layout.node_cache("n1").rglob("*") if path.is_file())
    assert size <= 40 << 20
    assert lines(site, "removed from the cache, to make room")
    before = len(lines(site, "imported in"))
    assert run(site, used, "cat /name", "usera", "--overlap").stdout == "used"
    assert len(lines(site, "imported in")) == before, "an image in use was evicted"
    site.run("scancel --user=usera")
    running.communicate(timeout=60)


def test_an_image_that_is_larger_than_the_cache(site: Cluster) -> None:
    """It is refused before a layer is fetched: nothing else goes for it, and nothing of it is left."""
    small, _ = push(site, "fits")
    assert run(site, small, "true").returncode == 0
    before = cached(site)
    large, _ = push(site, "large", noise=44 << 20)
    done = run(site, large, "true")
    text = r"image is larger than the site allows \(\d+ bytes in its layers, 41943040 in the node's cache\) on n1"
    assert done.returncode == 1 and re.search(text, done.stderr), done.stderr
    assert "imports.cache_size" in done.stderr
    assert cached(site) == before


@pytest.mark.parametrize(("name", "days"), [("old", 2), ("fresh", 0)])
def test_layers_of_a_dead_import_are_kept_for_a_day(site: Cluster, name: str, days: int) -> None:
    """An agent that starts removes older ones."""
    work = site.layout.node_cache("n1") / "work" / (hashlib.sha256(name.encode()).hexdigest() + ".61001")
    (work / "blobs/sha256").mkdir(parents=True)
    (work / "blobs/sha256/layer").write_bytes(b"x")
    for path in (work, work / "blobs/sha256"):
        os.utime(path, (time.time() - days * 86400,) * 2)
    site.restart_agent("n1")
    assert work.exists() == (days == 0)
    shutil.rmtree(work, ignore_errors=True)


def test_a_cache_that_a_user_made_first(site: Cluster) -> None:
    """Nothing is put there, and nothing taken from it; steps with other images run."""
    reference, _ = push(site, "planted")
    assert run(site, reference, "true").returncode == 0
    cache = site.layout.node_cache("n1")
    os.chown(cache, 61002, 61002)
    site.restart_agent("n1")
    done = run(site, reference, "true")
    os.chown(cache, 0, 0)
    site.restart_agent("n1")
    assert done.returncode == 1 and re.search(r"is not root's alone \(\S+ belongs to uid 61002\) on n1", done.stderr)
    assert run(site, reference, "true").returncode == 0


def test_an_mpi_job_from_a_registry(site: Cluster) -> None:
    image.make()
    reference = registry.push_demo_image(site)
    words = ["srun", "-N2", "-n4", "--mpi=pmix", "--container-network=job", f"--container-image={reference}", "ring"]
    done = site.run([*words, "--rounds", "2"], user="usera", timeout=120)
    assert done.returncode == 0 and "all data right" in done.stdout, done.stderr
