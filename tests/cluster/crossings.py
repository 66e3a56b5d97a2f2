"""What a tenant tries against the RDMA device of another on the same nodes: one list for all modes.

crossingtable.py says what comes of it in which mode, and docs/security.md in words. The attacker is a user with a job
of his own, and with a shell on the node; for packets the victim helps, which nobody has to who only wants to be
attacked: if they cannot talk even so, nothing crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crossingtable import (
    ADDRESSES,
    ATTEMPTS,
    CHANGES,
    CONNECT,
    COUNTERS,
    INDEX,
    INSIDE,
    KEYS,
    NAME,
    OTHER_INDEX,
    OUTSIDE,
    OWN_CONNECTION,
    OWN_PACKETS,
    PACKETS,
    PAIRS,
)
from enclos.runtime.cluster.cluster import Cluster
from fabric import on
from shells import Said, Shells

# Where they meet, and a way around the container's own /dev.
MOUNT = "--container-mounts=/shared/meet:/meet,/dev/infiniband:/host"
PORT = 18600
# A socket that listens is in state 0A; what is left of an earlier one has another.
HEARD = f"cat /proc/net/tcp* | grep -qi ':{PORT:04x} 0*:0000 0a'"
LISTENING = f"for i in $(seq 100); do {HEARD} && break; sleep 0.2; done"


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


# Whether one of the indexes that the kernel takes is of an interface that is not in this network. Some have to be.
ELSEWHERE = """\
usable=$(indexes {device} | sed -n 's/^ok //p')
[ -n "$usable" ] || exit 0
for index in $usable; do
    interface=$(cat /sys/class/infiniband/{device}/ports/1/gid_attrs/ndevs/$index)
    [ -e "/sys/class/net/$interface" ] || exit 0
done
exit 1
"""


def _address(gid: str) -> str:
    return ".".join(str(byte) for byte in bytes.fromhex(gid.replace(":", ""))[-4:])


def succeeded(cluster: Cluster, attacker: Tenant, victim: Tenant) -> set[str]:
    """What of the list works; all of it is tried. The attacker is root in his container."""
    tried = {
        **_looks(attacker, victim),
        **_outside(cluster, attacker, victim),
        **_control(cluster, attacker, victim),
        **_connections(attacker, victim),
        PACKETS: _meet(cluster, attacker, victim, "attacker"),
        OWN_PACKETS: _meet(cluster, victim, victim, "owner"),
    }
    assert tried.keys() == ATTEMPTS
    return {name for name, works in tried.items() if works}


def _looks(attacker: Tenant, victim: Tenant) -> dict[str, bool]:
    """From the attacker's own container."""
    device = victim.device["n1"]
    tries = {
        NAME: f"ls /sys/class/infiniband | grep -qx {device} || ibv_devinfo --list | grep -qw {device}",
        ADDRESSES: f"grep -q 0000:ffff: /sys/class/infiniband/{device}/ports/1/gids/*",
        INSIDE: f"ibv_devinfo -d {device} || (exec 3<> /host/{victim.node['n1']})",
        OTHER_INDEX: ELSEWHERE.format(device=attacker.device["n1"]),
    }
    return {name: attacker.run("n1", script).status == 0 for name, script in tries.items()}


def _outside(cluster: Cluster, attacker: Tenant, victim: Tenant) -> dict[str, bool]:
    """With a shell on the node."""
    device = victim.device["n1"]
    ping = f"timeout 20 ibv_rc_pingpong -e -d {device} -g {victim.index['n1']} -n 1"
    tries = {
        COUNTERS: f"rdma statistic show link {device}/1 | grep -q sent_pkts",
        OUTSIDE: f"exec 3<> /dev/infiniband/{victim.node['n1']}",
        INDEX: f"{ping} > /dev/null & for i in 1 2 3; do sleep 1; {ping} 127.0.0.1 && exit 0; done; exit 1",
    }
    return {name: cluster.run(script, attacker.user, "n1").returncode == 0 for name, script in tries.items()}


# As himself, as root of a user namespace, and with a network namespace that is his as well.
WAYS = ("", "user", "user net")
# The kernel looks at the sender before the message. What is elsewhere is not there: an interface, processes.
REFUSALS = {"interface": {"EPERM", "ENODEV"}, "enter": {"EACCES", "ENOENT"}}


