"""A container from the kernel interface's calls alone: what its tasks see, and what its owner cannot undo.

Each test looks from inside, through /proc and the files themselves.
"""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import errno_of, in_child
from enclos.runtime import linux
from miniature import GID, UID, Container, Staging, build, make_image

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def host() -> Iterator[Path]:
    """A shared tmpfs with a mount that covers a file, and one that is read-only. The user can reach it."""
    folder = Path(tempfile.mkdtemp(prefix="enclos-test-"))
    mount_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
    linux.move_mount(mount_fd, linux.AT_FDCWD, str(folder))
    os.close(mount_fd)
    linux.set_propagation(str(folder), linux.MS_SHARED)
    for name in ("stage", "share", "share/covered", "share/later", "readonly"):
        (folder / name).mkdir()
        os.chown(folder / name, UID, GID)
    (folder / "share/covered/below").write_text("covered by a mount\n")
    cover_fd = linux.mount_filesystem("tmpfs", [("mode", "0777")])
    linux.move_mount(cover_fd, linux.AT_FDCWD, str(folder / "share/covered"))
    os.close(cover_fd)
    (folder / "share/covered/above").write_text("seen\n")
    read_only_fd = linux.clone_tree(str(folder / "readonly"))
    linux.set_attributes(read_only_fd, set=linux.MOUNT_ATTR_RDONLY)
    linux.move_mount(read_only_fd, linux.AT_FDCWD, str(folder / "readonly"))
    os.close(read_only_fd)
    (folder / "share/group").write_text("for the group\n")
    os.chown(folder / "share/group", 0, 20002)
    (folder / "share/group").chmod(0o640)
    yield folder
    linux.unmount(str(folder))
    folder.rmdir()


@pytest.fixture(scope="module")
def container(image: Path, host: Path) -> Iterator[Container]:
    binds = {"share": str(host / "share"), "readonly": str(host / "readonly")}
    built = build(Staging(image, host / "stage", binds, {"site": str(host / "share")}))
    yield built
    built.close()


def test_task_is_the_user_with_all_groups_and_no_capability(container: Container) -> None:
    assert container.run("id") == "uid=12345 gid=12346 groups=12346,20001,20002\n"
    output = container.run("grep -E '^(Cap|NoNewPrivs)' /proc/self/status; cat /proc/self/setgroups")
    values = output.split()
    assert values[1:10:2] == ["0000000000000000"] * 5
    assert values[11:] == ["1", "deny"]


def test_roots_files_are_the_users(container: Container) -> None:
    assert container.run("stat -c %u:%g / /etc /etc/lower /etc/lower/file /bin/busybox").split() == [f"{UID}:{GID}"] * 5


def test_upper_takes_writes_over_the_image(container: Container) -> None:
    script = "echo new > /etc/lower/file; cat /etc/lower/file; rm -r /etc/lower; mkdir /etc/lower; ls /etc/lower"
    assert container.run(script) == "new\n"


def test_setuid_bit_is_there_and_does_nothing(container: Container) -> None:
    assert container.run("stat -c %a /bin/setuid; setuid").split() == ["4755", str(UID), str(UID)]


def test_setuid_bit_does_nothing_without_no_new_privs(container: Container) -> None:
    def run_setuid() -> str:
        return subprocess.check_output(["/bin/setuid"], text=True)

    assert container.attack(run_setuid) == f"{UID} {UID}\n"


def test_only_own_processes_and_interfaces(container: Container) -> None:
    assert container.run("cd /proc; ls -d [0-9]*").split()[1:] == []
    assert container.run("ls /sys/class/net").split() == ["lo"]
    assert container.run("hostname") == "boxed\n"


def test_devices(container: Container) -> None:
    output = container.run("ls /dev; ls /dev/pts; echo x > /dev/null && echo written")
    names = ["full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero"]
    assert output.split() == [*names, "ptmx", "written"]


def test_a_container_in_the_container(container: Container) -> None:
    """proc is whole: the kernel lets a nested pid namespace mount its own."""
    script = "unshare -U -r -p -f -m sh -c 'mount -t proc proc /proc && id -u && ls -d /proc/[0-9]*'"
    lines = container.run(script).split()
    assert lines[0] == "0"
    assert lines[1] == "/proc/1"
    assert len(lines) <= 3


def test_group_file_of_a_bind(container: Container) -> None:
    assert container.run("cat /mnt/share/group") == "for the group\n"


