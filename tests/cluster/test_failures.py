"""What goes wrong, and what the user gets: the lines on srun's terminal, word for word.

Every case asks for the same: the exact lines, once per node and not per task, a non-zero exit of srun, the program
not run, the nodes still idle, and nothing left behind. Texts are compared whole, because they are what the user has.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from conftest import PATIENCE, Leftovers, Result, plain, said
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.daemons import accepts
from enclos.runtime.cluster.image import install
from faults import spare, zygote

USERA, USERB = 61001, 61002
IMAGE = "/images/openmpi.sqsh"
LIMIT = Path("/proc/sys/user/max_user_namespaces")

ON_NODE = "hint: images are looked up on the compute node; is the path on a shared file system?"
READABLE = "hint: you need read access to the file and search access to all directories above it"
SQUASHFS = "hint: 'file PATH' tells what it is; mksquashfs or tar2sqfs make one"
DAMAGED = (
    "hint: possibly damaged, or its compression is not known to the node's kernel; build it again with gzip or zstd"
)
KIND = "hint: give a squashfs file or a directory"
SOURCE = "hint: sources are looked up on the compute node"
RIGHTS = "hint: sources are opened with your rights on the compute node"
TARGET = "hint: does the target exist in the image, and is it a directory if the source is one?"
WORKDIR = "hint: it has to exist in the image or in a mount"
ROOT = "hint: run as an ordinary user (srun --uid); administrator: step.allow_root in enclos.yaml"
AGENT = "hint: administrator: systemctl status enclosd"
USERNS = "hint: administrator: raise it; 'enclos check' tests all requirements"
AGAIN = "hint: run the step again; administrator: journalctl -u enclosd"


@pytest.fixture(scope="module", autouse=True)
def things(cluster: Cluster, image: str) -> None:
    """Files that a user may name by mistake; /images is root's, /shared is everybody's."""
    images, shared = cluster.layout.images, cluster.layout.shared
    whole = (images / "openmpi.sqsh").read_bytes()
    place(images / "private.sqsh", whole, 0o600)
    place(images / "script.sqsh", b"#!/bin/sh\n" * 200)
    place(images / "none.sqsh", b"")
    place(images / "short.sqsh", whole[: len(whole) // 2])
    place(images / "header.sqsh", whole[:40])
    place(images / "zeros.sqsh", whole[:96] + bytes(len(whole) - 96))
    place(images / "writable.sqsh", whole, 0o666)
    place(images / "holes.sqsh", whole[:96] + bytes(len(whole) // 2 - 96) + whole[len(whole) // 2 :])
    place(shared / "own.sqsh", whole, owner=USERA)
    place(cluster.layout.homes / "userb/theirs.sqsh", whole, owner=USERB)
    os.mkfifo(images / "fifo")
    (images / "loop.sqsh").symlink_to("loop.sqsh")
    (images / "odd").mkdir()
    (images / "odd/dev").touch()
    (shared / "secret").mkdir(mode=0o700)
    place(shared / "secret/key", b"key")
    place(shared / "shadow", b"hash", 0o600)
    (shared / "to-secret").symlink_to("/shared/secret/key")
    (shared / "to-nothing").symlink_to("/shared/nothing")
    (shared / "folder").mkdir()


def place(path: Path, content: bytes, mode: int = 0o644, owner: int = 0) -> None:
    path.write_bytes(content)
    path.chmod(mode)
    os.chown(path, owner, owner)


@dataclass(frozen=True)
class Case:
    """Options of srun, the lines the user gets on n1, and srun's exit status."""

    name: str
    options: Sequence[str]
    lines: Sequence[str]
    status: int = 1
    user: str = "usera"
    env: Mapping[str, str] = field(default_factory=dict)


def bad_image(name: str, path: str, what: str, hint: str) -> Case:
    return Case(name, [f"--container-image={path}"], [f"enclos: --container-image={path}: {what} on n1", hint])