def _control(cluster: Cluster, attacker: Tenant, victim: Tenant) -> dict[str, bool]:
    """By netlink (tests/vm/netadmin.c), from the attacker's container and with a shell, while the victim is at work."""
    device, index = victim.device["n1"], victim.index["n1"]
    server = f"timeout 60 ibv_rc_pingpong -e -p {PORT} -d {device} -g {index} > /dev/null 2>&1 & {LISTENING}"
    victim.ok("n1", server)
    process = on(cluster, "n1", f"pgrep -n -u {victim.user} ibv_rc_pingpong").strip()
    number = victim.ok("n1", f"netadmin index {device}").strip()
    words = f"{number} {_interface(cluster, victim)} {process}"
    script = "set -e; "
    for way in WAYS:
        script += f"$program read {way} {number}; $program change {way} {words}; "
    inside = attacker.ok("n1", f"program=netadmin; {script}")
    outside = cluster.run(f"program=/images/netadmin; {script}", attacker.user, "n1")
    assert outside.returncode == 0, outside.stderr
    on(cluster, "n1", f"kill {process}")
    answers: dict[str, set[str]] = {}
    for line in (inside + outside.stdout).splitlines():
        what, _, answer = line.partition(" ")
        answers.setdefault(what, set()).add(answer)
    for what in CHANGES:
        assert answers[what] <= REFUSALS.get(what, {"EPERM"}) | {"ok"}, (what, answers)
    found = {what: "ok" in answers[what] for what in CHANGES}
    return found | {PAIRS: "ok" in answers["pairs"], KEYS: "ok" in answers["keys"]}


def _interface(cluster: Cluster, tenant: Tenant) -> str:
    """The index of his device's network interface, in the namespace where that is."""
    path = f"/sys/class/infiniband/{tenant.device['n1']}/ports/1/gid_attrs/ndevs/{tenant.index['n1']}"
    look = f"cat /sys/class/net/$(cat {path})/ifindex"
    inside = tenant.run("n1", look)
    return (inside.text if inside.status == 0 else on(cluster, "n1", look)).strip()


def _connections(attacker: Tenant, victim: Tenant) -> dict[str, bool]:
    """By rdma_cm, to a server of the victim's on the other node; its owner last, because that ends the server."""
    client = f"timeout 10 rping -v -c -a {victim.address['n2']} -C 1"
    victim.tell("n2", f"timeout 60 rping -v -s -a {victim.address['n2']} -C 1")
    crossed = "ping data" in attacker.run("n1", f"{client} || {client}").text
    # What fails from there works from here, at the same moment.
    own = victim.run("n1", f"for i in 1 2 3; do {client} && exit 0; done; exit 1")
    server = victim.hear("n2")
    assert (own.status == 0) == (server.status == 0), (own, server)
    return {CONNECT: crossed, OWN_CONNECTION: own.status == 0}


def _meet(cluster: Cluster, client: Tenant, server: Tenant, name: str) -> bool:
    """Verbs between two devices whose owners tell each other all that has to be known, by pipes in a shared folder."""
    folder = f"/meet/{name}"
    pipes = f"/shared{folder}/to /shared{folder}/from"
    on(cluster, "n1", f"mkdir -p /shared{folder} && rm -f {pipes} && mkfifo -m 666 {pipes}")

    def ping(tenant: Tenant, node: str) -> str:
        return f"timeout 40 ibv_rc_pingpong -e -p {PORT} -d {tenant.device[node]} -g {tenant.index[node]} -n 5"

    # Who opens which end first is what keeps both from waiting for each other. The server ends with the client.
    there = f"timeout 40 sh -c 'exec nc 127.0.0.1 {PORT} < {folder}/to > {folder}/from'"
    here = f"timeout 40 sh -c 'exec nc -l -p {PORT} > {folder}/to < {folder}/from'"
    over = f"timeout 20 sh -c ': {{}} {folder}/to'"
    server.tell("n2", f"{ping(server, 'n2')} & {LISTENING}; {there}; {over.format('<')}; sleep 1; kill $!")
    script = f"{here} & {LISTENING}; {ping(client, 'n1')} 127.0.0.1; end=$?; {over.format('>')}; exit $end"
    said = client.run("n1", script)
    server.hear("n2")
    return said.status == 0 and "5 iters" in said.text
