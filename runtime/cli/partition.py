"""`enclos partition`: the partitions of tenants in OpenSM's partitions.conf, where OpenSM runs.

The site's rdma.hook calls it with the GUIDs of the ports that come to a job and leave it. One call at a time changes
the file, by a new one in its place. Runs as who may write it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enclos.runtime import errors
from enclos.runtime.cli import common
from enclos.runtime.devices import partitions

FILE = "/etc/opensm/partitions.conf"


def parser() -> common.Parser:
    """The arguments."""
    text = "Give tenants partitions of an InfiniBand fabric, in OpenSM's partitions.conf."
    made = common.Parser(prog="enclos partition", description=text)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="attach|detach|ls")
    for verb, help_text in (
        ("attach", "put ports into the partition of a tenant, made with a free key where it has none"),
        ("detach", "take ports, or the whole tenant, out again"),
        ("ls", "list the tenants, their keys and ports"),
    ):
        one = verbs.add_parser(verb, help=help_text, description=help_text)
        one.add_argument("--file", default=FILE, metavar="FILE", help=f"the file (default: {FILE})")
        if verb == "ls":
            common.add_json(one)
            continue
        reload_help = (
            "shell command that makes OpenSM read the file, when it has changed or an earlier call's command failed: "
            "'systemctl reload opensm'"
        )
        one.add_argument("--reload", default="", metavar="COMMAND", help=reload_help)
        one.add_argument("tenant", metavar="TENANT", help="a name, such as ENCLOS_TENANT")
        count = "+"
        if verb == "detach":
            # Said in words: a hook passes on what it is told, which is nothing where a device has no InfiniBand port.
            one.add_argument("--all", action="store_true", help="the whole tenant, instead of ports")
            count = "*"
        one.add_argument("guids", nargs=count, metavar="GUID", help="of a port, as 'rdma' or OpenSM writes it")
    return made


def run(arguments: list[str]) -> int:
    """Do what the verb says."""
    made = parser()
    given = made.parse_args(arguments)
    if given.verb == "detach" and given.all == bool(given.guids):
        made.error("detach: name GUIDs of ports, or --all for the whole tenant")
    path = Path(given.file)
    try:
        if given.verb == "ls":
            _show(partitions.read(path.read_text()), given.json)
            return 0
        with _locked(path):
            text = path.read_text()
            ports = [partitions.parse_guid(guid) for guid in given.guids]
            change = partitions.attach if given.verb == "attach" else partitions.detach
            changed = change(text, given.tenant, ports)
            if given.reload:
                _change_and_reload(path, text, changed, given.reload)
            elif changed != text:
                _replace(path, changed)
            if given.verb == "attach":
                print(f"{given.tenant} 0x{partitions.read(changed)[given.tenant].key:04x}")
    except (partitions.BadPartitions, OSError, UnicodeDecodeError) as error:
        detail = errors.reason(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise errors.partition_failed(given.file, detail) from error
    except subprocess.CalledProcessError as error:
        raise errors.partition_unread(given.file, given.reload, error.returncode) from error
    return 0


def _change_and_reload(path: Path, text: str, changed: str, command: str) -> None:
    """Change the file and have OpenSM read it; also what an earlier call changed whose command failed or never ran.

    What OpenSM has not read is noted beside the file, before the file changes: a call that is killed leaves it, too.
    """
    unread = path.with_name(f"{path.name}.unread")
    if changed != text:
        unread.touch(mode=0o600)
        _replace(path, changed)
    if unread.exists():
        subprocess.run(command, shell=True, check=True)
        unread.unlink()


def _show(found: dict[str, partitions.Partition], as_json: bool) -> None:
    rows = {
        tenant: {"key": f"0x{one.key:04x}", "ports": [f"0x{port:016x}" for port in sorted(one.ports)]}
        for tenant, one in found.items()
    }
    if as_json:
        common.print_json(rows)
        return
    for tenant, row in rows.items():
        print(tenant, row["key"], *row["ports"])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Not the file itself: it is replaced."""
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, text: str) -> None:
    """After a power cut there is the old file or the new one."""
    status = path.stat()
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w") as file:
        os.fchmod(file.fileno(), status.st_mode & 0o7777)
        os.fchown(file.fileno(), status.st_uid, status.st_gid)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