def bad_mount(name: str, text: str, what: str, hint: str) -> Case:
    options = [f"--container-image={IMAGE}", f"--container-mounts={text}"]
    return Case(name, options, [f"enclos: --container-mounts={text}: {what} on n1", hint])


def in_image(name: str, options: Sequence[str], *lines: str, status: int = 1, user: str = "usera") -> Case:
    return Case(name, [f"--container-image={IMAGE}", *options], lines, status, user)


MISSING = "image not found"
REFERENCE_HINT = "hint: give docker://REGISTRY/NAME:TAG, /PATH or ./PATH; see enclos-srun(1)"
DENIED = "image is not readable (permission denied)"
UNTRUSTED = "image is not trusted (not owned by root, or writable by others)"
UNTRUSTED_HINT = (
    "hint: use an image of the site or an unpacked directory; administrator: images.user_files in enclos.yaml"
)
NO_SOURCE = "source path does not exist"
NO_ACCESS = "source path is not accessible (permission denied)"
NO_TARGET = "couldn't mount at this target in the container"

CASES = [
    bad_image("image-missing", "/images/nothing.sqsh", MISSING, ON_NODE),
    bad_image("image-below-a-file", f"{IMAGE}/deeper", MISSING, ON_NODE),
    bad_image("image-symlink-loop", "/images/loop.sqsh", MISSING, ON_NODE),
    bad_image("image-name-too-long", "/" + "a" * 300, MISSING, ON_NODE),
    # Said by srun itself.
    Case(
        "image-of-no-registry",
        ["--container-image=ubuntu:24.04"],
        [
            "enclos: --container-image=ubuntu:24.04: no such kind of image"
            " (it is no path, and the site has no default registry)",
            REFERENCE_HINT,
        ],
    ),
    bad_image("image-unreadable", "/images/private.sqsh", DENIED, READABLE),
    bad_image("image-in-a-closed-folder", "/shared/secret/image.sqsh", DENIED, READABLE),
    bad_image("image-of-another-user", "/home/userb/theirs.sqsh", DENIED, READABLE),
    bad_image("image-is-a-script", "/images/script.sqsh", "image is not a squashfs file", SQUASHFS),
    bad_image("image-is-empty", "/images/none.sqsh", "image is not a squashfs file", SQUASHFS),
    bad_image("image-is-a-device", "/dev/null", "image is neither a regular file nor a directory", KIND),
    bad_image("image-is-a-fifo", "/images/fifo", "image is neither a regular file nor a directory", KIND),
    bad_image("image-is-all-zeros", "/images/zeros.sqsh", "image cannot be read (invalid argument)", DAMAGED),
    bad_image("image-has-holes", "/images/holes.sqsh", "image cannot be read (input/output error)", DAMAGED),
    bad_image(
        "image-has-a-file-for-dev",
        "/images/odd",
        "nothing can be mounted at /dev of the image (not a directory)",
        "hint: it has to be a directory, or missing",
    ),
    bad_mount("tmpfs-onto-a-file", "tmpfs:/etc/passwd", f"{NO_TARGET} (not a directory)", TARGET),
    bad_mount("source-missing", "/shared/nothing:/x", NO_SOURCE, SOURCE),
    bad_mount("source-below-a-file", "/etc/passwd/x:/x", NO_SOURCE, SOURCE),
    bad_mount("source-is-a-dangling-link", "/shared/to-nothing:/x", NO_SOURCE, SOURCE),
    bad_mount("source-in-a-closed-folder", "/shared/secret/key:/x", NO_ACCESS, RIGHTS),
    bad_mount("source-forbidden-through-a-link", "/shared/to-secret:/x", NO_ACCESS, RIGHTS),
    bad_mount("source-is-a-closed-folder", "/shared/secret:/x", NO_ACCESS, RIGHTS),
    bad_mount("source-is-an-unreadable-file", "/shared/shadow:/x", NO_ACCESS, RIGHTS),
    bad_mount("target-is-no-folder", "/shared/folder:/etc/passwd", f"{NO_TARGET} (not a directory)", TARGET),
    bad_mount("target-below-a-file", "/shared/folder:/etc/passwd/x", f"{NO_TARGET} (not a directory)", TARGET),
    in_image(
        "flag-unknown",
        ["--container-mounts=/tmp:/x:bogus"],
        "enclos: --container-mounts=/tmp:/x:bogus: unknown flag of a mount",
        status=255,
    ),
    in_image(
        "flags-contradict",
        ["--container-mounts=/tmp:/x:ro+rw"],
        "enclos: --container-mounts=/tmp:/x:ro+rw: invalid format: ro and rw exclude each other",
        status=255,
    ),
    in_image(
        "too-many-colons",
        ["--container-mounts=/tmp:/x:ro:rw"],
        "enclos: --container-mounts=/tmp:/x:ro:rw: invalid format: too many colons (expected SRC:DST[:FLAGS])",
        status=255,
    ),
    in_image(
        "target-is-the-root",
        ["--container-mounts=/shared/folder:/"],
        "enclos: --container-mounts=/shared/folder:/: the container's root cannot be a target",
        status=255,
    ),
    in_image(
        "source-is-relative",
        ["--container-mounts=folder:/x"],
        "enclos: --container-mounts=folder:/x: mount source must be a relative path (./…), an absolute path, "
        '"tmpfs", "devpts" or "umount"',
        status=255,
    ),
    in_image(
        "target-is-relative",
        ["--container-mounts=/tmp:x"],
        "enclos: --container-mounts=/tmp:x: mount target must be an absolute path",
        status=255,
    ),
    in_image(
        "workdir-missing",
        ["--container-workdir=/nowhere"],
        "enclos: --container-workdir=/nowhere: couldn't chdir: no such directory in the container on n1",
        WORKDIR,
    ),
    in_image(
        "workdir-is-a-file",
        ["--container-workdir=/etc/passwd"],
        "enclos: --container-workdir=/etc/passwd: couldn't chdir: no such directory in the container on n1",
        WORKDIR,
    ),
    Case(
        "home-missing",
        [f"--container-image={IMAGE}", "--container-mount-home"],
        [
            "enclos: --container-mount-home: home directory /home/nobody-here cannot be opened on n1",
            "hint: drop the option, or check $HOME on the compute node",
        ],
        env={"HOME": "/home/nobody-here"},
    ),
    in_image(
        "network-unknown",
        ["--container-network=blue"],
        "enclos: --container-network=blue: no such network (job, host or none)",
        status=255,
    ),
    in_image(
        "readonly-and-writable",
        ["--container-readonly", "--container-writable"],
        "enclos: both --container-readonly and --container-writable were specified",
    ),
    in_image("step-of-root", [], "enclos: --container-image: steps of root are refused on n1", ROOT, user="root"),
]


