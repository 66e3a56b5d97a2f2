"""The RDMA cards of a guest of `vm --kernel exclusive`: network interfaces on cables, with Soft-RoCE that can move.

Card N is the interface vfN with the device rxN; the other end of its cable is swN. Runs in the guest, as root.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from enclos.netns import nldev
from enclos.netns.batch import Batch
from enclos.netns.netlink import Netlink

MODULES = ("ib_uverbs", "rdma_ucm", "udp_tunnel", "ip6_udp_tunnel")


def require() -> None:
    """Load the driver; skip where the guest has none, and say so: `tests/vm/vm --kernel exclusive` has it."""
    module = os.environ.get("ENCLOS_RXE")
    if not module:
        pytest.skip("needs a guest of `tests/vm/vm --kernel exclusive`: Soft-RoCE that can move between namespaces")
    if not Path("/sys/module/rdma_rxe").exists():
        command("modprobe", "-a", *MODULES)
        command("insmod", module)


def command(*words: str) -> str:
    """What a command prints; CalledProcessError where it fails."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def plug(number: int, *, cable: bool = True) -> None:
    """Name both ends of a card's cable, bring them up, and make its device.

    Args:
        cable: False for a pair of veth. Those end with the namespace that they are in, but no packet leaves the guest:
            qemu delivers what a cable carries by the host's clock.
    """
    if not cable:
        command("ip", "link", "add", f"sw{number}", "type", "veth", "peer", "name", f"vf{number}")
        command("ip", "link", "set", f"vf{number}", "up")
        command("ip", "link", "set", f"sw{number}", "up")
        command("rdma", "link", "add", f"rx{number}", "type", "rxe", "netdev", f"vf{number}")
        return
    for prefix, index in (("vf", 2 * number), ("sw", 2 * number + 1)):
        name = _named(f"52:54:00:00:00:{index:02x}")
        command("ip", "link", "set", name, "down")
        command("ip", "link", "set", name, "name", f"{prefix}{number}")
        command("ip", "link", "set", f"{prefix}{number}", "up")
    command("rdma", "link", "add", f"rx{number}", "type", "rxe", "netdev", f"vf{number}")


def give(number: int, pid: int, interface: str = "") -> None:
    """Both to the network namespace of a process, from the present one. The `rdma` tool knows only named namespaces."""
    command("ip", "link", "set", interface or f"vf{number}", "netns", str(pid))
    with open(f"/proc/{pid}/ns/net") as netns, Netlink(nldev.NETLINK_RDMA) as nl:
        device = next(device for device in nldev.devices(nl) if device.name == f"rx{number}")
        batch = Batch()
        batch.add(nldev.move_device(device.dev_index, netns.fileno()), device.name)
        nl.run(batch)


def unplug(number: int) -> None:
    """Remove the device; both ends stay."""
    command("rdma", "link", "delete", f"rx{number}")


def _named(mac: str) -> str:
    rows = (path for path in Path("/sys/class/net").iterdir() if (path / "address").read_text().strip() == mac)
    return next(rows).name
