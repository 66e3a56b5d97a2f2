"""Machines made of namespaces: the submit host and the nodes, and the underlay that joins them.

The submit host comes first. Its pid namespace holds the whole cluster, and its network namespace holds the bridge, so
the machine that runs all this gets no link, no mount and no address; when its first process ends, the kernel ends
everything else. Each node is unshared from it with pid, network, mount, UTS and IPC namespaces of its own.

Works through util-linux and iproute2, which every Debian has. Knows nothing of Slurm. Runs as root.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster.layout import SUBMIT, Layout, project_root
from enclos.runtime.cluster.processes import Process, environment, pids
from enclos.runtime.cluster.slurm import UNDERLAY4, address4, address6

COOKIE = "ENCLOS_CLUSTER_INIT"
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid", "--cgroup")
READY_FD = 8
PROC_FD = 9

# The first process of a machine. It must end the orphans of its pid namespace: with SIGCHLD ignored the
# kernel does that by itself, so a plain `sleep` is enough. Nothing that only the host's /proc shows can be
# read later, so it tells its own pid first, through a descriptor of the host's /proc.
PROLOGUE = f"""\
set -eu
read -r stat < /proc/self/fd/{PROC_FD}/self/stat
"""
EPILOGUE = f"""\
mount -t proc -o nosuid,nodev,noexec proc /proc
# As systemd leaves it: what is mounted later appears in the namespaces of daemons and containers.
mount --make-rshared /
echo "$hostname" > /proc/sys/kernel/hostname
echo "$stat" >&{READY_FD}
exec {READY_FD}>&- {PROC_FD}<&- < /dev/null > /dev/null 2>&1
exec env -i --ignore-signal=CHLD {COOKIE}="$cookie" sleep infinity
"""

# A root file system of the cluster's own, made of the machine's. Top-level folders are the machine's, except
# those that a cluster changes: /etc is a copy, /home has the users' homes added, /run, /tmp and /dev/shm are
# empty.
OWN_ROOT = """\
mount -t tmpfs -o mode=755,size=64m enclos-root "$state/root"
cd "$state/root"
for entry in /* /.[!.]*; do
    case $entry in
    /etc|/home|/proc|/run|/tmp|/shared|/images|/lost+found) ;;
    *)  if [ -L "$entry" ]; then cp -P "$entry" ".$entry"
        elif [ -d "$entry" ]; then mkdir ".$entry"; mount --rbind "$entry" ".$entry"
        fi ;;
    esac
done
mkdir etc
cp -a /etc/. etc/
"""

# The same made of another release's root, which stays as it is below an overlay. The kernel's files are the machine's.
RELEASE_ROOT = """\
mount -t tmpfs -o mode=755,size=256m enclos-root "$state/root"
cd "$state/root"
mkdir upper work merged
mount -t overlay -o "lowerdir=$system,upperdir=$PWD/upper,workdir=$PWD/work" overlay merged
cd merged
for entry in dev sys; do mount --rbind "/$entry" "$entry"; done
mkdir -p ".$state"
mount --bind "$state" ".$state"
"""

CONTROL_ROOT = """\
mkdir -p home proc run tmp shared images .kept
chmod 1777 tmp
mkdir -p etc/enclos etc/slurm
for file in passwd group hosts; do cat "$state/$file" > "etc/$file"; done
echo "$hostname" > etc/hostname
for home in "$system"/home/* "$state"/home/*; do
    [ -d "$home" ] || continue
    mkdir -p ".$home" "home/${home##*/}"
    mount --rbind "$home" "home/${home##*/}"
done
mount --bind "$state/shared" shared
mount --bind "$state/images" images
mount --bind "$state/slurm" etc/slurm
number=0
for kept in $hidden; do
    mkdir ".kept/$number"
    mount --rbind "$kept" ".kept/$number"
    # A folder that only root may enter (as mktemp -d makes them) gets the mode of an overlay's upper layer.
    if [ "$(stat -c %a "$kept" | tail -c 2)" -lt 5 ]; then
        mkdir ".kept/upper$number" ".kept/work$number"
        layers="lowerdir=$kept,upperdir=$PWD/.kept/upper$number,workdir=$PWD/.kept/work$number"
        mount -t overlay -o "$layers" overlay ".kept/$number"
    fi
    number=$((number + 1))
done
mount --rbind /proc proc
pivot_root . .
cd /
umount -l /
"""

# What every machine has for itself. A sysfs mounted in the network namespace shows that namespace's devices,
# but hides /sys/fs/cgroup, without which slurmd does not start: that one is carried over. No other may stay below:
# slurmd 24.11 takes the first of that path in mountinfo for its own, and ends where that belongs to another cgroup
# namespace (src/plugins/cgroup/v2/cgroup_v2.c, _get_root_mount_mountinfo).
OWN_MOUNTS = """\
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /tmp
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
mkdir -m 1777 /run/lock
mkdir /run/carried
if [ -d /sys/fs/cgroup ]; then
    mount --rbind /sys/fs/cgroup /run/carried
    umount -l /sys
    mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
    mount --move /run/carried /sys/fs/cgroup