def srun(cluster: Cluster, *options: str, user: str = "usera", env: Mapping[str, str] | None = None) -> Result:
    return cluster.run(["srun", *options], user, timeout=60, env=env)


def lines_for_user(text: str) -> list[str]:
    """What srun printed, without Slurm's own words before a line and its report of exit codes."""
    rows = []
    for row in map(plain, said(text)):
        if not re.fullmatch(r"n\d+: tasks? [\d,-]+: Exited with exit code \d+|Invalid --\S+ argument: .*", row):
            rows.append(row)
    return rows


def states(cluster: Cluster) -> set[str]:
    """States of all nodes, once no job is left; a drained node would say so."""
    cluster.await_idle()
    return set(cluster.run("sinfo -h -N -o %T").stdout.split())


def check_failure(done: Result, lines: Sequence[str], status: int = 1) -> None:
    assert lines_for_user(done.stderr) == list(lines)
    assert done.returncode == status
    assert done.stdout == "", "the program ran"


def marked(number: int, case: Case) -> ParameterSet:
    """Their texts are the agent's, so other releases of Slurm need not see all of them."""
    return pytest.param(case, id=case.name, marks=[pytest.mark.releases] if number % 5 == 0 else [])


@pytest.mark.parametrize("case", [marked(number, case) for number, case in enumerate(CASES)])
def test_failure(idle: Cluster, case: Case) -> None:
    done = srun(idle, "-w", "n1", "-n3", *case.options, "echo", "ran", user=case.user, env=case.env)
    check_failure(done, case.lines, case.status)
    assert states(idle) == {"idle"}


