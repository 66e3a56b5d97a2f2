"""Ids, capabilities, descriptors and filters: what the kernel's /proc says after each call."""

import errno
import os
import signal
import socket
import stat
import tempfile
from pathlib import Path

import pytest
from children import errno_of, in_child, proc_status
from enclos.runtime import linux
from enclos.runtime.seccomp import remap_root_filter

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

UID, GID, GROUPS = 12345, 12346, (20001, 20002)
ADMIN = linux.capability_mask(linux.CAP_SYS_ADMIN)


def test_become_keeps_exactly_the_mask() -> None:
    def body() -> tuple[list[str], int, tuple[int, int, int]]:
        linux.keep_capabilities_and_become(UID, GID, GROUPS, ADMIN)
        fields = [proc_status(name) for name in ("Uid", "Gid", "Groups", "CapAmb")]
        return fields, linux.get_dumpable(), linux.get_capabilities()

    fields, dumpable, capabilities = in_child(body)
    ids = [sorted(set(text.split())) for text in fields]
    assert ids == [[str(UID)], [str(GID)], [str(group) for group in GROUPS], ["0" * 16]]
    assert dumpable == 0
    assert capabilities == (ADMIN, ADMIN, 0)


def test_become_without_groups_has_none() -> None:
    def body() -> str:
        linux.keep_capabilities_and_become(UID, GID, (), 0)
        return proc_status("Groups")

    assert in_child(body) == ""


def test_become_is_for_good() -> None:
    def body() -> list[int]:
        linux.keep_capabilities_and_become(UID, GID, GROUPS, ADMIN)
        return [errno_of(os.setuid, 0), errno_of(os.setgroups, []), errno_of(linux.set_capabilities, 0, 1)]

    assert in_child(body) == [errno.EPERM] * 3


def test_paths_are_looked_up_as_the_user() -> None:
    def body(path: str) -> int:
        linux.keep_capabilities_and_become(UID, GID, GROUPS, ADMIN)
        return errno_of(linux.clone_tree, path)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "closed")
        folder.mkdir()
        folder.parent.chmod(0o700)
        assert in_child(body, str(folder)) == errno.EACCES
        folder.parent.chmod(0o711)
        assert in_child(body, str(folder)) == 0


def test_filesystem_ids_and_back() -> None:
    def body(path: str) -> list[int]:
        results = []
        for uid, gid in ((UID, GID), (0, 0)):
            linux.set_filesystem_ids(uid, gid)
            results.append(errno_of(os.open, path, os.O_RDONLY))
        return results

    def not_allowed() -> int:
        linux.keep_capabilities_and_become(UID, GID, GROUPS, 0)
        return errno_of(linux.set_filesystem_ids, 0, 0)

    with tempfile.NamedTemporaryFile() as file:
        assert in_child(body, file.name) == [errno.EACCES, 0]
    assert in_child(not_allowed) == errno.EPERM


def test_bounding_set() -> None:
    def body(keep: int) -> str:
        linux.drop_bounding_set(keep)
        return proc_status("CapBnd")

    assert int(in_child(body, 0), 16) == 0
    mask = linux.capability_mask(linux.CAP_KILL, linux.CAP_SYS_ADMIN)
    assert int(in_child(body, mask), 16) == mask


def test_joining_a_user_namespace_fills_the_bounding_set_again() -> None:
    def body() -> str:
        userns_fd = linux.userns_with_map(f"0 {UID} 1\n", f"0 {GID} 1\n")
        linux.drop_bounding_set(0)
        linux.setns(userns_fd, linux.CLONE_NEWUSER)
        return proc_status("CapBnd")

    assert int(in_child(body), 16) != 0


def test_user_namespace_does_not_make_dumpable() -> None:
    def body() -> int:
        linux.keep_capabilities_and_become(UID, GID, (), ADMIN)
        linux.unshare(linux.CLONE_NEWUSER)
        return linux.get_dumpable()

    assert in_child(body) == 0


def test_userns_with_map_has_the_maps_and_no_process() -> None:
    def read_maps() -> list[list[str]]:
        linux.setns(userns_fd, linux.CLONE_NEWUSER)
        return [Path("/proc/self", name).read_text().split() for name in ("uid_map", "gid_map")]

    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text()
    userns_fd = linux.userns_with_map("0 5 1\n7 8 2\n", "0 6 1\n")
    assert children.read_text() == before
    # As seen from inside itself the right half of a map is what the parent calls the ids.
    assert in_child(read_maps) == [["0", "5", "1", "7", "8", "2"], ["0", "6", "1"]]
    assert not os.get_inheritable(userns_fd)
    os.close(userns_fd)


@pytest.mark.parametrize("text", ["", "nonsense", "0 5 1\n0 6 1\n"])
def test_userns_with_bad_map_leaves_no_child(text: str) -> None:
    before = len(os.listdir("/proc/self/fd")), children_of_all_threads()
    with pytest.raises(OSError, match="user namespace") as caught:
        linux.userns_with_map("0 5 1\n", text)
    assert caught.value.errno in (errno.EINVAL, errno.EIO)
    assert (len(os.listdir("/proc/self/fd")), children_of_all_threads()) == before


