"""Where strangers' bytes are handled: a process without rights, in namespaces of its own, that ends as a whole.

A sandbox is two processes. The holder (root) makes the mount, pid, ipc and uts namespaces, without the node's network
also one for that, builds a small root file system of the node's programs, and waits. The other is pid 1 in there and
becomes an unprivileged user who owns nothing, before it sees a byte: it keeps no capability, gains none by exec, and
its death is the death of everything in it. When `Sandbox.wait` returns, nothing of it runs any more.

No user namespace: this user has no capabilities to confine, and one would give him the kernel's code behind them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enclos.runtime import linux
from enclos.runtime.images.manifest import LAYER_LIMIT

Job = Callable[[socket.socket], None]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The way out, where a site has one: of the agent's environment, or of the shell in which a user pulls.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SCRATCH = (("mode", "1777"), ("size", "64m"), ("nr_inodes", "4k"))
SAFE = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
# A converter has a descriptor of each layer that it merges, of all where an image becomes one file.
DESCRIPTORS = LAYER_LIMIT + 512
DEVICES = ("null", "zero", "urandom")
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# What glibc and skopeo read beside /etc: where /etc/resolv.conf is a link into /run, its content is copied.
RESOLV_CONF = "/etc/resolv.conf"
TEXT_LIMIT = 65536


@dataclass(frozen=True, slots=True)
class Rights:
    """What a sandbox may.

    Attributes:
        uid: user and group; nobody else's process or file has it.
        network: the node's; without it not even loopback.
        memory: bytes of data a process may have (RLIMIT_DATA).
        file_bytes: largest file it may write (RLIMIT_FSIZE).
        processes: of this uid on the node, threads included.
        own: this is root of a user namespace in which nobody but its user exists; he keeps his id, and nothing else.
    """

    uid: int
    network: bool
    memory: int
    file_bytes: int
    processes: int = 256
    own: bool = False


class Sandbox:
    """One that runs, seen from the process that started it. Closed by `end`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel

    def wait(self) -> int:
        """Wait until nothing of it runs any more; 0, or 128 + the signal that ended it, or another status."""
        if self.pid == 0:
            return 0
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        """Kill what still runs, and wait for it."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                # Not SIGKILL: the holder kills what it holds, and ends when that is gone.
                os.kill(self.pid, signal.SIGTERM)
            self.wait()
        self.channel.close()


def start(name: str, job: Job, rights: Rights, work: str = "", fds: Sequence[int] = ()) -> Sandbox:
    """Start a job; it gets its end of a channel, and an exception of it is an exit status.

    Args:
        work: a directory that it sees as /work and writes to; "" for none.
        fds: descriptors that it keeps, under the same numbers.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inherited, closed = os.pipe()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mine.close()
            status = _hold(name, job, rights, work, theirs, fds)
        except BaseException as error:
            sys.stderr.write(f"enclos-import: {name}: {error!r}\n")
        finally:
            os._exit(status)
    theirs.close()
    os.close(closed)
    # Its end comes when the child has closed what it inherited: among that may be files of other sandboxes, which are
    # not finished while somebody has them open for writing.
    os.read(inherited, 1)
    os.close(inherited)
    return Sandbox(pid, mine)