@pytest.mark.releases
@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            ["--container-image=/images/nothing.sqsh"],
            "--container-image=/images/nothing.sqsh: image not found",
            ON_NODE,
        ),
        (
            [f"--container-image={IMAGE}", "--container-mounts=/shared/nothing:/x", "--container-network=job"],
            "--container-mounts=/shared/nothing:/x: source path does not exist",
            SOURCE,
        ),
        (
            [f"--container-image={IMAGE}", "--container-workdir=/nowhere"],
            "--container-workdir=/nowhere: couldn't chdir: no such directory in the container",
            WORKDIR,
        ),
    ],
    ids=["image", "mount", "workdir"],
)
def test_one_line_per_node(idle: Cluster, options: list[str], what: str, hint: str) -> None:
    done = srun(idle, "-N4", "-n12", *options, "echo", "ran")
    found = lines_for_user(done.stderr)
    assert sorted(found) == sorted([*(f"enclos: {what} on {node}" for node in idle.nodes), *[hint] * 4])
    assert (done.returncode, done.stdout) == (1, "")
    assert states(idle) == {"idle"}


@pytest.mark.releases
@pytest.mark.parametrize("command", ["nothing", "/bin/nothing", "./nothing"])
def test_command_not_in_the_image(idle: Cluster, command: str) -> None:
    """One that the host has counts as missing too."""
    done = srun(idle, "-N2", "-n6", "-w", "n[1-2]", f"--container-image={IMAGE}", command)
    lines = [f"enclos: {command}: command not found in the container on {node}" for node in ("n1", "n2")]
    assert sorted(lines_for_user(done.stderr)) == lines
    assert (done.returncode, done.stdout) == (127, "")
    on_host = srun(idle, "-w", "n1", f"--container-image={IMAGE}", shutil.which("python3") or "/usr/bin/python3")
    assert on_host.returncode == 127


def test_failures_leave_nothing_behind(cluster: Cluster, leftovers: Leftovers) -> None:
    """Every case in one go, as one user's script might hit them, on all nodes and with a network."""
    for case in CASES:
        if case.name == "image-has-holes":  # It can be mounted, and stays so for a while by design.
            continue
        srun(cluster, "-N4", "-n8", "--container-network=job", *case.options, "true", user=case.user, env=case.env)
        cluster.await_idle()
    assert leftovers.rows() == []
    assert states(cluster) == {"idle"}
    assert srun(cluster, "-N4", f"--container-image={IMAGE}", "true").returncode == 0


@pytest.mark.releases
def test_batch_script_fails_like_a_step(idle: Cluster) -> None:
    """sbatch -W: the text is in the job's output, the job fails, and the node is not drained."""
    options = "-W -w n1 -o /shared/failed.out --container-image=/images/nothing.sqsh"
    done = idle.run(f"sbatch {options} --wrap 'echo ran'", "usera")
    assert done.returncode == 1
    text = (idle.layout.shared / "failed.out").read_text()
    assert lines_for_user(text) == ["enclos: --container-image=/images/nothing.sqsh: image not found on n1", ON_NODE]
    assert states(idle) == {"idle"}


# -- the node's own faults --------------------------------------------------------------------------------


