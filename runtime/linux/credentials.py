"""What this process may: ids, capabilities, and the flags that prctl(2) sets. Of the calling thread only.

Made for processes with one thread, as builders are.
"""

import errno
from collections.abc import Sequence

from enclos.runtime.linux._linux import ffi, lib
from enclos.runtime.linux.constants import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_GET_DUMPABLE,
    PR_SET_DUMPABLE,
    PR_SET_NAME,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
)
from enclos.runtime.linux.failure import check

SOCK_FILTER_BYTES = 8
CAPABILITY_BITS = 64


def set_filesystem_ids(uid: int, gid: int) -> None:
    """setfsuid and setfsgid, read back: EPERM if the kernel left them as they were.

    The kernel then looks files up as this user. Leaving uid 0 also lowers the effective file
    capabilities (CAP_DAC_OVERRIDE and its like), and going back to 0 raises them again. Supplementary
    groups stay the caller's. It makes the process undumpable, which going back does not undo.
    """
    check(lib.enclos_set_filesystem_ids(uid, gid), f"uid {uid} gid {gid}")


def keep_capabilities_and_become(uid: int, gid: int, groups: Sequence[int], capabilities: int) -> None:
    """Take a user's ids for good, with exactly this mask of capabilities kept, effective and permitted.

    The process is not dumpable afterwards: it would show its memory to that user. The signal of the
    parent's death is forgotten by the kernel here, and has to be set again.
    """
    array = ffi.new("uint32_t[]", list(groups)) if groups else ffi.NULL
    check(lib.enclos_become(uid, gid, array, len(groups), capabilities), f"uid {uid} gid {gid}")


def set_capabilities(effective: int, permitted: int, inheritable: int = 0) -> None:
    """capset(2), of masks. Ambient ones that are no longer permitted and inheritable fall away."""
    check(lib.enclos_capset(effective, permitted, inheritable), "capabilities")


def get_capabilities() -> tuple[int, int, int]:
    """Effective, permitted and inheritable masks."""
    words = [ffi.new("uint64_t *") for _ in range(3)]
    check(lib.enclos_capget(*words), "capabilities")
    effective, permitted, inheritable = (int(word[0]) for word in words)
    return effective, permitted, inheritable


def drop_bounding_set(keep: int) -> None:
    """Take all capabilities out of the bounding set but this mask, and all out of the ambient set.

    After the last setns(CLONE_NEWUSER): that fills the set again.
    """
    for bit in range(CAPABILITY_BITS):
        held = lib.enclos_prctl(PR_CAPBSET_READ, bit, 0, 0, 0)
        if held < 0:  # EINVAL: the kernel's last capability was the one before
            break
        if held and not keep >> bit & 1:
            check(lib.enclos_prctl(PR_CAPBSET_DROP, bit, 0, 0, 0), f"capability {bit}")
    check(lib.enclos_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient capabilities")


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same uid may look into this one (and whether it may dump core)."""
    check(lib.enclos_prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "dumpable flag")


def get_dumpable() -> int:
    """0 not, 1 dumpable, 2 only for root."""
    return check(lib.enclos_prctl(PR_GET_DUMPABLE, 0, 0, 0, 0), "dumpable flag")


def set_parent_death_signal(signal: int) -> None:
    """Get this signal when the parent *thread* ends. A change of uid clears it: set it again after.

    If the parent may have ended before, compare os.getppid() afterwards.
    """
    check(lib.enclos_prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "parent death signal")


def set_no_new_privileges() -> None:
    """From here on no exec gives privileges: setuid bits and file capabilities do nothing. For good."""
    check(lib.enclos_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_name(name: str) -> None:
    """The name in ps and top; the kernel keeps 15 bytes of it."""
    buffer = ffi.new("char[]", name.encode()[:15])
    check(lib.enclos_prctl(PR_SET_NAME, int(ffi.cast("uintptr_t", buffer)), 0, 0, 0), name)


def new_session_keyring() -> None:
    """Leave the session keyring that was inherited, with the keys in it, for an empty one.

    A kernel without keyrings, or a filter that forbids them, leaves nothing to leave.
    """
    try:
        check(lib.enclos_new_session_keyring(), "session keyring")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise


def peer_groups(socket_fd: int, most: int) -> list[int]:
    """Supplementary groups of a unix socket's peer as it had them when it connected (SO_PEERGROUPS).

    Raises OSError: ERANGE where there are more than `most`.
    """
    groups = ffi.new("uint32_t[]", most)
    count = check(lib.enclos_peer_groups(socket_fd, groups, most), "groups of the peer")
    return [int(groups[index]) for index in range(count)]


def install_seccomp_filter(program: bytes) -> None:
    """Filter this thread's system calls from here on, for good. Needs no_new_privs or CAP_SYS_ADMIN.

    Args:
        program: an array of struct sock_filter, as seccomp.py makes it.
    """
    if len(program) % SOCK_FILTER_BYTES:
        raise ValueError(f"{len(program)} bytes are no whole number of struct sock_filter")
    buffer = ffi.from_buffer(program)
    check(lib.enclos_seccomp(buffer, len(program) // SOCK_FILTER_BYTES), "seccomp filter")
