"""Images by name from the site's store and from a user's; no registry is there to be asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Result, said
from enclos.runtime.cluster.cluster import Cluster
from faults import processes

CONFIG = """\
images: {site_store: /shared/site, idle_seconds: 0}
imports: {default_registry: registry.invalid}
"""
NAME = "registry.invalid/tools"


@pytest.fixture(scope="module")
def stores(make_cluster: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The site has tools:site and tools:both, usera has tools:own and tools:both; /from in each tells whose it is."""
    cluster = make_cluster(2, config=CONFIG)
    folder = tmp_path_factory.mktemp("stores")
    for whose, user, tags in (("site", "root", ("site", "both")), ("usera", "usera", ("own", "both"))):
        made = make_image(folder / whose, whose)
        there = cluster.layout.shared / made.name
        shutil.copy(made, there)
        there.chmod(0o644)
        for tag in tags:
            done = cluster.run(["enclos", "image", "import", f"/shared/{made.name}", f"tools:{tag}"], user)
            assert done.returncode == 0, done.stderr
        there.unlink()
    return cluster


def make_image(tree: Path, whose: str) -> Path:
    (tree / "bin").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "bin/busybox")
    for applet in ("cat", "sh", "sleep"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "from").write_text(f"{whose}\n")
    (tree / "noise").write_bytes(os.urandom(3 << 20))
    path = tree.with_suffix(".sqsh")
    command = ["mksquashfs", str(tree), str(path), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def ask(cluster: Cluster, image: str, user: str = "usera", *options: str) -> Result:
    words = ["srun", "-N2", f"--container-image={image}", *options, "cat", "/from"]
    return cluster.run(words, user, timeout=60)


@pytest.mark.parametrize(("image", "user", "whose"), [
    ("tools:site", "usera", "site"),
    ("tools:site", "userb", "site"),
    ("tools:own", "usera", "usera"),
    ("tools:both", "usera", "site"),
    (f"docker://{NAME}:own", "usera", "usera"),
    ("registry.invalid#tools:own", "usera", "usera"),
])  # fmt: skip
def test_names_are_looked_for_in_the_stores(stores: Cluster, image: str, user: str, whose: str) -> None:
    done = ask(stores, image, user)
    assert (done.returncode, said(done.stderr), done.stdout) == (0, [], f"{whose}\n" * 2), done.stderr


def test_a_digest_names_the_same_image(stores: Cluster) -> None:
    shown = json.loads(stores.run(["enclos", "image", "inspect", "tools:own", "--json"], "usera").stdout)
    done = ask(stores, f"{NAME}@{shown['digest']}")
    assert (done.returncode, done.stdout) == (0, "usera\nusera\n"), done.stderr


def test_a_users_store_is_only_his(stores: Cluster) -> None:
    """Nobody else finds his images, so the registry is asked, which is not there."""
    done = ask(stores, "tools:own", "userb")
    assert done.returncode != 0 and "registry.invalid" in done.stderr and done.stdout == ""


def test_the_kernel_mounts_only_the_sites(stores: Cluster) -> None:
    for image, servers in (("tools:site", 0), ("tools:own", 1)):
        words = ["srun", "-w", "n1", f"--container-image={image}", "sh", "-c", "echo up; sleep 60"]
        running = stores.popen(words, "usera")
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        found = len(processes(stores, "n1", "squashfuse_ll"))
        (step,) = json.loads(stores.run(["enclos", "ps", "--json"], "usera", "n1").stdout)
        stores.run("scancel --user=usera")
        running.communicate(timeout=30)
        stores.await_idle()
        assert found == servers
        assert step["digest"].startswith("sha256:")


def test_a_store_that_another_made_is_passed_over(stores: Cluster) -> None:
    """The site's is root's, a user's is his: otherwise who made the directory first chose what others run."""
    site, own = stores.layout.shared / "site", stores.layout.homes / "usera/.local/share/enclos/images"
    for store, image in ((site, "tools:site"), (own, "tools:own")):
        owner = store.stat()
        os.chown(store, 61002, 61002)
        done = ask(stores, image)
        os.chown(store, owner.st_uid, owner.st_gid)
        assert done.returncode != 0 and "registry.invalid" in done.stderr and done.stdout == ""
        assert ask(stores, image).returncode == 0


def test_a_store_on_a_file_system_of_its_user(stores: Cluster) -> None:
    """FUSE: root's processes are kept out of it, and one that hangs holds up its own user alone."""
    own = stores.layout.homes / "usera/.local/share/enclos/images"
    packed = stores.layout.shared / "store.sqsh"
    command = ["mksquashfs", str(own), str(packed), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    place = stores.layout.homes / "usera/store"
    place.mkdir()
    os.chown(place, 61001, 61001)
    # On some machines /dev/fuse is closed to users; on this node it is not.
    device = "mknod -m 666 /var/tmp/fuse c 10 229 && mount --bind /var/tmp/fuse /dev/fuse"
    assert (done := stores.run(device, node="n1")).returncode == 0, done.stderr
    mounting = "squashfuse /shared/store.sqsh ~/store"
    assert (done := stores.run(mounting, "usera", "n1")).returncode == 0, done.stderr
    own.rename(own.with_name("aside"))
    own.symlink_to("/home/usera/store")
    words = ["srun", "-w", "n1", "--overlap", "--container-image=tools:own", "cat", "/from"]
    try:
        # The kernel lets nobody in but processes that are wholly its user's, which a builder is not yet.
        done = stores.run(words, "usera")
        assert (done.returncode, done.stdout) == (1, "") and "image is not readable (permission denied)" in done.stderr
        (server,) = processes(stores, "n1", "squashfuse")
        os.kill(server, signal.SIGSTOP)
        waiting = stores.popen(words, "usera")
        begin = time.monotonic()
        other = ["srun", "-w", "n1", "--overlap", "--container-image=tools:site", "cat", "/from"]
        assert stores.run(other, "userb").stdout == "site\n"
        assert time.monotonic() - begin < 8
        output, text = waiting.communicate(timeout=60)
        assert waiting.returncode == 1 and output == "" and "registry.invalid" in text, text
        assert "enclos: the stores of images do not answer, asking the registry\n" in text
        os.kill(server, signal.SIGKILL)
        done = stores.run(words, "usera")
        trouble = "/home/usera/.local/share/enclos/images: transport endpoint is not connected"
        assert done.returncode == 1 and f"enclos: a store of images cannot be read ({trouble})" in done.stderr
    finally:
        stores.run("scancel --user=usera")
        stores.await_idle()
        stores.run("fusermount -u ~/store", "usera", "n1")
        stores.run("umount /dev/fuse; rm /var/tmp/fuse", node="n1")
        own.unlink()
        own.with_name("aside").rename(own)
    assert ask(stores, "tools:own").stdout == "usera\nusera\n"


@pytest.mark.parametrize("damage", ["names", "record", "file", "closed"])
def test_a_store_that_makes_no_sense_is_passed_over(stores: Cluster, damage: str) -> None:
    """Nothing of what a user wrote into his store fails anything but his own step, and then the registry is asked."""
    store = stores.layout.homes / "userb/.local/share/enclos/images"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(stores.layout.homes / "usera/.local/share/enclos/images", store)
    for path in (store, *store.rglob("*")):
        os.chown(path, 61002, 61002)
    (record,) = (path for path in (store / "images").glob("*.json"))
    match damage:
        case "names":
            for name in (store / "names").iterdir():
                name.write_text("sha256:../../../etc/passwd\n")
        case "record":
            record.write_text('{"digest": [' * 2000)
        case "file":
            record.with_suffix(".sqsh").unlink()
        case "closed":
            store.chmod(0)
    done = ask(stores, "tools:own", "userb")
    assert done.returncode != 0 and "registry.invalid" in done.stderr and done.stdout == ""
    assert ask(stores, "tools:own").stdout == "usera\nusera\n"


def file_of(stores: Cluster, user: str, name: str) -> Path:
    """The file of a store, as this process sees it."""
    shown = json.loads(stores.run(["enclos", "image", "inspect", name, "--json"], user).stdout)
    return stores.path_on(None, shown["path"])


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """One byte of a file is another one meanwhile, in the middle, where the noise is."""

    def flip() -> None:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    flip()
    try:
        yield
    finally:
        flip()


@pytest.mark.parametrize(("image", "user", "hint"), [
    ("tools:site", "root", "administrator: 'enclos image rm {}', then pull or import it again, as root"),
    ("tools:own", "usera", "'enclos image rm {}', then pull or import it again"),
])  # fmt: skip
def test_a_damaged_file_is_found_before_it_runs(stores: Cluster, image: str, user: str, hint: str) -> None:
    """Also of an image that ran on the node before, and until it is whole again."""
    path = file_of(stores, user, image)
    assert ask(stores, image).returncode == 0
    with damaged(path):
        done = ask(stores, image)
        assert (done.returncode, done.stdout) == (1, "")
        file = rf"\S+/images/{path.name}"
        words = rf"--container-image={image}: image is damaged \({file} is not what its checksum says\) on n[12]$"
        assert re.search(words, done.stderr, re.MULTILINE), done.stderr
        assert f"hint: {hint.format(f'sha256:{path.stem[:12]}')}" in done.stderr
    assert (again := ask(stores, image)).returncode == 0, again.stderr
    stores.await_idle()
    assert set(stores.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) == {"idle"}


def test_what_the_hint_says_mends_it(stores: Cluster) -> None:
    path = file_of(stores, "usera", "tools:own")
    copy = stores.layout.shared / "copy.sqsh"
    shutil.copy(path, copy)
    copy.chmod(0o644)
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"damage")
    done = ask(stores, "tools:own")
    hint = re.search(r"'(enclos image rm \S+)'", done.stderr)
    assert done.returncode == 1 and hint is not None, done.stderr
    assert stores.run(hint[1].split(), "usera").returncode == 0
    for name in ("tools:own", "tools:both"):  # Both names went with it.
        assert stores.run(["enclos", "image", "import", "/shared/copy.sqsh", name], "usera").returncode == 0
    done = ask(stores, "tools:own")
    assert done.stdout == "usera\nusera\n", done.stderr
    copy.unlink()


def test_a_site_may_do_without_the_check(stores: Cluster) -> None:
    """Of either store; and one that is off leaves the other on."""
    conf = stores.layout.node_etc("n1") / "enclos.yaml"
    before = conf.read_text()
    paths = {image: file_of(stores, user, image) for user, image in (("root", "tools:site"), ("usera", "tools:own"))}
    try:
        for off, image in (("site_verify", "tools:site"), ("user_verify", "tools:own")):
            conf.write_text(before.replace("idle_seconds: 0", f"idle_seconds: 0, {off}: never"))
            stores.restart_agent("n1")
            for name, path in paths.items():
                with damaged(path):
                    words = ["srun", "-w", "n1", f"--container-image={name}", "cat", "/from"]
                    assert stores.run(words, "usera").returncode == (0 if name == image else 1), (off, name)
    finally:
        conf.write_text(before)
        stores.restart_agent("n1")


def test_ls_shows_both(stores: Cluster) -> None:
    shown = stores.run(["enclos", "image", "ls"], "usera").stdout.splitlines()
    rows = sorted((row.split()[0].rpartition(":")[2], row.split()[-1]) for row in shown[1:])
    assert rows == [("both", "site"), ("both", "user"), ("own", "user"), ("site", "site")]
    done = stores.run(["enclos", "image", "rm", "tools:site"], "usera")
    assert done.returncode == 1 and "no such image" in done.stderr
