"""`enclos check`, the part about this node: configuration, agent, underlay, tools.

Runs as whoever types the command.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator

from enclos.runtime import config, presence, squash
from enclos.runtime.cli import check_devices, client
from enclos.runtime.cli.finding import Finding, mend, note, ok, skipped
from enclos.runtime.errors import EnclosError
from enclos.runtime.images import server
from enclos.runtime.settings import Config

TOOLS = {"nft": "install nftables: the agent guards the tunnels with it"}


def findings() -> Iterator[Finding]:
    """All findings about this node."""
    slurm = presence.found()
    for tool, hint in TOOLS.items() if slurm else ():
        # A user's PATH may lack the directories of root's tools.
        found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin:/usr/local/sbin")
        yield ok(tool, found) if found else mend(tool, "not installed", hint)
    settings = None
    try:
        loaded = config.load()
        settings = loaded.config
        yield ok("configuration", loaded.path if loaded.exists else f"{loaded.path} does not exist: defaults")
    except EnclosError as error:
        yield mend("configuration", error.line(), error.hint)
    if settings is not None:
        if not settings.enabled:
            yield note(
                "enabled", "false: all steps that ask for a container are refused", "it is the kill switch"
            )
        if slurm:
            yield from underlay_findings(settings)
        yield from check_devices.findings(settings, node_name())
        yield from image_findings(settings)
    yield from agent_findings()


def agent_findings(path: str = client.USER_SOCKET) -> Iterator[Finding]:
    """Ask the agent how it is."""
    try:
        status = client.ask("status", path)
    except EnclosError as error:
        yield mend("agent", error.line(), error.hint.removeprefix("administrator: "))
        return
    status = status if isinstance(status, dict) else {}
    yield ok("agent", f"enclosd {status.get('version', '?')}")
    if status.get("run"):
        yield ok("enclos run", "users may start containers")
    elif not status.get("slurm"):
        yield note("enclos run", "not allowed", "run.allow in enclos.yaml")


def node_name() -> str:
    """The name that Slurm most likely has for this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def underlay_findings(settings: Config) -> Iterator[Finding]:
    """The interface to the other nodes, found as the agent finds it; needed only for job networks."""
    from enclos.netns import underlay
    from enclos.netns.facts import NetworkFact

    wanted = settings.network.underlay
    try:
        found = underlay.find(node_name(), wanted.interface, wanted.name)
    except PermissionError:
        yield skipped("underlay", "needs root to test")
        return
    except (NetworkFact, OSError) as error:
        text, hint = str(error), "set network.underlay in enclos.yaml, or mend /etc/hosts"
        needed = "job" in settings.step.networks
        yield mend("underlay", text, hint) if needed else note("underlay", text, hint)
        return
    yield ok("underlay", f"{found.ifname}, {found.address}, MTU {found.mtu}")


def image_findings(settings: Config) -> Iterator[Finding]:
    """What images need beside the kernel."""
    site = settings.images.site_store
    if site and not os.path.isdir(site):
        yield mend("images.site_store", f"{site} is not there", "mount it, or fill it: enclos image pull")
    elif site:
        status = os.stat(site)
        closed = status.st_uid == 0 and not status.st_mode & 0o022
        hint = "give it to root, and let nobody else write to it"
        what = f"{site} is not root's alone"
        yield ok("images.site_store", site) if closed else mend("images.site_store", what, hint)
    if squash.missing:
        hint = "install libsquashfs (squashfs-tools-ng): images of registries need it"
        yield note("libsquashfs", squash.missing, hint)
    else:
        yield ok("libsquashfs", squash.LIBRARY)
    for program, what, who in (
        ("skopeo", "skopeo", "images of registries need it"),
        ("zstd", "zstd", "images of registries need it"),
        ("tar2sqfs", "squashfs-tools-ng", "--container-save needs it"),
    ):
        found = shutil.which(program)
        hint = f"install {what}: {who}"
        yield ok(program, found) if found else note(program, "not installed", hint)
    wanted = settings.images.user_files == "fuse"
    try:
        yield ok("squashfuse", server.find_program())
    except EnclosError as error:
        hint = "install squashfuse, or set images.user_files: refuse"
        yield mend("squashfuse", error.what, hint) if wanted else ok("squashfuse", "not installed, not needed")
