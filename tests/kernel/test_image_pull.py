"""`enclos image`: stores filled from a real registry, by a user in a namespace of his own and by root."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quotas
from enclos.runtime.cluster.nodes import closed_folder
from enclos.runtime.images.filestore import FileStore
from layers import Entry, layer, listing, umoci_unpack, write_layout
from registries import Registry, make_insecure, serve

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

DAEMON = 1  # A user who has a name and owns nothing.
ENCLOS = [sys.executable, "-c", "import sys; from enclos.runtime.cli.main import main; sys.exit(main())"]
CONFIG = {"Env": ["FROM_IMAGE=yes"], "WorkingDir": "/work"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    with serve(folder) as running:
        conf = Path(f"/etc/containers/registries.conf.d/enclos-test-pull-{os.getpid()}.conf")
        make_insecure([running], conf)
        below = layer([Entry("etc", "dir", mode=0o755), Entry("etc/below"), Entry("etc/gone")])
        above = layer([Entry("etc/.wh.gone"), Entry("etc/above"), Entry("setuid", mode=0o4755)])
        big = layer([Entry("random", data=os.urandom(24 << 20))])
        new = Entry("new", "dir", mode=0o755)
        deletes = [layer([new, Entry("new/brought"), Entry("new/kept")])]
        deletes += [layer([new, Entry("new/.wh.brought"), Entry("new/.wh.never")])]
        images = {"small": [below, above], "big": [below, big], "deletes": [below, big, *deletes]}
        for name, layers in images.items():
            write_layout(folder / name, layers, config=CONFIG)
            running.push(folder / name, name)
        yield running
        conf.unlink()


def uncovered() -> list[str]:
    """Before a command: a mount namespace in which others reach a checkout below a folder that is closed to them."""
    checkout = Path(__file__).resolve().parents[2]
    closed = closed_folder(checkout)
    if closed is None:
        return []
    script = """
        mount --rbind "$2" /mnt
        mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$1"
        mkdir -p "$2"
        mount --move /mnt "$2"
        shift 2
        exec "$@"
    """
    return ["unshare", "--mount", "sh", "-euc", script, "sh", str(closed), str(checkout)]


class Caller:
    """Somebody with a store, and the command."""

    def __init__(self, uid: int, store: Path, registry: Registry) -> None:
        self.uid, self.store = uid, FileStore(str(store))
        setting = "ENCLOS_IMAGES_USER_STORE" if uid else "ENCLOS_IMAGES_SITE_STORE"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(store.parent),
            "ENCLOS_IMPORTS_DEFAULT_REGISTRY": registry.address,
            setting: str(store),
        }
        ids = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        self.command = [*(uncovered() if uid else []), *ids, *ENCLOS, "image"]

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, cwd="/")

    def json(self, *words: str) -> Any:  # noqa: ANN401  # What --json says.
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [*self.command, *words]
        return subprocess.Popen(
            command, env=self.env, text=True, stdout=pipe, stderr=pipe, cwd="/", start_new_session=True
        )


@pytest.fixture(params=[DAEMON, 0], ids=["user", "root"])
def caller(request: pytest.FixtureRequest, registry: Registry) -> Iterator[Caller]:
    """In a folder of its own: those of pytest are closed to others."""
    with tempfile.TemporaryDirectory(prefix="enclos-pull-") as home:
        os.chown(home, request.param, request.param)
        yield Caller(request.param, Path(home, "store"), registry)


def files(store: FileStore) -> list[str]:
    """All files below the store but its locks."""
    root = Path(store.directory)
    found = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


def test_pull_and_what_is_there_then(caller: Caller, registry: Registry) -> None:
    done = caller.run("pull", "small:t")
    assert done.returncode == 0, done.stderr
    name = f"docker://{registry.address}/small:t"
    (shown,) = caller.json("ls")
    path = Path(shown["path"])
    assert (shown["names"], shown["store"]) == ([name], "user" if caller.uid else "site")
    assert shown["config"]["WorkingDir"] == "/work"
    assert [name for name in files(caller.store) if not name.startswith("names/")] == [
        f"images/{path.stem}.json", f"images/{path.name}",
    ]  # fmt: skip
    # One whole squashfs: nothing of layers is left in it, and nothing of setuid.
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (caller.uid, 0o444)
    listed = subprocess.run(["unsquashfs", "-lls", str(path)], capture_output=True, text=True, check=True).stdout
    assert {row.split()[-1] for row in listed.splitlines() if "squashfs-root/etc/" in row} == {
        "squashfs-root/etc/above", "squashfs-root/etc/below",
    }  # fmt: skip
    assert [row.split()[0] for row in listed.splitlines() if row.endswith("/setuid")] == ["-rwxr-xr-x"]
    # Again: nothing is fetched.
    again = caller.run("pull", "small:t")
    assert again.returncode == 0 and "is here already" in again.stderr
    # By what it is called, its digest, and the beginning of that.
    for text in ("small:t", name, shown["digest"], shown["digest"][7:17]):
        assert caller.json("inspect", text)["path"] == str(path)
        assert caller.json("inspect", text)["names"] == [name]
    copy = Path(caller.store.directory).with_name("copy.sqsh")
    assert caller.run("export", "small:t", str(copy)).returncode == 0
    assert copy.read_bytes() == path.read_bytes()
    copy.write_text("mine")
    again = caller.run("export", "small:t", str(copy))
    assert (again.returncode, copy.read_text()) == (1, "mine")
    assert f"enclos: {copy}: the file cannot be used (file exists)" in again.stderr
    assert caller.run("rm", "small:t").returncode == 0
    assert files(caller.store) == []


def test_what_layers_bring_and_delete_is_in_no_store(caller: Caller, registry: Registry, tmp_path: Path) -> None:
    """Nor in a file that is exported, as squashfuse shows it."""
    copy, root = Path(caller.store.directory).with_name("copy.sqsh"), tmp_path / "root"
    assert caller.run("pull", "deletes:t").returncode == 0
    assert caller.run("export", "deletes:t", str(copy)).returncode == 0
    root.mkdir()
    subprocess.run(["squashfuse", str(copy), str(root)], check=True)
    try:
        assert listing(root) == listing(umoci_unpack(registry.folder / "deletes", tmp_path / "bundle"))
        assert os.listdir(root / "new") == ["kept"]
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("import", "none.sqsh", "small:t"), "none.sqsh: the file cannot be used (no such file"),
        (("import", "/etc/hostname", "/small"), "/small: no such kind of image (it must be a name, as docker://"),
        (("pull", "./small"), "./small: no such kind of image (only images of registries can be pulled)"),
        # This one srun asks for its user, who typed the option.
        (("resolve", "./small"), "--container-image=./small: no such kind of image (only images of registries have"),
    ],
)
def test_an_argument_is_named_as_it_was_typed(caller: Caller, words: tuple[str, ...], line: str) -> None:
    done = caller.run(*words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"enclos: {line}"), done.stderr


def test_a_name_that_is_too_long_for_a_file(caller: Caller, registry: Registry) -> None:
    """As of registries with groups in groups, and tags that are a branch's name."""
    long = "/".join(["a-group-of-many-words"] * 9)
    registry.push(registry.folder / "small", long)
    name = f"docker://{registry.address}/{long}:t"
    done = caller.run("pull", f"{long}:t")
    assert done.returncode == 0, done.stderr
    assert [image["names"] for image in caller.json("ls")] == [[name]]
    assert caller.json("inspect", name)["names"] == [name]
    assert caller.run("gc").stdout == ""
    assert caller.run("pull", f"{long}:t").stderr.count("is here already") == 1
    assert caller.run("rm", name).returncode == 0
    assert files(caller.store) == []