NAMED_LIMIT = """
from enclos.runtime import builder, errors, operations
import socket
open("/proc/sys/user/max_user_namespaces", "w").write("0")
for operation in (operations.EnterUserNamespace("0 0 1", "0 0 1"), operations.EnterNamespaces()):
    try:
        builder.Builder(socket.socketpair()[0], 0, 0, ()).execute([operation])
    except errors.EnclosError as error:
        print(error.line("n1"))
"""


def test_limit_of_user_namespaces_is_named() -> None:
    """In a user namespace of the test's own: the limit of the node's is that of the whole machine."""
    words = ["unshare", "--user", "--map-root-user", sys.executable, "-c", NAMED_LIMIT]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "cannot create a user namespace (user.max_user_namespaces is 0) on n1\n", done.stderr


@pytest.mark.skipif(not os.access(LIMIT, os.W_OK), reason=f"{LIMIT} cannot be written (needs CAP_SYS_RESOURCE)")
def test_user_namespaces_forbidden_by_sysctl(idle: Cluster, leftovers: Leftovers) -> None:
    with limit_of_zero():
        done = srun(idle, "-w", "n1", "-n2", f"--container-image={IMAGE}", "echo", "ran")
    check_failure(done, ["enclos: cannot create a user namespace (user.max_user_namespaces is 0) on n1", USERNS])
    assert states(idle) == {"idle"}
    assert leftovers.rows() == []


@contextmanager
def limit_of_zero() -> Iterator[None]:
    """For a moment: the limit is that of the whole machine, so a shell gives it back should this process be killed."""
    before = LIMIT.read_text().strip()
    guard = subprocess.Popen(["sh", "-c", f"sleep 10; echo {before} >{LIMIT}"], start_new_session=True)
    try:
        LIMIT.write_text("0")
        yield
    finally:
        LIMIT.write_text(before)
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


# The agent under a filter as RestrictNamespaces= of systemd installs: unshare and clone refuse CLONE_NEWUSER.
RESTRICTED = """
import ctypes, os, struct, sys
NR, ARGUMENT, NEWUSER = 0, 16, 0x10000000
unshare, clone = {"x86_64": (272, 56), "aarch64": (97, 220)}[os.uname().machine]
program = b"".join(struct.pack("=HBBI", *row) for row in [
    (0x20, 0, 0, NR), (0x15, 1, 0, unshare), (0x15, 0, 3, clone),
    (0x20, 0, 0, ARGUMENT), (0x45, 0, 1, NEWUSER), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)])
text = ctypes.create_string_buffer(program)
header = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.releases
@pytest.mark.parametrize("path", [IMAGE, "/images/openmpi"], ids=["file", "directory"])
def test_user_namespaces_refused(calm: Leftovers, odd: Cluster, path: str) -> None:
    """A file needs one for its id map, too."""
    odd.stop_agent("n1")
    odd.path_on("n1", "/run/enclos/agent.sock").unlink()
    command = [str(odd.programs / "python3"), "-c", RESTRICTED, str(odd.programs / "enclosd"), "--foreground"]
    with odd.popen(command, node="n1", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as agent:
        await_true(lambda: accepts(odd.path_on("n1", "/run/enclos/agent.sock")))
        done = srun(odd, "-w", "n1", "-n2", f"--container-image={path}", "echo", "ran")
        agent.terminate()
    refused = "enclos: cannot create a user namespace (operation not permitted) on n1"
    check_failure(done, [refused, USERNS])
    odd.start_agent("n1")
    assert rows_with_another_agent(calm) == []


@pytest.fixture(scope="module")
def odd(make_cluster: Callable[..., Cluster], image: str, cluster: Cluster) -> Cluster:
    """Two nodes with a quick deadline; n1 has little room and trusts users' images, n2 has almost none, and refuses."""
    made = make_cluster(2, config="step: {build_deadline_seconds: 2}\n")
    settings = {
        "n1": "{tmpfs_size: 2M, shm_size: 1M}\nimages: {user_files: trust}",
        "n2": "{tmpfs_size: 4K}\nimages: {user_files: refuse}",
    }
    for node, text in settings.items():
        path = made.layout.node_etc(node) / "enclos.yaml"
        path.write_text(f"{path.read_text()}rootfs: {text}\n")
        made.restart_agent(node)
    install(made.layout.images)
    place(made.layout.shared / "own.sqsh", (cluster.layout.images / "openmpi.sqsh").read_bytes(), owner=USERA)
    return made