fi
rmdir /run/carried
eval "$cgroup_mounts"
if [ -d /dev/mqueue ]; then mount -t mqueue mqueue /dev/mqueue; fi
for folder in $closed; do mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$folder"; done
number=0
for kept in $hidden; do
    mkdir -p "$kept"
    mount --rbind "/.kept/$number" "$kept"
    number=$((number + 1))
done
if [ -n "$hides_slurm" ]; then
    mount -t tmpfs -o mode=755,size=64k tmpfs /etc/slurm
    for program in slurmd slurmctld slurmstepd srun sbatch salloc squeue scontrol sinfo scancel munged; do
        path=$(command -v "$program") || continue
        mount --bind /dev/null "$path"
    done
fi
mount --bind "$state/nodes/$hostname/enclos" /etc/enclos
# The image cache of a node is its own, as on a disk of its own.
mkdir -p /var/cache/enclos
mount --bind "$state/nodes/$hostname/cache" /var/cache/enclos
"""

NODE_NAME = """\
echo "$hostname" > /run/hostname
mount --bind /run/hostname /etc/hostname
"""


def hidden_paths(system: Path | None = None) -> list[Path]:
    """Folders the cluster needs although its machines or its users would not find them.

    They lie below /tmp or /run, which are each machine's own, or below a folder that only root may enter. In the root
    of another release the checkout is not there at all.
    """
    if system is not None:
        return [root] if (root := project_root()) else []
    wanted = [Path(sys.prefix), Path(__file__).resolve().parents[2]]
    root = project_root()
    wanted += [root] if root else []
    hidden: list[Path] = []
    for path in sorted(set(wanted)):
        needed = _is_own(path) or closed_folder(path) is not None or not _may_enter(path)
        if needed and not any(path.is_relative_to(one) for one in hidden):
            hidden.append(path)
    return hidden


def closed_folder(path: Path, system: Path | None = None) -> Path | None:
    """The topmost folder above a path that only root and its owner may enter, such as /root; None if there is none.

    `system` is the root file system in which that counts; what is not there yet is made for all to enter.
    """
    root = system or Path("/")
    there = (folder for folder in reversed(path.parents) if (root / folder.relative_to("/")).exists())
    return next((folder for folder in there if not _may_enter(root / folder.relative_to("/"))), None)


def _may_enter(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IXOTH)


def _closed_folders(system: Path | None) -> set[Path]:
    """What has to be covered by an empty folder for the hidden paths to be reached; /tmp and /run are anyway."""
    found = {closed_folder(path, system) for path in hidden_paths(system) if not _is_own(path)}
    return {folder for folder in found if folder is not None}


def _is_own(path: Path) -> bool:
    """Whether it lies where every machine has something of its own."""
    return path.is_relative_to("/tmp") or path.is_relative_to("/run")


def _script(layout: Layout, hostname: str, system: Path | None, with_slurm: bool, *parts: str) -> str:
    values = {
        "state": str(layout.state),
        "hostname": hostname,
        "cookie": f"{layout.state}/{hostname}",
        "system": str(system or ""),
        "hides_slurm": "" if with_slurm else "1",
        "closed": " ".join(str(path) for path in _closed_folders(system)),
        "hidden": " ".join(str(path) for path in hidden_paths(system)),
        "cgroup_mounts": cgroups.MOUNTS if cgroups.available() else "",
    }
    head = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    return head + PROLOGUE + "".join(parts) + EPILOGUE


def start_control(layout: Layout, system: Path | None = None, *, with_slurm: bool = True) -> Process:
    """Make the submit host: the first process of the cluster.

    `system` is the root file system of another release, for all machines of the cluster; None for the machine's own.
    `with_slurm=False` hides what is installed of Slurm.

    Raises:
        RuntimeError: a namespace or a mount was refused; the text is the tool's own.
    """
    root = OWN_ROOT if system is None else RELEASE_ROOT
    script = _script(layout, SUBMIT, system, with_slurm, root, CONTROL_ROOT, OWN_MOUNTS)
    (init,) = _start_inits(layout, {SUBMIT: ["unshare", *NAMESPACES, "--fork", "sh", "-c", script]})
    return init


def start_nodes(
    layout: Layout, control: Process, names: Sequence[str], system: Path | None = None, *, with_slurm: bool = True
) -> list[Process]:
    """Make the nodes, all at the same time; errors as start_control."""
    commands = {}
    for name in names:
        script = _script(layout, name, system, with_slurm, OWN_MOUNTS, NODE_NAME)
        # The unshare in between ends at once; the node's first process then belongs to the submit host's
        # first one.
        inner = shlex.join(["unshare", *NAMESPACES, "--fork", "sh", "-c", script])
        commands[name] = [*enter_command(control), "sh", "-c", f"{inner} & wait $!"]
    return _start_inits(layout, commands)


def _start_inits(layout: Layout, commands: Mapping[str, Sequence[str]]) -> list[Process]:
    """Start machines' first processes and wait until each has said that it is ready."""
    started = [_start_init(_in_cgroup(layout, name, command)) for name, command in commands.items()]
    inits: list[Process] = []
    failure = ""
    for helper, reader in started:
        with os.fdopen(reader) as ready:
            stat = ready.readline()
        if stat:
            inits.append(Process.parse_stat(stat))
            _leave_behind(inits[-1], helper)
        else:
            failure = helper.communicate()[1].strip() or f"exit status {helper.returncode}"
    if failure:
        for init in inits:
            init.kill()
        raise RuntimeError(f"cannot make a machine of namespaces: {failure}")
    if cgroups.available():
        for name in commands:
            cgroups.delegate(layout.name, name)
    return inits


