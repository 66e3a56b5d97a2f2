"""Slurm's accounting on a trial cluster that runs: slurmdbd with a database of its own, on the submit host.

Both die with that machine. Runs as root.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from enclos.runtime.cluster import daemons
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.cluster.layout import SUBMIT

DATABASE = "slurm_acct_db"
SHARE = Path("/usr/share/mysql")
# Where the library of slurmdbd's plugin looks.
SOCKET = "/run/mysqld/mysqld.sock"
PORT = 6819

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost={host}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc={database}
PidFile=/run/slurmdbd.pid
LogFile={log}
"""
SLURM_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={host}
AccountingStoragePass={munge}
"""


def start(cluster: Cluster) -> None:
    """Start both, and slurmctld anew, which learns of accounting only when it starts."""
    _start_database(cluster)
    _start_slurmdbd(cluster)
    munge = f"{cluster.layout.munge}/socket"
    conf = cluster.layout.slurm / "slurm.conf"
    rows = [row for row in conf.read_text().splitlines() if not row.startswith("AccountingStorageType=")]
    conf.write_text("\n".join(rows) + "\n" + SLURM_CONF.format(host=SUBMIT, munge=munge))
    name = next(row.partition("=")[2] for row in rows if row.startswith("ClusterName="))
    added = cluster.run(["sacctmgr", "-i", "add", "cluster", name])
    assert added.returncode == 0, added.stderr
    slurmctld = cluster.record.daemons["slurmctld"]
    slurmctld.send(signal.SIGTERM)
    slurmctld.wait(20)
    cluster.mend()
    deadline = time.monotonic() + daemons.READY_DEADLINE_S
    while set(cluster.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) != {"idle"}:
        assert time.monotonic() < deadline, cluster.slurmctld_log()
        time.sleep(0.1)


def _start_database(cluster: Cluster) -> None:
    """A MariaDB that knows no users. Of its own tables slurmdbd needs but the one of stored procedures."""
    folder = cluster.layout.state / "database"
    (folder / "data/mysql").mkdir(parents=True)
    tables = (SHARE / "mysql_system_tables.sql").read_text().splitlines()
    procedures = next(row for row in tables if row.startswith("CREATE TABLE IF NOT EXISTS proc "))
    (folder / "first.sql").write_text(f"use mysql;\n{procedures}\ncreate database {DATABASE};\n")
    cluster.path_on(None, SOCKET).parent.mkdir()
    command = [
        "mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--skip-networking", f"--socket={SOCKET}",
        f"--datadir={folder}/data", f"--tmpdir={folder}", f"--init-file={folder}/first.sql",
        "--pid-file=/run/mysqld/pid", "--innodb-log-file-size=8M",
        "--innodb-buffer-pool-size=16M", "--innodb-flush-log-at-trx-commit=0",
        "--innodb-flush-method=nosync",
    ]  # fmt: skip
    log = cluster.layout.log(SUBMIT, "mariadbd")
    database = cluster.keep("mariadbd", daemons.start(cluster.machine(), command, log))
    daemons.await_ready(lambda: daemons.accepts(cluster.path_on(None, SOCKET)), database, log, "mariadbd")


def _start_slurmdbd(cluster: Cluster) -> None:
    log = cluster.layout.log(SUBMIT, "slurmdbd")
    conf = cluster.layout.slurm / "slurmdbd.conf"
    conf.touch(0o600)
    munge = f"{cluster.layout.munge}/socket"
    conf.write_text(SLURMDBD_CONF.format(host=SUBMIT, munge=munge, database=DATABASE, log=log))
    started = daemons.start(cluster.machine(), ["slurmdbd", "-D"], cluster.layout.log(SUBMIT, "slurmdbd.err"))
    slurmdbd = cluster.keep("slurmdbd", started)
    sockets = Path(f"/proc/{cluster.node_pid()}/net/tcp")
    listens = f":{PORT:04X} 00000000:0000 0A "
    daemons.await_ready(lambda: listens in sockets.read_text(), slurmdbd, log, "slurmdbd")