@pytest.fixture
def calm(odd: Cluster) -> Iterator[Leftovers]:
    """The odd cluster, idle, with its image in use before; after the test all agents run and all nodes are idle."""
    odd.await_idle()
    srun(odd, "-N2", f"--container-image={IMAGE}", "true")
    odd.await_idle()
    yield Leftovers(odd)
    for node in odd.nodes:
        odd.start_agent(node)
    assert states(odd) == {"idle"}


@pytest.mark.releases
@pytest.mark.parametrize(("folder", "limit_mb"), [("", 2), ("/tmp", 2), ("/dev/shm", 1)])
def test_full_tmpfs_is_the_programs_error(calm: Leftovers, odd: Cluster, folder: str, limit_mb: int) -> None:
    script = f"dd if=/dev/zero of={folder}/big bs=64k count=100 2>&1; echo status=$?; stat -c %s {folder}/big"
    done = srun(odd, "-w", "n1", f"--container-image={IMAGE}", "sh", "-c", script)
    rows = done.stdout.splitlines()
    assert rows[0] == f"dd: error writing '{folder}/big': No space left on device"
    assert rows[-2] == "status=1"
    assert 0.8 * limit_mb < int(rows[-1]) / 2**20 <= limit_mb
    assert lines_for_user(done.stderr) == []
    assert calm.rows() == []


@pytest.mark.releases
def test_no_room_to_build(calm: Leftovers, odd: Cluster) -> None:
    done = srun(odd, "-w", "n2", "-n2", f"--container-image={IMAGE}", "echo", "ran")
    full = "enclos: container: its writable layer is full (limit 4K) on n2"
    hint = "hint: write to a mounted directory instead; administrator: rootfs.tmpfs_size in enclos.yaml"
    check_failure(done, [full, hint])
    assert calm.rows() == []


def test_site_trusts_images_of_users(calm: Leftovers, odd: Cluster) -> None:
    """What n2 of the same cluster refuses."""
    words = ["--container-image=/shared/own.sqsh", "echo", "ran"]
    assert srun(odd, "-w", "n1", *words).stdout == "ran\n"
    refused = srun(odd, "-w", "n2", *words)
    check_failure(refused, [f"enclos: --container-image=/shared/own.sqsh: {UNTRUSTED} on n2", UNTRUSTED_HINT])


@pytest.mark.releases
def test_agent_not_running(calm: Leftovers, odd: Cluster) -> None:
    """On one of two nodes: the other's tasks run, as Slurm does it for any task that fails."""
    odd.stop_agent("n2")
    done = srun(odd, "-N2", "-n4", f"--container-image={IMAGE}", "hostname")
    cause = "/run/enclos/agent.sock: connection refused"  # systemd removes the socket; nobody does here
    assert lines_for_user(done.stderr) == [f"enclos: agent is not running ({cause}) on n2", AGENT]
    assert (done.returncode, set(done.stdout.split())) == (1, {"n1"})
    assert srun(odd, "-w", "n2", "echo", "bare").stdout == "bare\n"
    odd.start_agent("n2")
    assert rows_with_another_agent(calm) == []


