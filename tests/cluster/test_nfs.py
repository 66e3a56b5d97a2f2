"""Stores of images on NFS that takes root for nobody: both nodes use them, one at a time fills them, and it may go."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nfs
import pytest
from conftest import PATIENCE, said
from enclos.runtime.cluster.cluster import Cluster, Running
from test_image_stores import make_image

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
from layers import Entry, layer, write_layout

pytestmark = pytest.mark.vm_new

CONFIG = f"""\
images: {{site_store: {nfs.PLACE}/site, user_store: "{nfs.PLACE}/users/{{user}}", idle_seconds: 0}}
imports: {{default_registry: registry.invalid}}
"""


@pytest.fixture(scope="module")
def server(make_cluster: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory) -> Iterator[nfs.Server]:
    """The site's store is filled where root is root: on the server. usera's is empty."""
    if reason := nfs.missing():
        if "nfs" in os.environ.get("ENCLOS_REQUIRE", ""):
            pytest.fail(f"no NFS in this kernel: {reason}")
        pytest.skip(f"no NFS in this kernel: {reason}")
    cluster = make_cluster(2, config=CONFIG)
    started = nfs.Server(cluster)
    started.start()
    made = make_image(tmp_path_factory.mktemp("images") / "site", "site")
    shutil.copy(made, cluster.layout.shared / "image.sqsh")
    (cluster.layout.shared / "image.sqsh").chmod(0o644)
    fill = f"mkdir -m 1777 {nfs.PLACE}/users; enclos image import /shared/image.sqsh tools:site"
    done = cluster.run(fill)
    assert done.returncode == 0, done.stderr
    yield started
    cluster.await_idle()
    started.stop()


@pytest.fixture
def cluster(server: nfs.Server) -> Cluster:
    return server.cluster


def step(cluster: Cluster, image: str, *options: str) -> list[str]:
    return ["srun", *options, f"--container-image={image}", "cat", "/from"]


def test_root_is_nobody_there(cluster: Cluster) -> None:
    """Or the others would show nothing."""
    for node in cluster.nodes:
        done = cluster.run(f"echo > {nfs.PLACE}/site/root", node=node)
        assert done.returncode != 0 and "Permission denied" in done.stderr
        fstype = cluster.run(f"stat -f -c %T {nfs.PLACE}", node=node).stdout
        assert fstype == "nfs\n"


def test_the_sites_store(cluster: Cluster) -> None:
    done = cluster.run(step(cluster, "tools:site", "-N2"), "usera")
    assert (done.returncode, said(done.stderr), done.stdout) == (0, [], "site\nsite\n"), done.stderr


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def read_line(running: Running, part: str) -> None:
    """Wait until a command says something on standard error."""
    assert running.stderr is not None
    line = " "
    while line and part not in line:
        line = running.stderr.readline()
    assert line, f"it never said {part}"


def test_a_users_store(cluster: Cluster) -> None:
    """One node works on an image, the other waits for its lock and takes over when it dies; both run it then."""
    busybox = Path("/bin/busybox").read_bytes()
    entries = [Entry("bin", "dir", mode=0o755), Entry("bin/busybox", data=busybox, mode=0o755),
               Entry("bin/cat", "link", target="bin/busybox"), Entry("from", data=b"usera\n")]  # fmt: skip
    write_layout(cluster.layout.shared / "layout", [layer(entries)], config={})
    words = ["enclos", "image", "import", "oci:/shared/layout:t", "tools:own"]
    store = cluster.path_on(None, f"{nfs.PLACE}/users/usera")  # On the server.
    first = cluster.popen(words, "usera", "n1")
    until(lambda: any(store.glob("work/*.lock")), "no lock of the first import")
    first.send_signal(signal.SIGSTOP)
    assert not list(store.glob("images/*.json")), "it was done before it could be stopped"
    second = cluster.popen(words, "usera", "n2")
    read_line(second, "waiting for another pull of the same image")
    first.kill()
    os.kill(first.pid, signal.SIGCONT)  # nsenter stops with what it has started.
    first.communicate(timeout=60)
    _, text = second.communicate(timeout=60)
    assert second.returncode == 0, text
    images = list(store.glob("images/*"))
    assert sorted(path.suffix for path in images) == [".json", ".sqsh"]
    assert {path.stat().st_uid for path in images} == {61001}
    # Closed to all others, and so to root, whom the server takes for somebody else.
    store.chmod(0o700)
    listed = cluster.run(["ls", f"{nfs.PLACE}/users/usera"], node="n1")
    assert listed.returncode != 0 and stat.S_IMODE(store.stat().st_mode) == 0o700
    done = cluster.run(step(cluster, "tools:own", "-N2"), "usera")
    assert (done.returncode, said(done.stderr), done.stdout) == (0, [], "usera\nusera\n"), done.stderr


def test_a_server_that_goes_and_comes_back(cluster: Cluster, server: nfs.Server) -> None:
    """Steps with its images fail in words, or go on when it is back; the agent serves the others meanwhile."""
    local = cluster.layout.images / "local.sqsh"
    shutil.copy(cluster.layout.shared / "image.sqsh", local)
    local.chmod(0o644)
    words = ["srun", "-w", "n1", "--container-image=tools:site", "sh", "-c", "echo up; sleep 600"]
    running = cluster.popen(words, "usera")
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    server.fall_silent()
    try:
        waiting = cluster.popen(step(cluster, "tools:site", "-w", "n1", "--overlap"), "usera")
        other = cluster.run(step(cluster, "/images/local.sqsh", "-w", "n1", "--overlap"), "userb", timeout=60)
        assert (other.returncode, other.stdout) == (0, "site\n"), other.stderr
        output, text = waiting.communicate(timeout=120)
        assert (waiting.returncode, output) == (1, "") and "registry.invalid" in text, text
        assert "enclos: the stores of images do not answer, asking the registry" in text
        # Its image is unmounted now: that may not hold up the agent either.
        cluster.run(["scancel", "--user=usera"])
        running.communicate(timeout=60)
        other = cluster.run(step(cluster, "/images/local.sqsh", "-w", "n1", "--overlap"), "userb", timeout=60)
        assert (other.returncode, other.stdout) == (0, "site\n"), other.stderr
        assert cluster.run(["enclos", "ps"], "usera", "n1", timeout=30).returncode == 0
    finally:
        server.serve()
    server.await_clients()
    cluster.await_idle(60)
    done = cluster.run(step(cluster, "tools:site", "-N2"), "usera", timeout=120)
    assert (done.returncode, done.stdout) == (0, "site\nsite\n"), done.stderr