def test_resolve(caller: Caller, registry: Registry) -> None:
    shown = caller.json("resolve", "small:t")
    assert shown["digest"].startswith("sha256:")
    done = caller.run("resolve", "small:t")
    assert done.stdout == f"docker://{registry.address}/small@{shown['digest']}\n"
    assert not Path(caller.store.directory).exists()


def test_resolve_says_what_a_step_would_run(caller: Caller, registry: Registry) -> None:
    """A tag that was moved in the registry after the pull means what it meant, until the next pull."""
    tag = f"moving{caller.uid}"
    image = f"small:{tag}"
    assert caller.run("pull", image).returncode == 1
    registry.push(registry.folder / "small", "small", tag)
    assert caller.run("pull", image).returncode == 0
    before = caller.json("resolve", image)["digest"]
    registry.push(registry.folder / "big", "small", tag)
    assert caller.json("resolve", image)["digest"] == before
    after = caller.json("resolve", "--registry", image)["digest"]
    assert after != before
    assert caller.run("pull", image).returncode == 0
    assert caller.json("resolve", image)["digest"] == after


@pytest.mark.parametrize(("words", "text"), [
    (["pull", "missing:t"], "image not found"),
    (["pull", "/etc/passwd"], "only images of registries can be pulled"),
    (["pull", "--authfile", "/nope", "small:t"], "/nope: the file cannot be used (no such file"),
    (["pull", "--authfile", "/etc/hosts", "small:t"], "/etc/hosts: the file cannot be used (it is no auth"),
    (["resolve", "--authfile", "/nope", "small:t"], "/nope: the file cannot be used"),
    (["inspect", "small:t"], "no such image"),
    (["rm", "small:t"], "no such image"),
])  # fmt: skip
def test_errors_leave_nothing(caller: Caller, words: list[str], text: str) -> None:
    done = caller.run(*words)
    assert done.returncode == 1 and text in done.stderr, done.stderr
    assert done.stderr.startswith("enclos: ") and "Traceback" not in done.stderr
    assert files(caller.store) == []


