"""`enclosd`: starts the agent on this node, with its sockets, signals and log, and ends it.

The zygote starts first, before anything else is read or opened. Runs as root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from enclos.netns import facts, guard, underlay
from enclos.runtime import adoption, cgroup, config, errors, linux, presence, protocol
from enclos.runtime.agent import Agent
from enclos.runtime.connection import Connection, wait_readable
from enclos.runtime.devices.holdings import Holdings
from enclos.runtime.devices.node import NodeDevices
from enclos.runtime.images.cache import Cache
from enclos.runtime.images.checks import Checks
from enclos.runtime.images.imports import Imports
from enclos.runtime.images.store import MountedImages
from enclos.runtime.jobs import Jobs, word
from enclos.runtime.journal import Journal
from enclos.runtime.kinds import amount
from enclos.runtime.named import NamedContainers
from enclos.runtime.settings import Config
from enclos.runtime.spawner import Spawner
from enclos.runtime.steps import Surroundings

import enclos

log = logging.getLogger("enclosd")

RUN_DIRECTORY = "/run/enclos"
AGENT_SOCKET = f"{RUN_DIRECTORY}/agent.sock"
USER_SOCKET = f"{RUN_DIRECTORY}/user.sock"
NAMED_DIRECTORY = f"{RUN_DIRECTORY}/named"
LOCK_FILE = f"{RUN_DIRECTORY}/enclosd.lock"
BACKLOG = 1024
SO_PASSRIGHTS = 83
ACCEPT_PAUSE_SECONDS = 0.1
# While slurmctld does not answer, or nft does not take the guard's table.
RETRY_SECONDS = 5.0
RETRY_LIMIT_SECONDS = 300.0


def main() -> None:
    """Entry point of `enclosd`."""
    arguments = _arguments().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    if os.geteuid() != 0:
        sys.exit("enclosd: must be started as root")
    try:
        asyncio.run(run(arguments.config or config.config_path(), arguments.node))
    except errors.EnclosError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.exit(f"enclosd: {error.line(arguments.node)}{hint}")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="enclosd", description="The agent of Enclos on a compute node.")
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground (it always does)")
    parser.add_argument("--config", metavar="FILE", help="configuration (default: /etc/enclos/enclos.yaml)")
    node_help = "Slurm's name of this node (default: the host name)"
    parser.add_argument("--node", metavar="NAME", default=node_name(), help=node_help)
    parser.add_argument("--version", action="version", version=f"enclosd {enclos.__version__}")
    return parser


def node_name() -> str:
    """Slurm's name of this node: the host name up to its first dot, unless slurmd was given another."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]


async def run(config_path: str, node: str) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        EnclosError: bad configuration, another agent is running, no underlay, no nftables.
    """
    # The zygote and its builders inherit it; an administrator's shell may have another.
    os.umask(0o022)
    spawner = Spawner()
    _raise_descriptor_limit()
    lock = _lock_run_directory()
    node_mounts_fd = _enter_own_mount_namespace()
    await spawner.start()
    cgroup.enable_controllers()
    loaded = config.load(config_path)
    logging.getLogger().setLevel(loaded.config.log.level.upper())
    images_directory, stage = _make_directories()
    journal = Journal(f"{RUN_DIRECTORY}/journal")
    slurm = presence.of_slurm(journal)
    gate, found = _raise_guard(node, loaded.config) if slurm else (None, None)
    named = _named_containers(loaded.config, node_mounts_fd, spawner)
    jobs = Jobs(node, loaded.config, journal, spawner, gate, found, named)
    images = MountedImages(images_directory, loaded.config.images.idle_seconds)
    devices = NodeDevices(node, loaded.config, Holdings(loaded.config, journal, found.ifindex if found else 0))
    checks = Checks(spawner, f"{RUN_DIRECTORY}/verified")
    imports = Imports(loaded.config, spawner, _open_cache(loaded.config), checks)
    around = Surroundings(node, loaded.config, stage, journal, spawner, images, imports, checks, jobs, devices, named)
    agent = Agent(around, loaded.path, slurm)
    log.info("a node of Slurm's (%s)" if slurm else "no node of Slurm's%s", slurm)
    adoption.adopt(agent)
    if loaded.config.step.spare_builder:
        spawner.keep_spare()
    await _serve(agent, gate)
    await named.settled()
    images.close()
    await spawner.stop()
    os.close(lock)


def _lock_run_directory() -> int:
    """One agent per node: the lock is the kernel's, so a killed agent leaves none behind.

    A file that only root may open: any user could lock the directory itself, and keep the agent from starting.
    """
    os.makedirs(RUN_DIRECTORY, 0o755, exist_ok=True)
    fd = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise errors.AdminError(RUN_DIRECTORY, "another agent is running", hint="systemctl status enclosd") from error
    return fd


def _raise_descriptor_limit() -> None:
    """A running step holds about six descriptors, and a node may run thousands of steps."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _enter_own_mount_namespace() -> int:
    """What the agent mounts (images) is invisible to the node and gone with the agent; what the node mounts appears.

    Returns:
        A descriptor of the node's mount namespace, where named containers are: they outlive the agent.
    """
    os.makedirs(NAMED_DIRECTORY, 0o700, exist_ok=True)
    os.chmod(NAMED_DIRECTORY, 0o700)
    node_mounts_fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    linux.unshare(linux.CLONE_NEWNS)
    linux.set_propagation("/", linux.MS_REC | linux.MS_SLAVE)
    # This namespace's copies would keep what the node removes.
    for name in os.listdir(NAMED_DIRECTORY):
        with contextlib.suppress(OSError):
            linux.unmount(f"{NAMED_DIRECTORY}/{name}")
    return node_mounts_fd


