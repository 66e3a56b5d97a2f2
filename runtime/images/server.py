"""The server of an image that a user brought: squashfuse, as that user, behind a FUSE mount that root makes.

The kernel parses none of the file: it asks squashfuse, which has its user's rights and none beyond. A task of the
zygote, because it serves as long as the container lives: it dies neither with the builder nor with the agent. It ends
with the last reference to its mount, or by the agent's signal at the step's end.

The task itself is its guardian, which is root's: the agent knows that one, and with it ends squashfuse. Its user may
stop squashfuse with SIGSTOP. The tasks that wait for an answer would then take no signal, slurmstepd could not end
them, and Slurm would drain the node: the kernel tells a parent that its child has stopped, and the guardian kills it.

The file system belongs to the user namespace that maps 0 to the user, so that files which are root's in the image are
his, whatever squashfuse says. Root owns that namespace: unlike his other processes the user can't trace this one.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import stat

from enclos.runtime import errors, linux
from enclos.runtime.idmap import image_map
from enclos.runtime.protocol import Message, send

PROGRAMS = ("squashfuse_ll", "squashfuse")
# It caches some blocks of at most 1 MiB for each of ten threads; a crafted file could make it want more.
MEMORY_BYTES = 512 << 20
IMAGE_FD, FUSE_FD = 3, 4
# Slurm's signals are not for it, and a broken pipe is no reason to end.
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE, signal.SIGTSTP)


def run(channel: socket.socket, request: Message) -> int:
    """The task `serve`: `uid`, `gid`, each `group`, `offset` in bytes, `hide` (the agent's directory of mounts).

    Its descriptors are the image, open as its user, and the user namespace that maps 0 to him, if there is one. It
    answers with the mount, attached nowhere, a pipe from which squashfuse's complaints can be read, and that
    namespace if it had to be made. The channel is closed when squashfuse has begun.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Here, so that the guardian does not keep others' images mounted either.
    _leave(request.get("hide"))
    guardian = os.getpid()
    pid = os.fork()
    if pid == 0:
        return _serve(channel, request, guardian)
    # The device above all: when squashfuse dies, the last descriptor of it has to be closed.
    linux.close_other_descriptors([0, 1, 2])
    channel.detach()
    request.take_fds()
    _guard(pid)
    return 0


def _guard(pid: int) -> None:
    """Wait for the end of squashfuse, which has to come as soon as it stops."""
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return
        os.kill(pid, signal.SIGKILL)


def _serve(channel: socket.socket, request: Message, guardian: int) -> int:
    image_fd, *idmap_fds = request.take_fds()
    try:
        program = find_program()
        made = [] if idmap_fds else [_make_idmap(request.number("uid"), request.number("gid"))]
        os.chdir("/")
        os.setgroups([int(group) for group in request.all("group")])
        linux.setns((idmap_fds or made)[0], linux.CLONE_NEWUSER)
        linux.unshare(linux.CLONE_NEWNS)  # One in which that user namespace has the power to mount.
        fuse_fd, mount_fd = mount()
    except errors.EnclosError as error:
        parts = [("subject", error.subject), ("what", error.what), ("cause", error.cause), ("hint", error.hint)]
        send(channel, [("state", "error"), *parts])
        return 1
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _become_user()
    # Not before: a change of the user takes it back.
    linux.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != guardian:
        return 1
    send(channel, [("state", "serving")], [mount_fd, read_fd, *made])
    _execute(program, image_fd, fuse_fd, write_fd, request.number("offset"))
    return 1


def _make_idmap(uid: int, gid: int) -> int:
    try:
        return linux.userns_with_map(image_map(uid), image_map(gid))
    except OSError as error:
        raise errors.userns_forbidden(errors.reason(error.errno or 0)) from error


def find_program() -> str:
    """squashfuse on the search path of the agent, which is root's."""
    for name in PROGRAMS:
        for directory in os.get_exec_path():
            path = os.path.join(directory, name)
            if os.access(path, os.X_OK):
                return path
    raise errors.image_server_missing()


def _leave(hide: str) -> None:
    """Go to a mount namespace without the images of others: this would keep them mounted as long as it lives."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.unmount(hide)


def mount() -> tuple[int, int]:
    """The device on which squashfuse is asked, and the mounted file system; ids are those of the namespace."""
    try:
        fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = (
            ("source", "squashfuse"),
            ("subtype", "squashfuse"),
            ("fd", str(fuse_fd)),
            ("rootmode", f"{stat.S_IFDIR:o}"),
            ("user_id", "0"),
            ("group_id", "0"),
            ("default_permissions", None),
            ("ro", None),
        )
        attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_RDONLY
        return fuse_fd, linux.mount_filesystem("fuse", options, attributes)
    except OSError as error:
        raise errors.image_fuse_failed(error.errno or 0) from error


def _become_user() -> None:
    """Become the user for good: 0 in this namespace. His groups were set outside, where they have numbers."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    linux.drop_bounding_set(0)
    linux.set_capabilities(0, 0)
    linux.set_no_new_privileges()
    linux.set_dumpable(False)


def _execute(program: str, image_fd: int, fuse_fd: int, errors_fd: int, offset: int) -> None:
    """Become squashfuse, with no descriptor but the image, the FUSE device and a pipe for its complaints."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null_fd = os.open("/dev/null", os.O_RDWR)
    # First above the numbers that they are about to get.
    image_fd, fuse_fd, errors_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (image_fd, fuse_fd, errors_fd))
    for fd, place in ((null_fd, 0), (null_fd, 1), (errors_fd, 2), (image_fd, IMAGE_FD), (fuse_fd, FUSE_FD)):
        os.dup2(fd, place)
    linux.close_other_descriptors([0, 1, 2, IMAGE_FD, FUSE_FD])
    # libfuse takes /dev/fd/N for a device that is mounted already.
    command = [program, "-f", "-o", f"offset={offset}", f"/proc/self/fd/{IMAGE_FD}", f"/dev/fd/{FUSE_FD}"]
    os.execve(program, command, {"PATH": "/usr/bin:/bin", "LC_ALL": "C"})