def test_digits_that_several_digests_begin_with(caller: Caller) -> None:
    """Nothing is done with either of them; more digits, or a name, tell them apart."""
    digests = [f"sha256:{'ab' * 6}{number * 52}" for number in "01"]
    home = Path(caller.store.directory).parent
    os.chown(home, 0, 0)
    caller.store.make()
    for digest in digests:
        file = Path(caller.store.work.directory, "file")
        file.write_bytes(b"hsqs")
        caller.store.add(digest, "docker://registry/tools:1", str(file), "{}")
    caller.store.name("docker://registry/tools:1", digests[1])
    for path in [home, *home.rglob("*")]:
        os.chown(path, caller.uid, caller.uid)
    for words in (["inspect", "ab" * 4], ["rm", f"sha256:{'ab' * 6}"], ["export", "ab" * 6, "out.sqsh"]):
        done = caller.run(*words)
        shown = f"{digests[0]}, {digests[1]} docker://registry/tools:1"
        line = f"enclos: {words[1]}: several images have such a digest ({shown})\n"
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(line), done.stderr
    assert len(caller.store.images()) == 2
    assert caller.json("inspect", "ab" * 6 + "1")["digest"] == digests[1]
    assert caller.run("rm", "ab" * 6 + "0").returncode == 0
    assert [image.digest for image in caller.store.images()] == [digests[1]]
    assert caller.run("rm", "ab" * 4).returncode == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may write to; those of pytest are closed to others."""
    with tempfile.TemporaryDirectory(prefix="enclos-pull-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_a_full_quota(registry: Registry, folder: Path) -> None:
    """A home with a quota: a line that says it, and nothing that fills it further. Room again, and it works."""
    with quotas.limited(folder) as (home, limit):
        os.chown(home, DAEMON, DAEMON)
        caller = Caller(DAEMON, home / "store", registry)
        file = folder / "big.sqsh"
        for size in ("10M", "40M"):
            limit(size)
            done = caller.run("pull", "big:t")
            assert done.returncode == 1, done.stderr
            assert "enclos: big:t: no space left for images (disk or quota is full)\n" in done.stderr
            assert "Traceback" not in done.stderr and files(caller.store) == []
        limit("60M")
        assert caller.run("pull", "big:t").returncode == 0
        assert caller.run("export", "big:t", str(file)).returncode == 0
        with open(file, "r+b") as changed:  # Another image, as to its digest.
            changed.seek(0, os.SEEK_END)
            changed.write(bytes(4096))
        limit("30M")
        before = files(caller.store)
        done = caller.run("import", str(file), "other:t")
        assert done.returncode == 1 and "cannot be used as a store of images (disk quota exceeded)" in done.stderr
        assert files(caller.store) == before


def test_several_at_once_fetch_it_once(caller: Caller) -> None:
    """One works, the others wait for its result."""
    running = [caller.start("pull", "big:t") for _ in range(4)]
    texts = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, texts
    assert sum("pulled in" in text for text in texts) == 1
    assert sum("is here already" in text for text in texts) == 3


def test_who_waits_takes_over_when_the_other_dies(caller: Caller) -> None:
    assert caller.run("pull", "small:t").returncode == 0
    lock = caller.store.lock_path(caller.json("resolve", "big:t")["digest"])
    ids = caller.command[: -len(ENCLOS) - 1]
    holder = subprocess.Popen([*ids, "flock", lock, "sh", "-c", "echo held; exec sleep 60"], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    waiting = caller.start("pull", "big:t")
    assert waiting.stderr is not None
    while "waiting for another pull" not in (line := waiting.stderr.readline()):
        assert line
    assert [name for name in files(caller.store) if name.startswith("work/")] == []
    # flock waits for its command, which has the lock's descriptor, too.
    for child in Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    holder.communicate(timeout=20)
    _, text = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "pulled in" in text
    assert len(caller.json("ls")) == 2


def test_an_interrupted_pull_leaves_no_image_and_is_made_up_for(caller: Caller) -> None:
    first = caller.start("pull", "big:t")
    work = Path(caller.store.directory, "work")
    deadline = time.monotonic() + 20
    while not list(work.glob("*.lock")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)
    assert [name for name in files(caller.store) if name.startswith(("images/", "names/"))] == []
    done = caller.run("pull", "big:t")
    assert done.returncode == 0 and "pulled in" in done.stderr
    assert [name for name in files(caller.store) if name.startswith("work/")] == []


def test_one_that_is_interrupted_at_the_keyboard_ends_in_silence(caller: Caller) -> None:
    """Ctrl-C reaches all processes of the terminal's group. It is no bug of ours, and shows no traceback."""
    running = caller.start("pull", "big:t")
    work = Path(caller.store.directory, "work")
    deadline = time.monotonic() + 20
    while not list(work.glob("work/*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(running.pid, signal.SIGINT)
    _, text = running.communicate(timeout=20)
    assert running.returncode != 0 and "Interrupt" not in text and "Traceback" not in text
    assert [name for name in files(caller.store) if name.startswith(("images/", "names/"))] == []


def test_gc_takes_what_has_no_name(caller: Caller) -> None:
    assert caller.run("pull", "small:t").returncode == 0
    assert caller.run("gc").stdout == ""
    (image,) = caller.store.images()
    caller.store.remove_name(image.names[0])
    left = Path(caller.store.directory, "images", "0" * 64 + ".sqsh")
    left.write_bytes(b"half")
    assert caller.run("gc").stdout.splitlines() == [f"removed {image.digest}", f"removed images/{left.name}"]
    assert files(caller.store) == []


def test_gc_leaves_what_somebody_works_on(caller: Caller) -> None:
    """Between a pull's steps an image has no record yet, or no name; its lock says that it is not left over."""
    assert caller.run("pull", "small:t").returncode == 0
    (image,) = caller.store.images()
    caller.store.remove_name(image.names[0])
    with caller.store.working(image.digest, lambda: None):
        assert caller.run("gc").stdout == ""
        record = Path(caller.store.record_path(image.digest))
        text = record.read_bytes()
        record.unlink()
        assert caller.run("gc").stdout == ""
        record.write_bytes(text)
    assert caller.run("gc").stdout.splitlines() == [f"removed {image.digest}"]


def test_gc_takes_what_killed_pulls_left_on_the_way(caller: Caller) -> None:
    assert caller.run("pull", "small:t").returncode == 0
    before = files(caller.store)
    left = [Path(caller.store.work.part_path("ab" * 32)), *(caller.store.directory / Path(name) for name in (
        "work/parts/x.new", "images/y.json.7.new", "names/z.8.new"))]  # fmt: skip
    for path in left:
        path.write_bytes(b"part")
    assert caller.run("gc").returncode == 0
    assert all(path.exists() for path in left)
    for path in left:
        os.utime(path, (0, 0))
    assert caller.run("gc").returncode == 0
    assert files(caller.store) == before


@pytest.mark.parametrize("days", ["-5", "x", "1.5", ""])
def test_days_are_a_number(caller: Caller, days: str) -> None:
    done = caller.run("gc", f"--unused={days}")
    assert done.returncode == 2 and "it is a number of days, 0 or more" in done.stderr


def test_import_of_a_file(caller: Caller, tmp_path: Path) -> None:
    made = Path(caller.store.directory).with_name("made.sqsh")
    command = ["mksquashfs", str(tmp_path), str(made), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made.chmod(0o644)
    assert caller.run("import", str(made), "mine:1").returncode == 0
    shown = caller.json("inspect", "mine:1")
    assert Path(shown["path"]).read_bytes() == made.read_bytes()
    bad = caller.run("import", "/etc/passwd", "mine:2")
    assert bad.returncode == 1 and "not a squashfs file" in bad.stderr


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_import_of_an_archive(caller: Caller, registry: Registry, kind: str) -> None:
    made = Path(caller.store.directory).with_name("archive")
    tag = {"oci": ":t", "oci-archive": "", "docker-archive": ":small:t"}[kind]
    command = ["skopeo", "copy", "-q", f"oci:{registry.folder / 'small'}:t", f"{kind}:{made}{tag}"]
    subprocess.run(command, check=True, timeout=30)
    subprocess.run(["chown", "-R", f"{caller.uid}:{caller.uid}", str(made)], check=True)
    done = caller.run("import", f"{kind}:{made}", "mine:1")
    assert done.returncode == 0, done.stderr
    shown = caller.json("inspect", "mine:1")
    assert shown["config"]["WorkingDir"] == "/work"
    listed = subprocess.run(["unsquashfs", "-l", shown["path"]], capture_output=True, text=True, check=True).stdout
    assert "squashfs-root/etc/above" in listed and "gone" not in listed
    assert [name for name in files(caller.store) if name.startswith("work/")] == []


def test_progress_is_a_bar_on_a_terminal(caller: Caller) -> None:
    """Plain lines elsewhere: the other tests read them."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [*caller.command, "pull", "big:t"], env=caller.env | {"TERM": "xterm"}, stderr=theirs, stdout=theirs, cwd="/"
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(mine, 4096)
        except OSError:
            break
    assert process.wait(30) == 0
    assert "━".encode() in shown and b"MB" in shown
    assert b"pulled in" in shown.splitlines()[-1] or b"pulled in" in shown


def test_a_store_that_cannot_be_written(caller: Caller) -> None:
    if caller.uid == 0:
        pytest.skip("root may write anywhere")
    closed = Path(caller.store.directory).with_name("closed")
    closed.mkdir(0o755)
    caller.env["ENCLOS_IMAGES_USER_STORE"] = str(closed)
    done = caller.run("pull", "small:t")
    assert done.returncode == 1
    assert f"enclos: {closed}: cannot be used as a store of images (permission denied)" in done.stderr


@pytest.mark.parametrize("change", ["owner", "owner of names", "everybody", "link", "above"])
def test_a_store_that_is_not_ones_own(registry: Registry, change: str) -> None:
    """Whoever made it first, or may exchange it, would choose what everybody runs."""
    with tempfile.TemporaryDirectory(prefix="enclos-pull-") as name:
        above, store = Path(name, "above"), Path(name, "above/store")
        (store / "names").mkdir(parents=True)
        for path in (Path(name), above, store, store / "names"):
            path.chmod(0o755)
        match change:
            case "owner":
                os.chown(store, DAEMON, DAEMON)
                words = f"{store} belongs to uid {DAEMON}"
            case "owner of names":
                os.chown(store / "names", DAEMON, DAEMON)
                words = f"{store}/names belongs to uid {DAEMON}"
            case "everybody":
                store.chmod(0o777)
                words = f"others may write to {store}"
            case "link":
                store = Path(name, "link")
                store.symlink_to(above / "store")
                os.chown(store, DAEMON, DAEMON, follow_symlinks=False)
                words = f"{store} belongs to uid {DAEMON}"
            case _:
                above.chmod(0o777)
                words = f"others may write to {above}"
        done = Caller(0, store, registry).run("pull", "small:t")
        assert done.returncode == 1 and done.stdout == ""
        assert f"enclos: {store}: cannot be used as a store of images ({words})" in done.stderr
        assert not list(Path(name).rglob("*.json")) and not list(Path(name).rglob("*.sqsh"))
        if change == "above":
            above.chmod(0o1777)
            assert Caller(0, store, registry).run("pull", "small:t").returncode == 0


def test_a_user_without_a_store_is_told(tmp_path: Path, registry: Registry) -> None:
    caller = Caller(DAEMON, tmp_path / "store", registry)
    caller.env["ENCLOS_IMAGES_USER_STORE"] = ""
    done = caller.run("pull", "small:t")
    assert done.returncode == 1 and "there is no store that you may fill" in done.stderr
