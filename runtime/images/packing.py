"""A container's root as a squashfs file, for --container-save: three processes of the user's, forks of the zygote.

The first one stands outside, with the user's ids and no right to files but his: it opens the directory of the target,
waits for the others and gives the finished file its name. The second is tar2sqfs, the node's. The third enters the
container, takes a copy of its root mount without what is mounted below, and writes its files into the pipe between the
two. So the file is the user's in every way, and neither root nor the kernel reads what he wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from enclos.runtime import errors, linux
from enclos.runtime.asuser import open_as_user
from enclos.runtime.images import tar
from enclos.runtime.linux import AT_FDCWD, CAP_SYS_ADMIN, CLONE_NEWNS, CLONE_NEWUSER
from enclos.runtime.operations.assembly import forbid_imports
from enclos.runtime.protocol import Message, send

# Their contents are the node's or the kernel's, or meant for one step.
EMPTIED = (b"proc", b"sys", b"dev", b"tmp", b"run")
# What the node writes into each container.
NODES_FILES = (b"etc/resolv.conf", b"etc/hosts", b"etc/hostname")
COMPRESSION = "zstd"
COMPLAINT_BYTES = 4096
MOST_NAMED = 5
COPY_BYTES = 1 << 20


def run(channel: socket.socket, request: Message) -> int:
    """The task `save`: `uid`, `gid`, each `group`, `path` (absolute); `only=check` to look at the target and no more.

    Its descriptors are the mount namespace in which the path is meant, and the container's user and mount namespaces.
    It answers `done`, with each `warning`, or `error`.
    """
    outside_fd, *container_fds = request.take_fds()
    user_fd, mounts_fd = container_fds or (-1, -1)
    path = request.get("path")
    linux.setns(outside_fd, CLONE_NEWNS)
    groups = [int(group) for group in request.all("group")]
    linux.keep_capabilities_and_become(request.number("uid"), request.number("gid"), groups, 1 << CAP_SYS_ADMIN)
    linux.set_dumpable(False)
    linux.set_parent_death_signal(signal.SIGKILL)
    try:
        warnings = _save(path, user_fd, mounts_fd) if request.get("only") != "check" else check_target(path)
    except OSError as error:
        # Not as it was raised: where the disk is full, tar2sqfs only says so.
        failure = errors.save_failed(path, errors.reason(error.errno) if error.errno else str(error.strerror))
        send(channel, [("state", "error"), ("subject", failure.subject), ("what", failure.what),
                       ("cause", failure.cause), ("hint", failure.hint)])  # fmt: skip
        return 1
    send(channel, [("state", "done"), *(("warning", text) for text in warnings)])
    return 0


def check_target(path: str) -> list[str]:
    """Can this process make a file there? As the user; raises OSError."""
    os.close(_open_directory(path))
    return []


def _open_directory(path: str) -> int:
    directory, name = os.path.split(path)
    fd = open_as_user(directory or "/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), directory)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _temporary(directory_fd: int, name: str) -> Iterator[tuple[int, str]]:
    """A file in the directory of the target, under another name until it is whole; "" where it has none at all."""
    hidden = f".{name[:200]}.{os.getpid()}.enclos"
    umask = os.umask(0)
    os.umask(umask)
    mode = 0o666 & ~umask
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=directory_fd)
        made = ""
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(hidden, flags, mode, dir_fd=directory_fd)
        made = hidden
    try:
        yield fd, made
    except BaseException:
        if made:
            os.unlink(made, dir_fd=directory_fd)
        raise
    finally:
        os.close(fd)


def _save(path: str, user_fd: int, mounts_fd: int) -> list[str]:
    directory_fd = _open_directory(path)
    name = os.path.basename(path)
    with _temporary(directory_fd, name) as (fd, made):
        warnings = _fill(fd, user_fd, mounts_fd)
        os.fsync(fd)
        hidden = made or f".{name[:200]}.{os.getpid()}.enclos"
        if not made:
            os.link(f"/proc/self/fd/{fd}", hidden, dst_dir_fd=directory_fd, follow_symlinks=True)
        try:
            os.rename(hidden, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError:
            if not made:
                os.unlink(hidden, dir_fd=directory_fd)
            raise
    os.close(directory_fd)
    return warnings


def _fill(fd: int, user_fd: int, mounts_fd: int) -> list[str]:
    """Run the two others; returns what had to be left out."""
    source_fd, sink_fd = os.pipe2(os.O_CLOEXEC)
    said_fd, says_fd = os.pipe2(os.O_CLOEXEC)
    left_fd, leaves_fd = os.pipe2(os.O_CLOEXEC)
    packer = os.fork()
    if packer == 0:
        _pack(fd, source_fd, says_fd)
    reader = os.fork()
    if reader == 0:
        os.close(source_fd)
        _read(user_fd, mounts_fd, sink_fd, leaves_fd)
    for own in (source_fd, sink_fd, says_fd, leaves_fd):
        os.close(own)
    with open(said_fd, "rb") as said, open(left_fd, "rb") as left:
        # Both end with their writers. What is beyond is thrown away, so that nobody waits for a full pipe.
        warnings = left.read().decode("utf-8", "surrogateescape").splitlines()
        complaints = said.read()[:COMPLAINT_BYTES].decode("utf-8", "replace").strip().splitlines()
    reader_status, packer_status = (os.waitpid(pid, 0)[1] for pid in (reader, packer))
    if reader_status != 0:
        text = warnings[-1] if warnings else "the process that reads the container ended"
        raise OSError(0, text)
    if packer_status != 0:
        space = os.fstatvfs(fd)
        if space.f_bavail == 0:
            raise OSError(0, "no space left on device")
        raise OSError(0, complaints[-1] if complaints else "tar2sqfs ended")
    return warnings


def _pack(fd: int, source_fd: int, says_fd: int) -> None:
    """Become tar2sqfs, with nothing but the user's rights."""
    status = 1
    try:
        linux.set_capabilities(0, 0)
        linux.set_no_new_privileges()
        null_fd = os.open("/dev/null", os.O_WRONLY)
        os.dup2(source_fd, 0)
        os.dup2(null_fd, 1)
        os.dup2(says_fd, 2)
        os.dup2(fd, 3)
        linux.close_other_descriptors([0, 1, 2, 3])
        command = ["tar2sqfs", "-q", "-s", "-f", "-x", "-j", "2", "-c", COMPRESSION, "/proc/self/fd/3"]
        os.execvpe("tar2sqfs", command, {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"})
    except OSError as error:
        os.write(2, f"tar2sqfs: {error.strerror}\n".encode())
    finally:
        os._exit(status)


def _read(user_fd: int, mounts_fd: int, sink_fd: int, leaves_fd: int) -> None:
    """Enter the container and write its files as a tar archive; the last line on `leaves_fd` says why it failed."""
    status = 1
    try:
        linux.set_parent_death_signal(signal.SIGKILL)
        forbid_imports()
        linux.setns(user_fd, CLONE_NEWUSER)
        linux.setns(mounts_fd, CLONE_NEWNS)
        root_fd = linux.clone_tree("/", AT_FDCWD, recursive=False)
        with open(sink_fd, "wb", COPY_BYTES) as sink:
            writer = _Writer(sink.write)
            writer.directory(root_fd, b"")
            sink.write(bytes(2 * tar.BLOCK))
        if writer.left_out:
            more = f" and {len(writer.left_out) - MOST_NAMED} more" if len(writer.left_out) > MOST_NAMED else ""
            named = ", ".join(errors.printable(text) for text in writer.left_out[:MOST_NAMED])
            os.write(leaves_fd, f"could not be read and is left out: {named}{more}\n".encode("utf-8", "replace"))
        status = 0
    except BrokenPipeError:
        status = 0  # tar2sqfs ended, and says why.
    except OSError as error:
        place = errors.printable(str(error.filename or ""))
        os.write(leaves_fd, f"{place}: {errors.reason(error.errno or 0)}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


@dataclass(slots=True)
class _Writer:
    """Walks a tree by descriptors; files that change meanwhile are cut, or filled with zeros."""

    write: tar.Write
    left_out: list[str] = field(default_factory=list)
    linked: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def directory(self, parent_fd: int, path: bytes) -> None:
        """A directory and all in it; `parent_fd` is its own descriptor where the path is empty."""
        name = os.path.basename(path) or b"."
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        except OSError:
            self.left_out.append("/" + os.fsdecode(path))
            return
        try:
            status = os.fstat(fd)
            mode = stat.S_IMODE(status.st_mode) & 0o1777
            self._header(tar.Member(path or b".", tar.DIRECTORY, mode=mode, mtime=_time(status)))
            if path not in EMPTIED:
                for entry in sorted(os.listdir(fd)):
                    self._entry(fd, os.fsencode(entry), path)
        finally:
            os.close(fd)

    def _entry(self, parent_fd: int, name: bytes, parent: bytes) -> None:
        path = parent + b"/" + name if parent else name
        try:
            status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            self.directory(parent_fd, path)
            return
        mode, time = stat.S_IMODE(status.st_mode) & 0o777, _time(status)
        if status.st_nlink > 1 and (first := self.linked.setdefault((status.st_dev, status.st_ino), path)) != path:
            self._header(tar.Member(path, tar.LINK, target=first, mode=mode, mtime=time))
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(name, dir_fd=parent_fd)
            self._header(tar.Member(path, tar.SYMLINK, target=target, mode=0o777, mtime=time))
        elif stat.S_ISFIFO(status.st_mode):
            self._header(tar.Member(path, tar.FIFO, mode=mode, mtime=time))
        elif stat.S_ISREG(status.st_mode):
            self._file(parent_fd, name, tar.Member(path, tar.FILE, status.st_size, mode, time))

    def _file(self, parent_fd: int, name: bytes, member: tar.Member) -> None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent_fd)
        except OSError:
            self.left_out.append("/" + os.fsdecode(member.name))
            return
        with open(fd, "rb", buffering=0) as file:
            if member.name in NODES_FILES:
                member.size = 0
            self._header(member)
            rest = member.size
            while rest > 0 and (piece := file.read(min(rest, COPY_BYTES))):
                self.write(piece)
                rest -= len(piece)
        while rest > 0:
            self.write(bytes(min(rest, COPY_BYTES)))
            rest -= min(rest, COPY_BYTES)
        self.write(tar.padding(member.size))

    def _header(self, member: tar.Member) -> None:
        self.write(tar.header(member))


def _time(status: os.stat_result) -> int:
    return max(0, int(status.st_mtime)) % (1 << 32)