def _in_cgroup(layout: Layout, name: str, command: Sequence[str]) -> Sequence[str]:
    """The command, begun in the machine's cgroup where there is one."""
    if not cgroups.available():
        return command
    cgroups.create(layout.name, name)
    procs = cgroups.place(layout.name, name) / "cgroup.procs"
    return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(procs), *command]


def _start_init(command: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """Start one with its two descriptors in place: READY_FD to write to, PROC_FD of the host's /proc."""
    reader, low_writer = os.pipe()
    low_proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    # Out of the way of the two numbers they get.
    writer, proc = (fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 32) for low in (low_writer, low_proc))
    os.close(low_writer)
    os.close(low_proc)
    shell = f'exec {READY_FD}>&{writer} {PROC_FD}<&{proc} {writer}>&- {proc}<&-; exec "$@"'
    helper = subprocess.Popen(
        ["bash", "-c", shell, "init", *command],
        pass_fds=(writer, proc),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd="/",
    )
    os.close(writer)
    os.close(proc)
    return helper, reader


def _leave_behind(init: Process, helper: subprocess.Popen[str]) -> None:
    """End the helpers that started a machine, so that only the machine stays."""
    parent = Process.of_pid(_parent(init.pid))
    if parent is not None and parent.pid != helper.pid and parent.pid > 1:
        parent.send(signal.SIGKILL)
    helper.kill()
    helper.communicate()


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape")
    return int(stat.rpartition(")")[2].split()[1])


def find_stray_inits(layout: Layout) -> list[Process]:
    """First processes of this cluster's machines, found without any record, by the cookie they carry."""
    found = []
    for pid in pids():
        if environment(pid).get(COOKIE, "").rpartition("/")[0] == str(layout.state):
            process = Process.of_pid(pid)
            if process is not None:
                found.append(process)
    return found


def run_script(machine: Process, script: str, what: str) -> None:
    """Run a shell script as root on a machine; RuntimeError with what it printed when it fails."""
    command = [*enter_command(machine), "sh", "-c", script]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{(done.stdout + done.stderr).strip()}")


def enter_command(machine: Process, namespaces: Sequence[str] = ()) -> list[str]:
    """The words that run a command on a machine, entered in all its namespaces unless some are named.

    Not `ip netns exec`: that mounts a /sys without /sys/fs/cgroup.
    """
    chosen = namespaces or NAMESPACES
    return ["nsenter", "--target", str(machine.pid), *chosen, "--"]


def connect(control: Process, nodes: Sequence[Process], names: Sequence[str]) -> None:
    """Lay the underlay: a bridge on the submit host, a veth pair to each node.

    Raises:
        RuntimeError: the kernel refused a link or an address.
    """
    rows = [
        "link set lo up",
        "link add br0 type bridge forward_delay 0 mcast_snooping 0",
        *_addresses("br0", 0),
        "link set br0 up",
    ]
    for name, node in zip(names, nodes, strict=True):
        rows.append(f"link add {name} type veth peer name eth0 netns {node.pid}")
        rows.append(f"link set {name} master br0 up")
    _batch(control, rows)
    for index, node in enumerate(nodes, start=1):
        _batch(node, ["link set lo up", *_addresses("eth0", index), "link set eth0 up"])


def _addresses(device: str, index: int) -> list[str]:
    assert address4(index).startswith(UNDERLAY4)
    return [
        f"addr add {address4(index)}/16 dev {device}",
        f"addr add {address6(index)}/64 dev {device} nodad",
    ]


def _batch(machine: Process, rows: Sequence[str]) -> None:
    command = [*enter_command(machine, ["--net"]), "ip", "-batch", "-"]
    done = subprocess.run(command, input="\n".join(rows) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cannot lay the cluster's underlay: {done.stderr.strip()}")


def namespaces(machine: Process) -> Mapping[str, str]:
    """The machine's namespaces as the kernel names them: {"net": "net:[4026532000]", …}."""
    kinds = ("pid", "net", "mnt", "uts", "ipc")
    return {kind: os.readlink(f"/proc/{machine.pid}/ns/{kind}") for kind in kinds}
