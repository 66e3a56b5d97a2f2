"""Kernel features of `enclos check`, each tried in a child process that then ends.

A probe makes what a container needs in namespaces of its own, so nothing outlives it, and
raises OSError where the kernel refuses. Root's probes take the same way as the agent; a
user's start in a user namespace. Must not hold what a refusal means (check_kernel.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import zlib
from base64 import b85decode
from collections.abc import Callable
from pathlib import Path

from enclos.runtime import linux
from enclos.runtime.errors import EnclosError
from enclos.runtime.images import server

PROBE_SECONDS = 20
PROBE_VNI = 2**24 - 3
IDENTITY = "0 0 1\n"

# A squashfs file system with nothing but a root directory, gzip, 151 bytes.
_EMPTY_SQUASHFS = zlib.decompress(
    b85decode(
        "c-qS-E-YqbfB_~j$;cqcaDa)CfrSA9rbFp|DE%J_5}^EYG`bN=i!xN)N=~UbeS(42fK6Dy*g2CyCZFL4M*{<z1{SbLCzJ;Os*o0r"
    )
)

_RULES = """table inet enclos_probe {
  set peers { typeof @th,96,24 . ip saddr; }
  chain out { type filter hook output priority filter; udp dport 4789 meta skuid >= 0 drop; }
  chain in { type filter hook input priority filter; udp dport 4789 @th,96,24 . ip saddr @peers accept; }
}
"""


def refusal(probe: Callable[[], None]) -> str | None:
    """Run a probe in a child; None if it went well, else why not, as the kernel or the tool said it."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _run_and_exit(probe, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        text = pipe.read(4096).decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        ended_by = signal.Signals(os.WTERMSIG(status)).name
        return f"nothing after {PROBE_SECONDS} s" if ended_by == "SIGALRM" else f"ended by {ended_by}"
    return text.strip() or "failed" if status else None


def _run_and_exit(probe: Callable[[], None], write_fd: int) -> None:
    """In the child: never returns, and prints nothing, whatever happens."""
    status = 1
    try:
        signal.alarm(PROBE_SECONDS)
        probe()
        status = 0
    except OSError as error:
        words = os.strerror(error.errno) if error.errno else str(error)
        log = str(getattr(error, "log", "") or getattr(error, "text", "")).strip()
        os.write(write_fd, f"{words}{': ' + log if log else ''}".encode()[:4096])
    except BaseException as error:
        os.write(write_fd, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:4096])
    finally:
        os._exit(status)


def user_namespace() -> None:
    """Root: one with maps that root wrote. A user: one of his own."""
    if os.geteuid() == 0:
        os.close(linux.userns_with_map(IDENTITY, IDENTITY))
    else:
        linux.unshare(linux.CLONE_NEWUSER)


def other_namespaces() -> None:
    """All that a container has besides the user namespace."""
    _become_root_of_a_user_namespace_if_needed()
    linux.unshare(
        linux.CLONE_NEWNS
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWCGROUP
    )


def vxlan() -> None:
    """A whole job network, between this node and a peer that does not exist."""
    from enclos.netns import link, overlay
    from enclos.netns.batch import Batch
    from enclos.netns.netlink import Netlink

    _become_root_of_a_user_namespace_if_needed()
    linux.unshare(linux.CLONE_NEWNET)
    batch = Batch()
    batch.add(link.set_up(1), "lo")
    with Netlink() as session:
        session.run(batch)
    peers = (overlay.Peer(0, "a", "127.0.0.1"), overlay.Peer(1, "b", "127.0.0.2"))
    spec = overlay.OverlaySpec(
        vni=PROBE_VNI,
        port=4789,
        ifname="enclos0",
        mtu=1450,
        underlay_ifindex=1,
        local="127.0.0.1",
        index=0,
        peers=peers,
        ipv4="10.77.0.0/16",
        ipv6="fd65:6e63:6c6f::/48",
    )
    os.close(overlay.create(spec))


def nftables() -> None:
    """Rules of the kind that guard the tunnels, loaded by nft."""
    _become_root_of_a_user_namespace_if_needed()
    linux.unshare(linux.CLONE_NEWNET)
    done = subprocess.run(["nft", "-f", "-"], input=_RULES, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(0, done.stderr.strip().partition("\n")[0])


def squashfs_shown_to_a_user() -> None:
    """Mount an image through a loop device, and show it with another owner (idmapped mount); root only."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.set_propagation("/", linux.MS_REC | linux.MS_PRIVATE)
    with tempfile.TemporaryFile() as image:
        image.write(_EMPTY_SQUASHFS)
        image.write(b"\0" * (4096 - image.tell() % 4096))
        image.flush()
        device_fd, device = linux.loop_attach(image.fileno(), "enclos check")
    mounted = linux.mount_filesystem("squashfs", (("source", device), ("ro", None)), linux.MOUNT_ATTR_RDONLY)
    os.close(device_fd)
    owner = linux.userns_with_map("0 65534 1\n", "0 65534 1\n")
    # Before Linux 6.15 a detached mount cannot be cloned: attach it, in this namespace only.
    linux.move_mount(mounted, linux.AT_FDCWD, "/mnt")
    shown = linux.clone_tree("/mnt")
    linux.set_attributes(shown, linux.MOUNT_ATTR_IDMAP, userns_fd=owner)
    if os.fstat(shown).st_uid != 65534:
        raise OSError(0, "the mount shows the wrong owner")


def fuse_shown_to_a_user() -> None:
    """Mount a FUSE file system in a user namespace of root's, as for an image that a user brings; root only."""
    linux.setns(linux.userns_with_map("0 65534 1\n", "0 65534 1\n"), linux.CLONE_NEWUSER)
    linux.unshare(linux.CLONE_NEWNS)
    try:
        server.mount()
    except EnclosError as error:
        raise OSError(0, error.cause or error.what) from error


def overlay_in_a_user_namespace() -> None:
    """An overlay with userxattr on a tmpfs, mounted with no power but in a user namespace."""
    _enter_a_tmpfs_in_a_user_namespace()
    for name in ("lower", "upper", "work"):
        Path("/mnt", name).mkdir()
    directories = {"lowerdir": "/mnt/lower", "upperdir": "/mnt/upper", "workdir": "/mnt/work"}
    options = (*directories.items(), ("userxattr", None))
    os.close(linux.mount_filesystem("overlay", options))


def user_attributes_of_tmpfs() -> None:
    """What overlayfs with userxattr needs on its upper layer, to say that a new directory hides a lower one."""
    _enter_a_tmpfs_in_a_user_namespace()
    os.setxattr("/mnt", "user.enclos", b"y")


def _enter_a_tmpfs_in_a_user_namespace() -> None:
    if os.geteuid() == 0:
        linux.setns(linux.userns_with_map(IDENTITY, IDENTITY), linux.CLONE_NEWUSER)
    else:
        _become_root_of_a_user_namespace_if_needed()
    linux.unshare(linux.CLONE_NEWNS)
    linux.set_propagation("/", linux.MS_REC | linux.MS_PRIVATE)
    linux.move_mount(linux.mount_filesystem("tmpfs", ()), linux.AT_FDCWD, "/mnt")


def _become_root_of_a_user_namespace_if_needed() -> None:
    """A user has power only in a user namespace of his own; the map is the one he may write himself."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        return
    linux.unshare(linux.CLONE_NEWUSER)
    linux.set_dumpable(True)  # else /proc/self belongs to root and the maps cannot be written
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1\n")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1\n")