@pytest.mark.releases
def test_agent_without_a_socket(calm: Leftovers, odd: Cluster) -> None:
    odd.stop_agent("n1", signal.SIGKILL)
    odd.path_on("n1", "/run/enclos/agent.sock").unlink()
    done = srun(odd, "-w", "n1", "-n2", f"--container-image={IMAGE}", "echo", "ran")
    check_failure(done, ["enclos: agent is not running (/run/enclos/agent.sock: no such file) on n1", AGENT])
    odd.start_agent("n1")
    assert rows_with_another_agent(calm) == []


@pytest.mark.releases
def test_builds_that_hang_end_by_their_deadline(calm: Leftovers, odd: Cluster) -> None:
    with stopped(zygote(odd, "n1")), stopped(spare(odd, "n1")):
        done = srun(odd, "-w", "n1", "-n2", f"--container-image={IMAGE}", "echo", "ran")
    check_failure(
        done,
        [
            "enclos: container: not ready after 2 s on n1",
            "hint: run the step again; is a file system slow or hanging? "
            "administrator: step.build_deadline_seconds in enclos.yaml",
        ],
    )
    assert calm.rows() == []
    assert srun(odd, "-w", "n1", f"--container-image={IMAGE}", "echo", "ran").stdout == "ran\n"


@pytest.mark.releases
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_agent_killed_during_the_build(calm: Leftovers, odd: Cluster, number: int) -> None:
    words = ["srun", "-w", "n1", "-n3", f"--container-image={IMAGE}", "echo", "ran"]
    with stopped(zygote(odd, "n1")), stopped(spare(odd, "n1")), odd.popen(words, "usera") as running:
        await_true(lambda: waiting_tasks(odd, "n1") == 3)
        odd.stop_agent("n1", number)
        out, err = running.communicate(timeout=30)
    done = Result(words, running.returncode, out, err)
    check_failure(
        done,
        [f"enclos: --container-image={IMAGE}: the agent ended while the container was being made on n1", AGAIN],
    )
    odd.start_agent("n1")
    assert rows_with_another_agent(calm) == []
    assert srun(odd, "-w", "n1", f"--container-image={IMAGE}", "echo", "ran").stdout == "ran\n"


@pytest.mark.releases
def test_zygote_killed_during_the_build(calm: Leftovers, odd: Cluster) -> None:
    """The agent starts another zygote, and the step succeeds at the second attempt."""
    words = ["srun", "-w", "n1", "-n3", f"--container-image={IMAGE}", "echo", "ran"]
    pid = zygote(odd, "n1")
    with stopped(pid), stopped(spare(odd, "n1")), odd.popen(words, "usera") as running:
        await_true(lambda: waiting_tasks(odd, "n1") == 3)
        os.kill(pid, signal.SIGKILL)
        out, err = running.communicate(timeout=30)
    assert (out, running.returncode, lines_for_user(err)) == ("ran\n" * 3, 0, [])
    assert calm.rows() == []


def rows_with_another_agent(leftovers: Leftovers) -> list[str]:
    """What came or went, when an agent was replaced: the new one's own namespace stands for the old one's."""
    cluster = leftovers.cluster
    srun(cluster, "-N2", f"--container-image={IMAGE}", "true")  # the new agent mounts the image again
    cluster.await_idle()
    deadline = time.monotonic() + 10 * PATIENCE
    while True:
        changes: Counter[str] = Counter()
        for row in leftovers.rows(0):
            kind, number, name = row.split(" ", 2)
            anonymous = re.sub(r"(mnt|user):\[[0-9]+\]", r"\1", name)
            changes[f"{kind} {anonymous}"] += int(number)
        # What went is what the old one kept for later steps: images, and namespaces for their id maps.
        rows = [f"{number:+d} {name}" for name, number in changes.items() if number > 0]
        if not rows or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


def comm(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def waiting_tasks(cluster: Cluster, node: str) -> int:
    """How many tasks wait for their container: the shim gives them a name of their own meanwhile."""
    return [comm(pid) for pid in cluster.processes(node)].count("enclos-task")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process; it goes on afterwards, if it is still there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def await_true(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
