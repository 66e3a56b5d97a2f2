"""A RoCE fabric between the nodes of a trial cluster. In a guest: tests/vm.

Each node has two cards (tests/vm/cards.py), and, as the physical function of an SR-IOV card has it, a switch for them
with VLANs, whose uplinks meet in the fabric. The site's hook puts the port of a card into the VLAN of its job.
"""

from __future__ import annotations

from enclos.runtime.cluster.cluster import Cluster
from vm import cards
from vm.cards import command

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


def plug_into(cluster: Cluster, *, cables: bool = True) -> None:
    """Give each of two nodes two cards, its switch, and the uplink to the fabric in the guest's own namespace.

    Args:
        cables: False for cards whose packets do not leave the guest (cards.plug); they are on the fabric at once.
    """
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
            cards.plug(number, cable=cables)
            give(cluster, node, number)
            if not cables:
                command("ip", "link", "set", "dev", f"sw{number}", "master", "fabric", "up")
                continue
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
