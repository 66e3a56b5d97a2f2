"""A RoCE fabric between the nodes of a trial cluster, and an image with what speaks verbs. In a guest: tests/vm.

Each node has two cards (tests/vm/cards.py), and, as the physical function of an SR-IOV card has it, a switch for them
with VLANs, whose uplinks meet in the fabric. The site's hook puts the port of a card into the VLAN of its job.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from enclos.runtime.cluster import image
from enclos.runtime.cluster.cluster import Cluster
from vm import cards
from vm.cards import command

PROGRAMS = ("ibv_rc_pingpong", "ibv_devinfo", "ib_write_bw", "ib_write_lat", "rping")
# What ldd does not show: the driver's user part, and what threads of rping end with.
LOADED = ("libibverbs/librxe-rdmav34.so", "libgcc_s.so.1")
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
IMAGE = "/images/verbs.sqsh"

HOOK = """\
#!/bin/sh
# A VLAN for each job: what the physical function of an SR-IOV card does with `ip link set PF vf N vlan V`.
set -eu
echo "$1 $ENCLOS_TENANT $ENCLOS_DEVICE $ENCLOS_GUID $ENCLOS_INTERFACES" >> /run/hook.log
[ ! -e /etc/enclos/hook-fails ] || { echo "the subnet manager does not answer" >&2; exit 3; }
port=sw${ENCLOS_DEVICE#rx}
vlan=$((100 + ENCLOS_VNI % 3900))
if [ "$1" = attach ]; then
    bridge vlan add dev "$port" vid "$vlan" pvid untagged
    bridge vlan del dev "$port" vid 1
    bridge vlan add dev uplink vid "$vlan"
else
    # Also where attach never came to its end.
    bridge vlan del dev "$port" vid "$vlan" 2> /dev/null || true
    bridge vlan add dev "$port" vid 1 pvid untagged
fi
"""


def plug_into(cluster: Cluster) -> None:
    """Give each of two nodes two cards, its switch, and the uplink to the fabric in the guest's own namespace."""
    cards.require()
    command("ip", "link", "add", "fabric", "type", "bridge")
    command("ip", "link", "set", "fabric", "up")
    for place, node in enumerate(cluster.nodes[:2]):
        pid = str(cluster.node_pid(node))
        command("ip", "link", "add", f"fabric{place}", "type", "veth", "peer", "name", "uplink", "netns", pid)
        command("ip", "link", "set", "dev", f"fabric{place}", "master", "fabric", "up")
        on(cluster, node, "ip link add pf type bridge vlan_filtering 1")
        on(cluster, node, "ip link set dev pf up; ip link set dev uplink master pf up")
        for number in (2 * place, 2 * place + 1):
            cards.plug(number)
            give(cluster, node, number)
            command("ip", "link", "set", f"sw{number}", "netns", pid)
            on(cluster, node, f"ip link set dev sw{number} master pf up")
        hook = cluster.layout.node_etc(node) / "hook"
        hook.write_text(HOOK)
        hook.chmod(0o755)


def give(cluster: Cluster, node: str, number: int) -> None:
    """A card for a node: the initial namespace is nobody's here, where on a real node it is the agent's."""
    cards.give(number, cluster.node_pid(node))
    on(cluster, node, f"ip link set vf{number} up")


def on(cluster: Cluster, node: str, script: str) -> str:
    done = cluster.run(script, node=node)
    assert done.returncode == 0, (script, done.stderr)
    return done.stdout


def make_image(images: Path) -> None:
    """The trial image with verbs: programs, and the driver's user part."""
    made = image.make("openmpi")
    root = images / "verbs"
    subprocess.run(["cp", "-a", str(made.directory), str(root)], check=True)
    programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name))]
    assert len(programs) == len(PROGRAMS), "`make deps` installs what is missing"
    wanted = [*programs, *(LIBRARIES / name for name in LOADED)]
    add_driver(root, [*wanted, *(library for path in wanted for library in image.libraries(path))])
    squashed = str(images / "verbs.sqsh")
    options = ["-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run(["mksquashfs", str(root), squashed, *options], check=True, stdout=subprocess.DEVNULL)


def add_driver(root: Path, files: list[Path]) -> None:
    """Put files of this machine into an image, among them the driver's user part, and say that it is there."""
    for path in files:
        target = root / path.parent.resolve().relative_to("/") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy(path, target)
    (root / "etc/libibverbs.d").mkdir()
    (root / "etc/libibverbs.d/rxe.driver").write_text("driver rxe\n")