def test_read_only_with_all_that_is_mounted_below(container: Container) -> None:
    script = "touch /mnt/site/x; touch /mnt/site/covered/x; touch /mnt/readonly/x; ls -A /mnt/site/covered"
    lines = container.run(script).splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["Read-only file system"] * 3 + ["above"]
    assert container.run("touch /mnt/share/x /mnt/share/covered/x && rm /mnt/share/x && echo done") == "done\n"


@pytest.mark.parametrize("name", ["site", "readonly"])
def test_owner_cannot_make_it_writable(container: Container, name: str) -> None:
    """By the user from outside, who has all capabilities over his own namespaces."""

    def attempt() -> int:
        fd = os.open(f"/mnt/{name}", os.O_PATH)
        return errno_of(linux.set_attributes, fd, clear=linux.MOUNT_ATTR_RDONLY)

    assert container.attack(attempt) == errno.EPERM


@pytest.mark.parametrize("name", ["site", "share"])
def test_owner_cannot_uncover_what_a_mount_hides(container: Container, name: str) -> None:
    def attempt() -> tuple[int, list[str]]:
        number = errno_of(linux.unmount, f"/mnt/{name}/covered")
        return number, sorted(os.listdir(f"/mnt/{name}/covered"))

    result = container.attack(attempt)
    assert isinstance(result, tuple)
    assert result[0] == errno.EINVAL
    assert "below" not in result[1]


def test_owner_has_no_power_over_node_and_network(container: Container) -> None:
    def attempts() -> list[int]:
        return [
            errno_of(linux.mount_filesystem, "proc"),
            errno_of(linux.mount_filesystem, "sysfs"),
            errno_of(os.mknod, "/tmp/null", 0o020666, os.makedev(1, 3)),
            errno_of(linux.setns, container.extra[0], linux.CLONE_NEWNET),
        ]

    assert container.attack(attempts) == [errno.EPERM] * 4


def test_mounts_of_the_node_appear_and_those_of_the_container_do_not(container: Container, host: Path) -> None:
    later = host / "share/later"
    mount_fd = linux.mount_filesystem("tmpfs")
    linux.move_mount(mount_fd, linux.AT_FDCWD, str(later))
    os.close(mount_fd)
    (later / "appeared").write_text("")
    try:
        assert container.run("ls /mnt/share/later /mnt/site/later").split() == [
            *("/mnt/share/later:", "appeared", "/mnt/site/later:", "appeared")
        ]
    finally:
        linux.unmount(str(later))
    assert container.run("ls -A /mnt/share/later") == ""

    def mount_inside() -> list[str]:
        linux.move_mount(linux.mount_filesystem("tmpfs"), linux.AT_FDCWD, "/mnt/share/later")
        Path("/mnt/share/later/inside").touch()
        return [path.name for path in Path("/mnt/share/later").iterdir()]

    assert container.attack(mount_inside) == ["inside"]
    assert list(later.iterdir()) == []


def test_nothing_of_the_old_root_is_left(container: Container) -> None:
    targets = [line.split()[4] for line in container.run("cat /proc/self/mountinfo").splitlines()]
    wanted = {"/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"}
    wanted |= {"/mnt/share", "/mnt/share/covered", "/mnt/site", "/mnt/site/covered", "/mnt/readonly"}
    assert set(targets) - {"/mnt/share/later"} == wanted


def test_everything_ends_with_the_descriptors(image: Path, host: Path, tmp_path: Path) -> None:
    own_image = tmp_path / "own.sqsh"
    shutil.copy(image, own_image)

    def is_attached() -> bool:
        # When the builder's mount namespace is gone, the kernel names a file from the mount on which it lies.
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        return any(str(own_image).endswith(file.read_text().strip()) for file in files)

    built = build(Staging(own_image, host / "stage", {}))
    assert is_attached()
    built.close()
    # The kernel tears a namespace's mounts down in a work queue.
    deadline = time.monotonic() + 5
    while is_attached() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_attached()
    assert list((host / "stage").iterdir()) == []


def test_builder_is_closed_to_its_user(host: Path) -> None:
    """A process of the user's may not look into one that has taken his uid and a user namespace of his."""

    def look() -> list[int]:
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            linux.keep_capabilities_and_become(UID, GID, [], linux.capability_mask(linux.CAP_SYS_ADMIN))
            linux.unshare(linux.CLONE_NEWUSER)
            os.write(ready_write, b"x")
            signal.pause()
        os.read(ready_read, 1)
        linux.keep_capabilities_and_become(UID, GID, [], 0)
        results = [errno_of(os.open, f"/proc/{pid}/{name}", os.O_RDONLY) for name in ("mem", "environ", "maps")]
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return results

    assert in_child(look) == [errno.EACCES] * 3
