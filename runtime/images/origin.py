"""Whose word it is that a file belongs to root: of a file system that root mounted, or of a user's own program.

Looks at the kernel's table of mounts only. Runs in a builder, as root.
"""

from __future__ import annotations


def vouched_for_by_user(fd: int) -> bool:
    """Is the open file on a FUSE file system that a user mounted (fusermount)? It tells any owner and mode he likes.

    Where such a file system is open to others (`user_allow_other` in /etc/fuse.conf), the kernel would otherwise
    parse what he serves. A file on a mount that this mount namespace does not have counts as his, too.
    """
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
        number = _mount_number(file.read(4096))
    with open("/proc/self/mountinfo", "rb") as file:
        return is_users_mount(file.read(), number)


def _mount_number(fdinfo: bytes) -> int:
    return next(int(line.split()[1]) for line in fdinfo.splitlines() if line.startswith(b"mnt_id:"))


def is_users_mount(mountinfo: bytes, number: int) -> bool:
    """Decide by the text of /proc/PID/mountinfo (proc_pid_mountinfo(5)): `ID … - FSTYPE SOURCE SUPEROPTIONS`."""
    begin = (b"\n" + mountinfo).find(b"\n%d " % number)
    if begin < 0:
        return True
    line = mountinfo[begin:].split(b"\n", 1)[0]
    # Spaces in names are escaped, so the first lone dash is the separator.
    fstype, _, options = line.split(b" - ", 1)[1].split(b" ", 2)
    if fstype.partition(b".")[0] not in (b"fuse", b"fuseblk"):
        return False
    return b"user_id=0" not in options.split(b",")
