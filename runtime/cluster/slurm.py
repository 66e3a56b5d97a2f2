"""The files that Slurm and munge read: slurm.conf, plugstack.conf, job_submit.lua, and /etc/hosts.

Pure: text from numbers and names. Starting the daemons is daemons.py, the machines they run on are nodes.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from enclos.runtime import hostlist
from enclos.runtime.cluster.layout import SUBMIT, Layout, node_names
from enclos.runtime.cluster.users import User

UNDERLAY4 = "10.90"
UNDERLAY6 = "fd90:656e:636c::"


def address4(index: int) -> str:
    """IPv4 address on the underlay: 0 is the submit host, nodes count from 1."""
    number = index if index else 0xFFFE
    return f"{UNDERLAY4}.{number >> 8}.{number & 0xFF}"


def address6(index: int) -> str:
    """IPv6 address on the underlay, numbered like the IPv4 ones."""
    return f"{UNDERLAY6}{index if index else 0xFFFE:x}"


def hosts(nodes: int) -> str:
    """/etc/hosts of every machine; NAME-v6 is the node's IPv6 underlay, for networks over it."""
    rows = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    for index, name in enumerate([SUBMIT, *node_names(nodes)]):
        rows += [f"{address4(index)} {name}", f"{address6(index)} {name}-v6"]
    return "\n".join(rows) + "\n"


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """What `enclos-cluster up` lets one choose about Slurm."""

    nodes: int
    cpus: int
    extra: str = ""
    slurm: str = ""
    cgroups: bool = False
    cgroup_extra: str = ""
    gpu_files: str = ""


def slurm_conf(layout: Layout, settings: SlurmSettings) -> str:
    """slurm.conf for all machines of a cluster.

    Rows of `settings.extra` replace ours of the same name: Slurm refuses a parameter given twice.
    """
    rows = {
        "ClusterName": layout.name.replace("-", "_")[:40],
        "SlurmctldHost": f"{SUBMIT}({address4(0)})",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge}/socket",
        "StateSaveLocation": f"{layout.state}/slurmctld",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmdSpoolDir": "/run/slurmd",
        "SlurmctldLogFile": str(layout.log(SUBMIT, "slurmctld")),
        "SlurmdLogFile": f"{layout.logs}/%n.slurmd.log",
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
        # With cgroup v1 the controllers belong to the machine, not to a node that is only namespaces.
        "ProctrackType": "proctrack/cgroup" if settings.cgroups else "proctrack/linuxproc",
        "TaskPlugin": "task/cgroup,task/affinity" if settings.cgroups else "task/affinity",
        "TaskPluginParam": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "JobSubmitPlugins": "lua",
        "MpiDefault": "none",
        # The prolog gets the job's node list from slurmctld only with Alloc. Without NoHold srun asks whether
        # the prolog is over a moment too early, then sleeps 100 ms; with it slurmd holds the step instead.
        "PrologFlags": "Alloc,NoHold",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerType": "sched/builtin",
        "PriorityType": "priority/basic",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": "2",
        "SlurmdTimeout": "300",
        "SlurmctldTimeout": "300",
        "InactiveLimit": "0",
        "KillWait": "5",
        "MinJobAge": "30",
        "TreeWidth": "16",
    }
    extra = _parameters(settings.extra)
    names = {name.lower() for name in extra}
    kept = [f"{name}={value}" for name, value in rows.items() if name.lower() not in names]
    return "\n".join([*kept, settings.extra.strip(), *_nodes(settings, names)]) + "\n"


def _parameters(text: str) -> list[str]:
    rows = (row.strip() for row in text.splitlines())
    return [row.partition("=")[0].strip() for row in rows if row and not row.startswith("#")]


def _nodes(settings: SlurmSettings, names: set[str]) -> list[str]:
    """The nodes and the one partition, unless the extra file defines its own."""
    node = f"NodeName=n[1-{settings.nodes}] CPUs={settings.cpus} Sockets=1 CoresPerSocket={settings.cpus}"
    gres = f" Gres=gpu:{len(hostlist.expand(settings.gpu_files))}" if settings.gpu_files else ""
    rows = ["GresTypes=gpu"] if gres else []
    if "nodename" not in names:
        rows.append(f"{node} ThreadsPerCore=1 RealMemory=4096{gres} State=UNKNOWN")
    if "partitionname" not in names:
        rows.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    return rows


def gres_conf(settings: SlurmSettings) -> str:
    """gres.conf: device files that count as GPUs, the same on each node."""
    return f"Name=gpu File={settings.gpu_files}\n" if settings.gpu_files else ""


def cgroup_conf(settings: SlurmSettings) -> str:
    """cgroup.conf: constrain nothing but what `cgroup_extra` says, and ask no systemd for anything.

    Releases from 23.11 can be told to leave control groups alone; without it slurmd does not start where the host has
    version 1 mounted. Those before ignore a cgroup plugin that no other plugin asks for.
    """
    quiet = "IgnoreSystemd=yes\nIgnoreSystemdOnFailure=yes\n"
    if settings.cgroups:
        return f"CgroupPlugin=cgroup/v2\n{quiet}{settings.cgroup_extra}"
    if settings.slurm > "23.11":
        return "CgroupPlugin=disabled\n"
    return f"CgroupAutomount=no\n{quiet}"


MPI_CONF = """\
# With the tree (for barriers the default) a rank may leave MPI_Init before another has come to its end; what it
# sends then kills the other with a segmentation fault. Seen with Slurm 22.05 and OpenMPI 4.1.4, also outside.
PMIxCollFence=ring
"""


def plugstack_conf(shim: str | None, mode: str) -> str:
    """plugstack.conf with the line an admin would write; empty where the plugin is not built."""
    return f"{mode} {shim}\n" if shim else "# the plugin is not built\n"


JOB_SUBMIT = """\
-- Without slurmdbd nothing ties a user to an account, so it is tied here, whatever the user asked for.
local accounts = {{
{rows}
}}

function slurm_job_submit(job, partitions, uid)
    local account = accounts[uid]
    if account ~= nil then
        job.account = account
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
    if uid ~= 0 and job.account ~= nil then
        slurm.log_user("the account of a job cannot be changed")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end

return slurm.SUCCESS
"""


def job_submit_lua(users: Iterable[User]) -> str:
    """job_submit.lua: the account follows from the uid."""
    return JOB_SUBMIT.format(rows="\n".join(f'    [{one.uid}] = "{one.account}",' for one in users))
