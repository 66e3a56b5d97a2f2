"""A server of NFSv4 on a cluster's submit host, and its nodes as clients: the kernel's own, with root_squash.

The server is told beforehand, by its files in /proc, what it exports to whom: no daemon of nfs-utils has to answer its
questions, nor of mount.nfs, which looks up addresses. By its network namespace each node is a client of its own.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.slurm import address4

MODULES = ("nfsd", "nfs", "nfsv4")
PLACE = "/shared/nfs"
NOBODY = 65534
CACHES = "auth.unix.ip nfsd.export nfsd.fh"
# include/uapi/linux/nfsd/export.h: INSECURE_PORT, ROOTSQUASH, ASYNC, NOSUBTREECHECK, FSID.
FLAGS = 0x2 | 0x4 | 0x10 | 0x400 | 0x2000
# The file system that clients see as the root is the one of number 0. `versions` without 3 spares it the portmapper.
START = f"""
set -eu
modprobe -q loop || true
mkdir -p "$folder"
truncate -s 128M "$folder.ext4"
mkfs.ext4 -q "$folder.ext4"
mount -o loop "$folder.ext4" "$folder"
mount --bind "$folder" {PLACE}
mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
cd /proc/fs/nfsd
echo "-3 +4 +4.1 +4.2" > versions
echo 10 > nfsv4leasetime
echo 10 > nfsv4gracetime
"""
# Whom it exports what to is told at each start: it forgets that as its last thread ends (nfsd_last_thread).
SERVE = f"""
set -eu
until=$(($(date +%s) + 1000000))
for node in $nodes; do echo "nfsd $node $until nodes" > /proc/net/rpc/auth.unix.ip/channel; done
echo "nodes $folder $until {FLAGS} {NOBODY} {NOBODY} 0" > /proc/net/rpc/nfsd.export/channel
printf 'nodes 1 \\\\x00000000 %s %s\\n' "$until" "$folder" > /proc/net/rpc/nfsd.fh/channel
cd /proc/fs/nfsd
echo tcp 2049 > portlist
echo 4 > threads
echo Y > v4_end_grace || true
"""


@dataclass(frozen=True)
class Server:
    """The server; what it exports is at PLACE on all machines."""

    cluster: Cluster

    def start(self) -> None:
        """Export a new file system, and mount it on all nodes."""
        for machine in (None, *self.cluster.nodes):
            self._run(f"mkdir -p {PLACE}", machine)
        self._run(START, folder=str(self._folder))
        self.serve()
        for node, address in self._addresses.items():
            options = f"vers=4.2,addr={address4(0)},clientaddr={address},hard,actimeo=1"
            self._run(f"mount -i -t nfs4 {address4(0)}:/ {PLACE} -o {options}", node)

    def serve(self) -> None:
        """Answer, as a server that has been started."""
        self._run(SERVE, folder=str(self._folder), nodes=" ".join(self._addresses.values()))

    @property
    def _folder(self) -> Path:
        return self.cluster.layout.state / "nfs"

    @property
    def _addresses(self) -> dict[str, str]:
        return {node: address4(index) for index, node in enumerate(self.cluster.nodes, 1)}

    def await_clients(self) -> None:
        """Wait until the nodes have found out that it is there: they ask less and less often."""
        for node in self.cluster.nodes:
            self._run(f"stat {PLACE}/. > /dev/null", node)

    def fall_silent(self) -> None:
        """Answer nothing any more, as a server that has gone; clients ask again and again."""
        self._run("echo 0 > /proc/fs/nfsd/threads")

    def stop(self) -> None:
        """Nothing of it is left."""
        self.await_clients()
        for node in self.cluster.nodes:
            self.cluster.run(f"umount -l {PLACE}", node=node)
        self.fall_silent()
        self._run(f"for of in {CACHES}; do date +%s > /proc/net/rpc/$of/flush; done; umount {PLACE} {self._folder}")

    def _run(self, script: str, node: str | None = None, **variables: str) -> None:
        done = self.cluster.run(script, node=node, env=variables)
        assert done.returncode == 0, (script, done.stderr)


def missing() -> str:
    """Why this machine cannot have a server, or ""."""
    done = subprocess.run(["modprobe", "-a", *MODULES], capture_output=True, text=True)
    return done.stderr.strip()
