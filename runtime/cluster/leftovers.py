"""Count what exists on the nodes of a cluster, to see afterwards whether anything was left behind.

Reads what the kernel says (/proc, netlink tools, loop devices), never the agent's own records. Runs as root, outside
the cluster, and changes nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.nodes import enter_command

KINDS = ("net", "mnt", "user", "ipc", "uts", "cgroup")
Things = Mapping[str, int]
_NUMBER = re.compile(r"\d+")
_NUMBERED = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is, each kind counted by a name with the node in it; equal when nothing came or went."""

    processes: Things
    namespaces: Things
    descriptors: Things
    mounts: Things
    links: Things
    loops: Things
    elements: Things
    files: Things
    cgroups: Things

    def nameless(self) -> Snapshot:
        """The same without the numbers of namespaces: a daemon that was started again has others, but as many."""
        kinds: dict[str, Counter[str]] = {one.name: Counter() for one in fields(self)}
        for kind, counted in kinds.items():
            for name, number in getattr(self, kind).items():
                counted[_NUMBERED.sub("[]", name)] += number
        return Snapshot(**{kind: dict(counted) for kind, counted in kinds.items()})

    def differences(self, later: Snapshot) -> list[str]:
        """Rows such as `mounts: +1 n2 /run/enclos/…`; none when both are the same."""
        rows = []
        for one in fields(self):
            before, after = getattr(self, one.name), getattr(later, one.name)
            for name in sorted(before.keys() | after.keys()):
                change = after.get(name, 0) - before.get(name, 0)
                if change:
                    rows.append(f"{one.name}: {change:+d} {name}")
        return rows


def snapshot(cluster: Cluster) -> Snapshot:
    """Look at all nodes."""
    found: dict[str, Counter[str]] = {one.name: Counter() for one in fields(Snapshot)}
    for node in cluster.nodes:
        found["seen"] = Counter({cluster.namespaces(node)["net"]: 1})
        for pid in cluster.processes(node):
            _count_process(found, node, pid)
        own = cluster.node_pid(node)
        found["mounts"].update(f"{node} {point}" for point in _mounts(own))
        found["links"].update(f"{node} {name}" for name in _links(cluster, node))
        found["elements"].update(f"{node} {element}" for element in _elements(cluster, node))
        found["files"].update(f"{node} {path}" for path in _files(cluster.path_on(node, "/run/enclos")))
        found["cgroups"].update(f"{node} {path}" for path in _cgroups(cluster, node))
    found["loops"].update(_loops(cluster))
    return Snapshot(**{one.name: dict(found[one.name]) for one in fields(Snapshot)})


def await_same(cluster: Cluster, before: Snapshot, timeout: float = 10, *, exact: bool = True) -> list[str]:
    """Look until all is as it was, or `timeout` seconds are over; returns what still differs.

    With `exact=False` namespaces may be others, where a daemon was started again; their number counts.

    Slurm and the agent clean up after the user's command has ended, so one look right after it proves nothing.
    """
    deadline = time.monotonic() + timeout
    while True:
        now = snapshot(cluster)
        rows = before.differences(now) if exact else before.nameless().differences(now.nameless())
        if not rows or time.monotonic() > deadline:
            return rows
        time.sleep(0.05)


def _count_process(found: Mapping[str, Counter[str]], node: str, pid: int) -> None:
    """Count a process, the namespaces it is in, and those it only holds a descriptor of."""
    with _which_may_end():
        folder = Path(f"/proc/{pid}")
        name = (folder / "comm").read_text().strip()
        inside = {kind: os.readlink(folder / "ns" / kind) for kind in KINDS}
        held = {entry.path: os.readlink(entry.path) for entry in os.scandir(folder / "fd")}
        found["processes"][f"{node} {name}"] += 1
        for kind, namespace in inside.items():
            # Set, not add: a namespace counts once, however many processes are in it.
            found["namespaces"][f"{node} {namespace}"] = 1
            if kind == "mnt":
                _count_mounts(found, node, pid, namespace)
        spaces = {path: target for path, target in held.items() if target.partition(":")[0] in KINDS}
        found["descriptors"].update(f"{node} {name} {space}" for space in spaces.values())
        for path, space in {**spaces, str(folder / "ns" / "net"): inside["net"]}.items():
            _count_links(found, node, path, space)
        if name.startswith("enclos"):
            # Those of our daemons by their kind: one more after each step is a leak.
            kinds = (_NUMBER.sub("", target) for target in held.values() if target not in spaces.values())
            found["descriptors"].update(f"{node} {name} {kind}" for kind in kinds)


