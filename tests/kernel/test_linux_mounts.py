"""The mount calls one by one: results, errors with their texts, and the fallback of enter_root."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from children import errno_of, in_child
from enclos.runtime import linux

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def private_folder() -> str:
    """In a child: a mount namespace of its own, and a tmpfs in it that goes with the child."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.set_propagation("/", linux.MS_PRIVATE | linux.MS_REC)
    mount_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
    linux.move_mount(mount_fd, linux.AT_FDCWD, "/mnt")
    return "/mnt"


def test_error_has_the_kernels_words() -> None:
    with pytest.raises(linux.MountError) as caught:
        linux.mount_filesystem("tmpfs", [("sizes", "1M")])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == "tmpfs option sizes"
    assert caught.value.log == ("tmpfs: Unknown parameter 'sizes'",)


def test_unknown_file_system() -> None:
    with pytest.raises(linux.MountError) as caught:
        linux.mount_filesystem("enclosfs")
    assert (caught.value.errno, caught.value.log) == (errno.ENODEV, ())


def test_errors_name_their_object() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        linux.clone_tree("/nowhere")
    with pytest.raises(OSError, match=r"Bad file descriptor.*descriptor 1000"):
        linux.set_attributes(1000, set=linux.MOUNT_ATTR_RDONLY)
    with pytest.raises(OSError, match=r"Invalid argument.*/proc/self/ns"):
        linux.unmount("/proc/self/ns")


def test_descriptors_are_close_on_exec() -> None:
    for fd in (linux.mount_filesystem("tmpfs"), linux.clone_tree("/proc"), linux.openat2(-100, "/", os.O_PATH)):
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_detached_mount_is_a_directory_of_its_own() -> None:
    mount_fd = linux.mount_filesystem("tmpfs", [("size", "1M")], linux.MOUNT_ATTR_NODEV)
    os.mkdir("inside", dir_fd=mount_fd)
    # The descriptor is an O_PATH one: good for *at calls, not for reading.
    assert errno_of(os.listdir, mount_fd) == errno.EBADF
    reader_fd = os.open(".", os.O_RDONLY, dir_fd=mount_fd)
    assert os.listdir(reader_fd) == ["inside"]
    os.close(reader_fd)
    assert os.fstatvfs(mount_fd).f_blocks * os.fstatvfs(mount_fd).f_frsize == 1 << 20
    assert os.fstatvfs(mount_fd).f_flag & linux.MS_NODEV
    os.close(mount_fd)


def test_recursive_read_only_reaches_mounts_below() -> None:
    def body() -> list[int]:
        folder = Path(private_folder())
        (folder / "source/below").mkdir(parents=True)
        linux.move_mount(linux.mount_filesystem("tmpfs"), linux.AT_FDCWD, str(folder / "source/below"))
        results = []
        for recursive in (False, True):
            tree_fd = linux.clone_tree(str(folder / "source"))
            linux.set_attributes(tree_fd, set=linux.MOUNT_ATTR_RDONLY, recursive=recursive)
            flags = os.O_CREAT | os.O_WRONLY
            results.append(errno_of(os.open, "file", flags, dir_fd=tree_fd))
            results.append(errno_of(os.open, "below/file", flags, dir_fd=tree_fd))
        return results

    assert in_child(body) == [errno.EROFS, 0, errno.EROFS, errno.EROFS]


def test_nofollow_and_single_files() -> None:
    def body() -> tuple[int, str]:
        folder = Path(private_folder())
        (folder / "file").write_text("text")
        (folder / "target").touch()
        (folder / "link").symlink_to("nowhere")
        linux.move_mount(linux.clone_tree(str(folder / "file")), linux.AT_FDCWD, str(folder / "target"))
        dangling = errno_of(linux.clone_tree, str(folder / "link"))
        linux.clone_tree(str(folder / "link"), nofollow=True)
        return dangling, (folder / "target").read_text()

    assert in_child(body) == (errno.ENOENT, "text")


def test_clone_of_a_descriptor() -> None:
    def body() -> str:
        folder = Path(private_folder())
        (folder / "directory").mkdir()
        (folder / "directory/file").write_text("by descriptor")
        dir_fd = os.open(folder / "directory", os.O_PATH)
        tree_fd = linux.clone_tree("", dir_fd)
        return os.fdopen(os.open("file", os.O_RDONLY, dir_fd=tree_fd)).read()

    assert in_child(body) == "by descriptor"


def test_idmapped_mount_must_be_new() -> None:
    def body() -> list[int]:
        folder = private_folder()
        userns_fd = linux.userns_with_map("0 1234 1\n", "0 1235 1\n")
        mount_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
        linux.move_mount(mount_fd, linux.AT_FDCWD, folder)
        late = errno_of(linux.set_attributes, mount_fd, userns_fd=userns_fd)
        new_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
        linux.set_attributes(new_fd, userns_fd=userns_fd)
        status = os.fstat(new_fd)
        assert errno_of(linux.set_attributes, new_fd, userns_fd=userns_fd) == errno.EPERM
        return [late, status.st_uid, status.st_gid]

    late, uid, gid = in_child(body)
    assert late == errno.EINVAL
    assert (uid, gid) == (1234, 1235)


def test_resolution_stays_in_the_root() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "etc").mkdir()
        (folder / "etc/passwd").write_text("inside")
        (folder / "absolute").symlink_to("/etc/passwd")
        (folder / "upward").symlink_to("../../../../etc/passwd")
        root_fd = os.open(folder, os.O_PATH)
        for path in ("absolute", "upward", "/etc/passwd", "../../etc/passwd"):
            fd = linux.openat2(root_fd, path, os.O_RDONLY, resolve=linux.RESOLVE_IN_ROOT)
            assert os.fdopen(fd).read() == "inside"
        assert errno_of(linux.openat2, root_fd, "absolute", os.O_RDONLY, resolve=linux.RESOLVE_BENEATH) == errno.EXDEV
        fd = linux.openat2(root_fd, "new", os.O_WRONLY | os.O_CREAT, mode=0o640, resolve=linux.RESOLVE_IN_ROOT)
        assert os.fstat(fd).st_mode & 0o777 == 0o640
        os.close(fd)
        os.close(root_fd)


@pytest.mark.parametrize("can_pivot", [True, False])
def test_enter_root(can_pivot: bool) -> None:
    """In a chroot to a plain directory pivot_root is EINVAL, as it is on an initramfs."""

    def body() -> tuple[list[str], list[str], str]:
        folder = Path(private_folder())
        (folder / "new").mkdir()
        proc_fd = linux.mount_filesystem("proc")
        new_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
        os.mkdir("proc", dir_fd=new_fd)
        os.mkdir("marker", dir_fd=new_fd)
        if not can_pivot:
            (folder / "old").mkdir()
            (folder / "old/new").mkdir()
            os.chroot(folder / "old")
            linux.move_mount(new_fd, linux.AT_FDCWD, "/new")
            os.chdir("/new")
            assert errno_of(linux.pivot_root, ".", ".") == errno.EINVAL
        else:
            linux.move_mount(new_fd, linux.AT_FDCWD, str(folder / "new"))
        linux.enter_root(new_fd)
        linux.move_mount(proc_fd, linux.AT_FDCWD, "/proc")
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return sorted(os.listdir("/")), [line.split()[1] for line in mounts], os.getcwd()

    names, targets, directory = in_child(body)
    assert names == ["marker", "proc"]
    assert set(targets) == {"/", "/proc"}
    assert directory == "/"