def _hold(name: str, job: Job, rights: Rights, work: str, channel: socket.socket, fds: Sequence[int]) -> int:
    linux.set_parent_death_signal(signal.SIGKILL)
    # Until there is something to kill, and it is known, an order to end waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    linux.close_other_descriptors([0, 1, 2, channel.fileno(), *fds])
    namespaces = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    linux.unshare(namespaces | (0 if rights.network else linux.CLONE_NEWNET))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            _confine(name, rights, work)
            if not _hung_up(channel):
                job(channel)
            status = 0
        except BrokenPipeError:
            pass  # Whoever wanted the result is gone.
        except BaseException as error:
            _report(name, error)
        finally:
            os._exit(status)
    signal.signal(signal.SIGTERM, lambda number, frame: _kill(pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    channel.close()
    for fd in fds:
        os.close(fd)
    linux.set_name("enclos-holder")
    _, wait_status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _hung_up(channel: socket.socket) -> bool:
    """Whether the importer died before its death would have been signalled."""
    poller = select.poll()
    poller.register(channel, 0)
    return bool(poller.poll(0))


def _report(name: str, error: BaseException) -> None:
    """A bug of ours, for the agent's log; without the module `traceback`, whose files are not here."""
    place = error.__traceback__
    where = ""
    while place is not None:
        where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        place = place.tb_next
    sys.stderr.write(f"enclos-import: {name}: unexpected {error!r}{where}\n")


def _confine(name: str, rights: Rights, work: str) -> None:
    """As pid 1 of its namespace, still root: the root file system; then give up everything."""
    linux.set_parent_death_signal(signal.SIGKILL)
    os.umask(0o022)
    _enter_root(rights, work)
    os.umask(0o077)
    _limit(rights)
    linux.drop_bounding_set(0)
    if rights.own:
        linux.set_capabilities(0, 0)
    else:
        linux.keep_capabilities_and_become(rights.uid, rights.uid, (), 0)
    linux.set_no_new_privileges()
    linux.set_dumpable(False)
    linux.set_parent_death_signal(signal.SIGKILL)
    linux.set_name(f"enclos-{name}")
    proxies = {name: value for name, value in os.environ.items() if rights.network and name.upper() in PROXIES}
    os.environ.clear()
    os.environ.update(proxies)
    os.environ.update({"PATH": PATH, "HOME": "/tmp", "TMPDIR": "/tmp", "LC_ALL": "C", "XDG_RUNTIME_DIR": "/tmp"})
    os.chdir("/tmp")


def _limit(rights: Rights) -> None:
    limits = {
        resource.RLIMIT_DATA: rights.memory,
        resource.RLIMIT_FSIZE: rights.file_bytes,
        resource.RLIMIT_NPROC: rights.processes,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        # A password may be in it. With 0 a program in core_pattern still gets the dump, with 1 not (fs/coredump.c).
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _enter_root(rights: Rights, work: str) -> None:
    """The node's programs, read-only, a /tmp in memory, and the work directory: nothing else of the node is there."""
    linux.set_propagation("/", linux.MS_REC | linux.MS_PRIVATE)
    resolv_conf = _read(RESOLV_CONF) if rights.network else b""
    stage = "/run/enclos/stage" if os.path.isdir("/run/enclos/stage") else "/mnt"
    root_fd = linux.mount_filesystem("tmpfs", (("mode", "0755"), ("size", "1m")), SAFE)
    linux.move_mount(root_fd, linux.AT_FDCWD, stage)
    for directory in ("usr", "etc", "proc", "tmp", "dev", "work"):
        os.mkdir(f"{stage}/{directory}", 0o755)
    _bind("/usr", f"{stage}/usr", linux.MOUNT_ATTR_RDONLY)
    _bind("/etc", f"{stage}/etc", linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOEXEC)
    for name in MERGED:
        _same(f"/{name}", f"{stage}/{name}")
    for device in DEVICES:
        os.close(os.open(f"{stage}/dev/{device}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        _bind(f"/dev/{device}", f"{stage}/dev/{device}", nodev=False)
    place = os.path.realpath(RESOLV_CONF)
    if resolv_conf and not place.startswith("/etc/"):
        os.makedirs(os.path.dirname(stage + place), exist_ok=True)
        with open(stage + place, "wb") as file:
            file.write(resolv_conf)
    for fstype, target, options in (("proc", "proc", ()), ("tmpfs", "tmp", SCRATCH)):
        fd = linux.mount_filesystem(fstype, options, SAFE | linux.MOUNT_ATTR_NOEXEC)
        linux.move_mount(fd, linux.AT_FDCWD, f"{stage}/{target}")
        os.close(fd)
    if work:
        _bind(work, f"{stage}/work", linux.MOUNT_ATTR_NOEXEC)
    linux.enter_root(root_fd)
    linux.set_attributes(root_fd, linux.MOUNT_ATTR_RDONLY)
    os.close(root_fd)


def _bind(source: str, target: str, attributes: int = 0, *, nodev: bool = True) -> None:
    fd = linux.clone_tree(source)
    attributes |= linux.MOUNT_ATTR_NOSUID | (linux.MOUNT_ATTR_NODEV if nodev else 0)
    linux.set_attributes(fd, attributes, recursive=True)
    linux.move_mount(fd, linux.AT_FDCWD, target)
    os.close(fd)


def _same(source: str, target: str) -> None:
    """/bin and its like: links into /usr today, directories on older systems."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target)
        _bind(source, target, linux.MOUNT_ATTR_RDONLY)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(TEXT_LIMIT)
    except OSError:
        return b""