@contextmanager
def _which_may_end() -> Iterator[None]:
    """Around looks at a process: in the middle of its end it has no namespaces any more (EINVAL), then no files."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
            raise


def _count_mounts(found: Mapping[str, Counter[str]], node: str, pid: int, namespace: str) -> None:
    """Count the mounts of a mount namespace that some process made for itself, such as the agent's."""
    for point, number in Counter(_mounts(pid)).items():
        found["mounts"][f"{node} {namespace} {point}"] = number


def _count_links(found: Mapping[str, Counter[str]], node: str, path: str, namespace: str) -> None:
    """Count the links of a network namespace that is not the node's own: processes may be gone, links not yet."""
    if not namespace.startswith("net:") or found["seen"][namespace]:
        return
    found["seen"][namespace] = 1
    command = ["nsenter", f"--net={path}", "ip", "-j", "link"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    found["links"].update(f"{node} {namespace} {row['ifname']}" for row in json.loads(shown.stdout or "[]"))


def _mounts(pid: int) -> list[str]:
    rows = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [f"{row.split()[4]} {row.partition(' - ')[2].split()[0]}" for row in rows]


def _links(cluster: Cluster, node: str) -> list[str]:
    shown = _tool(cluster, node, ["ip", "-j", "link", "show"])
    return [row["ifname"] for row in json.loads(shown or "[]")]


def _elements(cluster: Cluster, node: str) -> list[str]:
    """Elements of all nftables sets, as text."""
    shown = json.loads(_tool(cluster, node, ["nft", "-j", "list", "ruleset"]) or '{"nftables": []}')
    found = []
    for row in shown["nftables"]:
        one = row.get("set") or row.get("map") or {}
        found += [f"{one['table']}.{one['name']} {json.dumps(element)}" for element in one.get("elem", [])]
    return found


def _tool(cluster: Cluster, node: str, command: list[str]) -> str:
    # The node's own programs: an older nft crashes on what a newer one has left in the kernel.
    words = [*enter_command(cluster.machine(node), ["--mount", "--net"]), *command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _files(folder: Path) -> Iterable[str]:
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield str((Path(parent) / name).relative_to(folder))


def _cgroups(cluster: Cluster, node: str) -> Iterable[str]:
    """Control groups that somebody made on the node below those the machine had: Slurm's for jobs, or ours."""
    for parent, folders, _ in os.walk(cluster.path_on(node, "/sys/fs/cgroup")):
        # A job's has another name by release; the two of Slurm's own stay.
        jobs = set(folders) - {"system", "slurmd"} if parent.endswith("slurmstepd.scope") else set()
        for name in folders:
            if name in jobs or name.startswith(("step_", "task_", "enclos")):
                yield str(Path(parent, name)).partition("/sys/fs/cgroup/")[2]


def _loops(cluster: Cluster) -> Iterable[str]:
    """Loop devices over files of this cluster; those of the machine's other users do not count."""
    own = {}
    for folder in (cluster.layout.images, cluster.layout.shared, cluster.layout.homes):
        for path in folder.rglob("*"):
            if not path.is_symlink() and path.is_file():
                own[path.stat().st_ino] = path
    shown = subprocess.run(
        ["losetup", "--list", "--json", "--output", "NAME,BACK-INO"], capture_output=True, text=True, check=True
    ).stdout
    for row in json.loads(shown or '{"loopdevices": []}')["loopdevices"]:
        if int(row["back-ino"] or 0) in own:
            yield str(own[int(row["back-ino"])].relative_to(cluster.layout.state))