def _make_directories() -> tuple[str, str]:
    """The places for image mounts, which no user may reach, and for the stages, of which each builder sees his own."""
    images, stage = f"{RUN_DIRECTORY}/images", f"{RUN_DIRECTORY}/stage"
    os.makedirs(images, 0o700, exist_ok=True)
    os.makedirs(stage, 0o755, exist_ok=True)
    tmpfs = linux.mount_filesystem("tmpfs", [("mode", "0700"), ("size", "1m")])
    linux.move_mount(tmpfs, linux.AT_FDCWD, images)
    os.close(tmpfs)
    linux.set_propagation(images, linux.MS_PRIVATE)
    return images, stage


def _open_cache(settings: Config) -> Cache:
    """The node's image cache. Without one, steps with images on the node run all the same."""
    cache = Cache(settings.imports.cache_directory, amount(settings.imports.cache_size))
    try:
        cache.open()
    except OSError as error:
        log.error("no image cache in %s: %s", settings.imports.cache_directory, error.strerror)
    return cache


def _named_containers(settings: Config, node_mounts_fd: int, spawner: Spawner) -> NamedContainers:
    """Their records lie where their files do: those on a disk outlive the node."""
    records = f"{settings.named.directory or NAMED_DIRECTORY}/records"
    return NamedContainers(settings.named, Journal(records), NAMED_DIRECTORY, node_mounts_fd, spawner)


def _raise_guard(node: str, settings: Config) -> tuple[guard.Guard, underlay.Underlay]:
    """The node's tunnels are guarded from the agent's start, whether a job uses them or not."""
    network = settings.network
    try:
        found = underlay.find(node, network.underlay.interface, network.underlay.name)
        gate = guard.Guard(network.port, found.ifname, found.ipv6)
        gate.ensure()
        guard.hold_port(network.port)
    except facts.NetworkFact as fact:
        raise word(fact) from fact
    return gate, found


async def _serve(agent: Agent, gate: guard.Guard | None) -> None:
    """Accept connections until a signal says stop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with _listen(AGENT_SOCKET, 0o600) as shim_socket, _listen(USER_SOCKET, 0o666) as user_socket:
        background = [
            asyncio.create_task(_accept(shim_socket, agent.serve_shim)),
            asyncio.create_task(agent.serve_visitors(user_socket)),
            asyncio.create_task(_reconcile(agent)),
        ]
        if gate is not None:
            background.append(asyncio.create_task(_mend_guard(gate)))
        # What exists now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _notify_ready()
        log.info("ready on %s, version %s", agent.around.node, enclos.__version__)
        await stop.wait()
        for task in background:
            task.cancel()
    log.info("stopped; steps go on")


def _listen(path: str, mode: int) -> socket.socket:
    """A listening socket of that mode; one that an agent left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    before = os.umask(0o777)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    os.chmod(path, mode)
    if mode & 0o006:
        # Refuses descriptors where they are sent (Linux 6.16); for older kernels see visitors.py.
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


async def _accept(listener: socket.socket, serve: Callable[[Connection], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    serving: set[asyncio.Task[None]] = set()
    while True:
        try:
            connected, _ = await loop.sock_accept(listener)
        except OSError as error:
            # Out of descriptors or memory: whoever waits is served when there is room again.
            log.error("cannot accept a connection: %s", error)
            await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
            continue
        task = asyncio.create_task(_serve_one(connected, serve))
        serving.add(task)
        task.add_done_callback(serving.discard)


async def _serve_one(connected: socket.socket, serve: Callable[[Connection], Awaitable[None]]) -> None:
    connection = Connection(connected)
    try:
        await serve(connection)
    except protocol.ProtocolError as error:
        log.warning("a connection was dropped: %s", error)
    except Exception:
        log.exception("a connection failed")
    finally:
        connection.close()


async def _mend_guard(gate: guard.Guard) -> None:
    """A firewall reload may remove the guard's table; the kernel says so, and it is made again."""
    while True:
        await wait_readable(gate.fileno())
        try:
            if gate.handle_event():
                log.warning("the guard's nftables table was removed; made it again")
        except (facts.NetworkFact, OSError) as error:
            log.error("the guard's nftables table is not as it should be: %s", error)
            await asyncio.sleep(RETRY_SECONDS)


async def _reconcile(agent: Agent) -> None:
    """At the start, until slurmctld has answered once: epilogs may have been missed while no agent ran."""
    pause = RETRY_SECONDS
    while await agent.reconcile() is None:
        await asyncio.sleep(pause)
        pause = min(2 * pause, RETRY_LIMIT_SECONDS)


def _notify_ready() -> None:
    """Tell systemd (sd_notify(3)), where it started this."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", "\0" + path[1:] if path.startswith("@") else path)


if __name__ == "__main__":
    main()