def children_of_all_threads() -> set[str]:
    """Pids, zombies too; other tests' registries may be among them."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_userns_limit_reads_as_no_space() -> None:
    def body() -> int:
        linux.unshare(linux.CLONE_NEWUSER)
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        return errno_of(linux.unshare, linux.CLONE_NEWUSER)

    assert in_child(body) == errno.ENOSPC


def test_close_other_descriptors() -> None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write_fd, 900)
        keep = [os.open("/", os.O_PATH) for _ in range(6)]
        linux.close_other_descriptors([0, keep[1], keep[4], keep[1], 900])
        left = [fd for fd in range(1024) if errno_of(os.fstat, fd) == 0]
        os.write(900, b"exact" if left == [0, keep[1], keep[4], 900] else repr(left).encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as stream:
        assert stream.read() == "exact"
    os.waitpid(pid, 0)


def test_flags() -> None:
    def body() -> list[str]:
        linux.set_name("a long name, cut off")
        linux.set_no_new_privileges()
        linux.set_dumpable(False)
        return [proc_status("Name"), proc_status("NoNewPrivs"), str(linux.get_dumpable())]

    assert in_child(body) == ["a long name, cu", "1", "0"]


def test_parent_death_signal_is_forgotten_by_become() -> None:
    """Two generations: the middle one ends, and the youngest either dies with it or does not."""

    def youngest_survives(set_again: bool) -> bool:
        read_fd, write_fd = os.pipe()
        middle = os.fork()
        if middle == 0:
            ready_read, ready_write = os.pipe()
            if os.fork() == 0:
                os.close(read_fd)
                linux.set_parent_death_signal(signal.SIGKILL)
                linux.keep_capabilities_and_become(UID, GID, (), 0)
                if set_again:
                    linux.set_parent_death_signal(signal.SIGKILL)
                parent = os.getppid()
                os.write(ready_write, b"x")
                while os.getppid() == parent:
                    signal.sigtimedwait([signal.SIGUSR1], 0.01)
                os.write(write_fd, b"alive")
                os._exit(0)
            os.read(ready_read, 1)
            os._exit(0)
        os.close(write_fd)
        os.waitpid(middle, 0)
        with os.fdopen(read_fd) as stream:
            return stream.read() == "alive"

    assert youngest_survives(set_again=False)
    assert not youngest_survives(set_again=True)


def test_remap_root_filter_in_a_user_namespace() -> None:
    """As a task of --container-remap-root: 0 inside is the user, no other id exists."""

    def body(folder: str) -> dict[str, object]:
        userns_fd = linux.userns_with_map(f"0 {UID} 1\n", f"0 {GID} 1\n")
        linux.keep_capabilities_and_become(UID, GID, (), linux.capability_mask(linux.CAP_SYS_ADMIN))
        linux.setns(userns_fd, linux.CLONE_NEWUSER)
        linux.set_no_new_privileges()
        path = f"{folder}/file"
        Path(path).touch()
        before = [errno_of(os.chown, path, 33, 33), errno_of(os.setresgid, 33, 33, 33)]
        linux.install_seccomp_filter(remap_root_filter(os.uname().machine))
        fd = os.open(path, os.O_RDONLY)
        after = [
            errno_of(os.chown, path, 33, 33),
            errno_of(os.lchown, path, 33, 33),
            errno_of(os.fchown, fd, 33, 33),
            errno_of(os.setgroups, [1, 2]),
            errno_of(os.setresgid, 33, 33, 33),
            errno_of(os.setresuid, 33, 33, 33),
            errno_of(os.mknod, f"{folder}/null", 0o020666, os.makedev(1, 3)),
            errno_of(os.mkfifo, f"{folder}/fifo"),
        ]
        names = {entry.name: stat.S_IFMT(entry.stat().st_mode) for entry in os.scandir(folder)}
        return {"before": before, "after": after, "owner": os.stat(path).st_uid, "ids": os.getresuid(), "names": names}

    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, UID, GID)
        result = in_child(body, folder)
    assert result["before"] == [errno.EINVAL] * 2
    assert result["after"] == [0] * 8
    assert (result["owner"], result["ids"]) == (0, (0, 0, 0))
    assert result["names"] == {"file": stat.S_IFREG, "fifo": stat.S_IFIFO}


def test_filter_of_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="whole number"):
        linux.install_seccomp_filter(b"1234567")
    assert in_child(errno_of, linux.install_seccomp_filter, b"") == errno.EINVAL


def test_hostname_of_a_new_uts_namespace() -> None:
    def body() -> str:
        linux.unshare(linux.CLONE_NEWUTS)
        socket.sethostname("other")
        return socket.gethostname()

    here = socket.gethostname()
    assert in_child(body) == "other"
    assert socket.gethostname() == here
