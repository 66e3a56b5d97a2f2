"""A container made by hand with enclos.runtime.linux: the calls and their order, without agent and plan.

The parent (root) writes the maps, the builder sends the namespaces' descriptors and ends.
"""

import array
import os
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from children import in_child
from enclos.runtime import linux
from enclos.runtime.idmap import container_maps, image_map

UID, GID = 12345, 12346
GROUPS = (12346, 20001, 20002)
PLAIN = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
NAMESPACES = {
    "user": linux.CLONE_NEWUSER,
    "mnt": linux.CLONE_NEWNS,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
APPLETS = ["sh", "ls", "id", "cat", "touch", "mkdir", "rm", "hostname", "grep", "unshare", "mount", "stat"]
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
SHOW_IDS = '#include <stdio.h>\n#include <unistd.h>\nint main(void) { printf("%d %d\\n", getuid(), geteuid()); }\n'


def make_image(folder: Path) -> Path:
    """A squashfs file of root's, with busybox, a setuid program and a directory to be removed."""
    tree = folder / "tree"
    for name in ["bin", "etc/lower", "proc", "sys", "dev", "tmp", "mnt"]:
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    source = folder / "ids.c"
    source.write_text(SHOW_IDS)
    subprocess.run(["cc", "-static", "-o", tree / "bin/setuid", source], check=True)
    (tree / "bin/setuid").chmod(0o4755)
    (tree / "etc/lower/file").write_text("of the image\n")
    target = folder / "image.sqsh"
    command = ["mksquashfs", str(tree), str(target), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


@dataclass
class Container:
    """Namespaces of a container that nobody is in."""

    descriptors: dict[str, int]
    extra: list[int] = field(default_factory=list)

    def close(self) -> None:
        for fd in [*self.descriptors.values(), *self.extra]:
            os.close(fd)

    def join(self, privileged: bool) -> None:
        """As a task does: the user first, then the namespaces, then privileges. `privileged`: as the
        attacker who enters his own container from outside and keeps what that gives him."""
        linux.keep_capabilities_and_become(UID, GID, GROUPS, 0)
        for name, flag in NAMESPACES.items():
            linux.setns(self.descriptors[name], flag)
        os.chdir("/")
        if not privileged:
            linux.set_no_new_privileges()
            linux.drop_bounding_set(0)
            linux.set_capabilities(0, 0)

    def run(self, script: str) -> str:
        """Output of a shell script of a task; its errors are in the output too."""

        def body() -> str:
            read_fd, write_fd = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.dup2(write_fd, 1)
                os.dup2(write_fd, 2)
                self.join(privileged=False)
                os.execve("/bin/sh", ["sh", "-c", script], {"PATH": "/bin"})
            os.close(write_fd)
            with os.fdopen(read_fd) as stream:
                output = stream.read()
            os.waitpid(pid, 0)
            return output

        return in_child(body)

    def attack(self, function: Callable[[], object]) -> object:
        """The function's result, run with all capabilities over the container."""

        def body() -> object:
            self.join(privileged=True)
            return function()

        return in_child(body)


@dataclass
class Staging:
    """What root prepares, in `folder`. The dictionaries are target below /mnt: source on the node."""

    image: Path
    folder: Path
    binds: dict[str, str]
    site_binds: dict[str, str] = field(default_factory=dict)


def build(staging: Staging) -> Container:
    """Fork a builder, write its maps, take its descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _builder(staging, theirs)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    theirs.close()
    with ours:
        if ours.recv(16) != b"maps":
            os.waitpid(pid, 0)
            raise AssertionError("builder failed before its user namespace")
        maps = container_maps(UID, GID, GROUPS)
        # Denied before the gid map: afterwards it could not be.
        for name, text in (("setgroups", "deny"), ("uid_map", maps.uid_map), ("gid_map", maps.gid_map)):
            Path(f"/proc/{pid}/{name}").write_text(text)
        ours.send(b"written")
        _, received, _, _ = socket.recv_fds(ours, 16, 16)
    os.waitpid(pid, 0)
    assert len(received) == len(NAMESPACES) + 1, "builder failed after its user namespace"
    return Container(dict(zip(NAMESPACES, received, strict=False)), received[len(NAMESPACES) :])


def _builder(staging: Staging, sock: socket.socket) -> None:
    # Root. Nothing that is mounted from here on is seen by the node.
    linux.unshare(linux.CLONE_NEWNS)
    linux.set_propagation("/", linux.MS_SLAVE | linux.MS_REC)
    mount_fd = linux.mount_filesystem("tmpfs", [("mode", "0755")])
    linux.move_mount(mount_fd, linux.AT_FDCWD, str(staging.folder))
    # Relative paths from here on: the user need not be able to reach the folder.
    os.chdir(staging.folder)
    for name in ("lower", "upper", "root", "site"):
        Path(name).mkdir()
    _stage_layers(staging.image)
    for name, source in staging.site_binds.items():
        Path("site", name).mkdir()
        site_fd = linux.clone_tree(source)
        linux.set_attributes(site_fd, set=linux.MOUNT_ATTR_RDONLY, recursive=True)
        linux.move_mount(site_fd, linux.AT_FDCWD, f"site/{name}")
    linux.unshare(linux.CLONE_NEWNET)
    netns_fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    staged = _stage_kernel_mounts()
    # The user. The kernel still lets it administer mounts, but looks paths up as the user.
    linux.keep_capabilities_and_become(UID, GID, GROUPS, linux.capability_mask(linux.CAP_SYS_ADMIN))
    linux.unshare(linux.CLONE_NEWUSER)
    sock.send(b"maps")
    sock.recv(16)
    # The user's namespaces. In this copy of the tree every mount is locked: what is cloned from here on
    # stays read-only, and does not show what it covers, whatever the user does in his container.
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    binds = {target: linux.clone_tree(source) for target, source in staging.binds.items()}
    for name in staging.site_binds:
        binds[name] = linux.clone_tree(f"site/{name}")
    _enter_overlay()
    staged.append(("/dev/mqueue", linux.mount_filesystem("mqueue", [], PLAIN)))
    root_fd = os.open("/", os.O_PATH)
    for target, fd in staged:
        _place(root_fd, fd, target)
    for target, fd in binds.items():
        Path("/mnt", target).mkdir()
        _place(root_fd, fd, f"/mnt/{target}")
    socket.sethostname("boxed")
    own = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    payload = array.array("i", [*own, netns_fd])
    sock.sendmsg([b"done"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)])
    os._exit(0)


def _stage_layers(image: Path) -> None:
    file_fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    loop_fd, device = linux.loop_attach(file_fd, image.name)
    options = [("source", device), ("ro", None)]
    lower_fd = linux.mount_filesystem("squashfs", options, PLAIN | linux.MOUNT_ATTR_RDONLY)
    os.close(loop_fd)
    userns_fd = linux.userns_with_map(image_map(UID), image_map(GID))
    linux.set_attributes(lower_fd, userns_fd=userns_fd)
    linux.move_mount(lower_fd, linux.AT_FDCWD, "lower")
    options = [("mode", "0755"), ("size", "16M"), ("uid", str(UID)), ("gid", str(GID))]
    upper_fd = linux.mount_filesystem("tmpfs", options, PLAIN)
    linux.move_mount(upper_fd, linux.AT_FDCWD, "upper")
    for name in ("upper/data", "upper/work"):
        Path(name).mkdir()
        os.chown(name, UID, GID)


def _stage_kernel_mounts() -> list[tuple[str, int]]:
    """What only root may mount: (target, mount). A parent comes before what is mounted below it."""
    quiet = PLAIN | linux.MOUNT_ATTR_NOEXEC
    dev_attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC
    dev_fd = linux.mount_filesystem("tmpfs", [("mode", "0755"), ("size", "64k")], dev_attributes)
    for name, (major, minor) in DEVICES.items():
        os.mknod(name, 0o020666, os.makedev(major, minor), dir_fd=dev_fd)
        os.chmod(name, 0o666, dir_fd=dev_fd)
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(name, dir_fd=dev_fd)
    os.symlink("pts/ptmx", "ptmx", dir_fd=dev_fd)
    pts_options = [("mode", "620"), ("gid", "5"), ("ptmxmode", "0666")]
    return [
        ("/proc", linux.mount_filesystem("proc", [("hidepid", "invisible")], quiet)),
        ("/sys", linux.mount_filesystem("sysfs", [], quiet | linux.MOUNT_ATTR_RDONLY)),
        ("/dev", dev_fd),
        ("/dev/pts", linux.mount_filesystem("devpts", pts_options, dev_attributes)),
        ("/dev/shm", linux.mount_filesystem("tmpfs", [("mode", "1777"), ("size", "50%")], PLAIN)),
    ]


def _enter_overlay() -> None:
    options = [
        ("source", "enclos"),
        ("lowerdir", "lower"),
        ("upperdir", "upper/data"),
        ("workdir", "upper/work"),
        ("userxattr", None),
    ]
    root_fd = linux.mount_filesystem("overlay", options, PLAIN)
    linux.move_mount(root_fd, linux.AT_FDCWD, "root")
    linux.enter_root(root_fd)
    os.close(root_fd)


def _place(root_fd: int, mount_fd: int, target: str) -> None:
    target_fd = linux.openat2(root_fd, target, os.O_PATH, resolve=linux.RESOLVE_IN_ROOT)
    linux.move_mount(mount_fd, target_fd)
    os.close(target_fd)
