"""What a tenant tries against the RDMA device of another on the same nodes: one list for all modes.

docs/security.md says what comes of it in which mode. The attacker is a user with a job of his own, and with a shell on
the node; for packets the victim helps, which nobody has to who only wants to be attacked: if they cannot talk even so,
nothing crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from enclos.runtime.cluster.cluster import Cluster
from fabric import on
from shells import Said, Shells

# Where they meet, and a way around the container's own /dev.
MOUNT = "--container-mounts=/shared/meet:/meet,/dev/infiniband:/host"
PORT = 18600
NAME, ADDRESSES, COUNTERS = "see its name", "read its addresses", "read its counters"
INSIDE, OUTSIDE = "open it in a container", "open it outside of containers"
INDEX, CHANGE = "use its address index", "change it"
CONNECT, PACKETS = "connect to it", "send packets to it"
# What has to work for its owner, at the same moment and by the same programs.
OWN_CONNECTION, OWN_PACKETS = "its owner connects to it", "its owner sends packets to it"


@dataclass(slots=True)
class Tenant:
    """A user with one device in a container on n1 and one on n2, by the nodes' names."""

    user: str
    shells: Mapping[str, Shells]
    device: Mapping[str, str] = field(init=False)
    node: Mapping[str, str] = field(init=False)
    index: Mapping[str, int] = field(init=False)
    address: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        rows = {node: self.ok(node, LOOK).split() for node in ("n1", "n2")}
        self.node = {node: row[0] for node, row in rows.items()}
        self.device = {node: row[1] for node, row in rows.items()}
        self.index = {node: int(row[2]) for node, row in rows.items()}
        self.address = {node: _address(row[3]) for node, row in rows.items()}

    def tell(self, node: str, script: str) -> None:
        """See Shells."""
        self.shells[node].tell(node, script)

    def hear(self, node: str) -> Said:
        """See Shells."""
        return self.shells[node].hear(node)

    def run(self, node: str, script: str) -> Said:
        """See Shells."""
        return self.shells[node].run(node, script)

    def ok(self, node: str, script: str) -> str:
        """See Shells."""
        return self.shells[node].ok(node, script)


# The only device whose node is here, its first address of IPv4, and that one's index.
LOOK = """\
node=$(basename /dev/infiniband/uverbs*)
device=$(cat /sys/class/infiniband_verbs/$node/ibdev)
gids=/sys/class/infiniband/$device/ports/1/gids
index=$(grep -l 0000:ffff: $gids/* | head -n 1)
echo $node $device ${index##*/} $(cat $index)
"""


def _address(gid: str) -> str:
    return ".".join(str(byte) for byte in bytes.fromhex(gid.replace(":", ""))[-4:])


def succeeded(cluster: Cluster, attacker: Tenant, victim: Tenant) -> set[str]:
    """What of the list works."""
    found = {
        *_looks(attacker, victim),
        *_outside(cluster, attacker, victim),
        *_connections(attacker, victim),
    }
    for client, name in ((attacker, PACKETS), (victim, OWN_PACKETS)):
        found |= {name} if _meet(cluster, client, victim, name.split()[0]) else set()
    return found


def _looks(attacker: Tenant, victim: Tenant) -> set[str]:
    """From the attacker's own container."""
    device = victim.device["n1"]
    tries = {
        NAME: f"ls /sys/class/infiniband | grep -qx {device} || ibv_devinfo --list | grep -qw {device}",
        ADDRESSES: f"grep -q 0000:ffff: /sys/class/infiniband/{device}/ports/1/gids/*",
        INSIDE: f"ibv_devinfo -d {device} || (exec 3<> /host/{victim.node['n1']})",
    }
    return {name for name, script in tries.items() if attacker.run("n1", script).status == 0}


def _outside(cluster: Cluster, attacker: Tenant, victim: Tenant) -> set[str]:
    """With a shell on the node."""
    device = victim.device["n1"]
    ping = f"timeout 20 ibv_rc_pingpong -e -d {device} -g {victim.index['n1']} -n 1"
    tries = {
        COUNTERS: f"rdma statistic show link {device}/1 | grep -q sent_pkts",
        OUTSIDE: f"exec 3<> /dev/infiniband/{victim.node['n1']}",
        INDEX: f"{ping} > /dev/null & for i in 1 2 3; do sleep 1; {ping} 127.0.0.1 && exit 0; done; exit 1",
        CHANGE: f"rdma dev set {device} name stolen || rdma link delete {device}",
    }
    return {name for name, script in tries.items() if cluster.run(script, attacker.user, "n1").returncode == 0}


def _connections(attacker: Tenant, victim: Tenant) -> set[str]:
    """By rdma_cm, to a server of the victim's on the other node; its owner last, because that ends the server."""
    client = f"timeout 10 rping -v -c -a {victim.address['n2']} -C 1"
    victim.tell("n2", f"timeout 60 rping -v -s -a {victim.address['n2']} -C 1")
    found = {CONNECT} if "ping data" in attacker.run("n1", f"{client} || {client}").text else set()
    # What fails from there works from here, at the same moment.
    own = victim.run("n1", f"for i in 1 2 3; do {client} && exit 0; done; exit 1")
    server = victim.hear("n2")
    if own.status == 0:
        found.add(OWN_CONNECTION)
    assert (own.status == 0) == (server.status == 0), (own, server)
    return found


def _meet(cluster: Cluster, client: Tenant, server: Tenant, name: str) -> bool:
    """Verbs between two devices whose owners tell each other all that has to be known, by pipes in a shared folder."""
    folder = f"/meet/{name}"
    pipes = f"/shared{folder}/to /shared{folder}/from"
    on(cluster, "n1", f"mkdir -p /shared{folder} && rm -f {pipes} && mkfifo -m 666 {pipes}")
    # A socket that listens is in state 0A; what is left of an earlier one has another.
    heard = f"cat /proc/net/tcp* | grep -qi ':{PORT:04x} 0*:0000 0a'"
    listening = f"for i in $(seq 100); do {heard} && break; sleep 0.2; done"

    def ping(tenant: Tenant, node: str) -> str:
        return f"timeout 40 ibv_rc_pingpong -e -p {PORT} -d {tenant.device[node]} -g {tenant.index[node]} -n 5"

    # Who opens which end first is what keeps both from waiting for each other. The server ends with the client.
    there = f"timeout 40 sh -c 'exec nc 127.0.0.1 {PORT} < {folder}/to > {folder}/from'"
    here = f"timeout 40 sh -c 'exec nc -l -p {PORT} > {folder}/to < {folder}/from'"
    over = f"timeout 20 sh -c ': {{}} {folder}/to'"
    server.tell("n2", f"{ping(server, 'n2')} & {listening}; {there}; {over.format('<')}; sleep 1; kill $!")
    script = f"{here} & {listening}; {ping(client, 'n1')} 127.0.0.1; end=$?; {over.format('>')}; exit $end"
    said = client.run("n1", script)
    server.hear("n2")
    return said.status == 0 and "5 iters" in said.text
