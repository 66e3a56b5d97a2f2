"""Errors: options, profiles and limits."""

from __future__ import annotations

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError

ENTRYPOINT = "--container-entrypoint"
ENTRYPOINT_HINT = "--no-container-entrypoint leaves it out; --container-entrypoint-log shows what it prints"


def bad_option(name: str, value: str, detail: str) -> EnclosError:
    """A value that cannot be used."""
    return UserError(f"--container-{name}={value}", f"invalid argument: {detail}", hint="see enclos-srun(1)")


def given_twice(name: str) -> EnclosError:
    """An option with two different values."""
    return UserError(f"--container-{name}", "specified multiple times", hint="give it once")


def unshare_pid() -> EnclosError:
    """--container-unshare=pid: no process can join a pid namespace."""
    return UserError(
        "--container-unshare=pid",
        "pid is not possible",
        "tasks are started by Slurm, and no process can join a pid namespace",
        "other users' processes are hidden in every container",
    )


def unshare_against_network(network: str) -> EnclosError:
    """--container-unshare=net and a network of another kind."""
    return UserError(
        "--container-unshare=net",
        f"cannot be combined with --container-network={network}",
        hint="net means --container-network=none; give one of them",
    )


def profile_not_found(name: str, detail: str) -> EnclosError:
    """--container-profile and no file of that name."""
    return UserError(f"--container-profile={name}", "profile not found", detail, "'enclos profile ls' lists profiles")


def profile_bad(path: str, detail: str) -> EnclosError:
    """A profile that cannot be used."""
    hint = "'enclos profile validate' checks it; see enclos-srun(1)"
    return UserError(f"profile {path}", "cannot be used", detail, hint)


def slurm_commands_missing(detail: str) -> EnclosError:
    """--container-slurm and something of Slurm is not where it is looked for."""
    return AdminError(
        "--container-slurm",
        "cannot find Slurm's commands",
        detail,
        ADMIN + "enclosd's PATH and SLURM_CONF have to be those of slurmd",
    )


def slurm_commands_useless(option: str) -> EnclosError:
    """--container-slurm where srun could not work."""
    return UserError(
        "--container-slurm",
        f"cannot be combined with {option}",
        hint="srun in the container has to reach slurmctld, and to be you",
    )


def limit_above_grant(subject: str, granted: str) -> EnclosError:
    """A limit may only be tighter than what the job has."""
    return UserError(
        subject,
        f"above what Slurm granted ({granted})",
        hint="ask for less, or for more with --mem, --cpus-per-task",
    )


def limit_above_maximum(subject: str, maximum: str) -> EnclosError:
    """More than the site gives to anybody of this partition or account."""
    return UserError(subject, f"above the site's maximum ({maximum})", hint="ask for less")


def limit_unsupported(subject: str, what: str) -> EnclosError:
    """The kernel has no such controller, or no such file in it."""
    return UserError(
        subject, f"the kernel cannot limit this ({what} is missing)", hint="drop the limit; 'enclos check' lists them"
    )


def limit_no_device(subject: str, device: str) -> EnclosError:
    """No such block or RDMA device."""
    return UserError(
        subject,
        f"no such device ({device})",
        hint="'lsblk' and 'rdma dev' on the compute node list them; a partition of a disk cannot be limited",
    )


def limit_refused(subject: str, detail: str) -> EnclosError:
    """The kernel took the limit for wrong."""
    return AdminError(subject, f"cannot be set ({detail})", hint=f"{ADMIN}'enclos check' tests all requirements")


def no_cgroup2(subject: str) -> EnclosError:
    """Slurm or the node is on cgroup v1."""
    return AdminError(
        subject,
        "limits need cgroup v2 (/sys/fs/cgroup is not)",
        hint=f"{ADMIN}boot with systemd.unified_cgroup_hierarchy=1",
    )


def delegate_forbidden() -> EnclosError:
    """limits.delegate is false."""
    return UserError(
        "--container-cgroup=delegate",
        "the site does not allow it",
        hint=f"{ADMIN}limits.delegate in enclos.yaml",
    )


def delegate_without_slurm() -> EnclosError:
    """Slurm or the node is on cgroup v1, or Slurm makes no cgroups for tasks."""
    return AdminError(
        "--container-cgroup=delegate",
        "Slurm makes no cgroup of version 2 for the step's tasks",
        hint=f"{ADMIN}it needs proctrack/cgroup and task/cgroup with cgroup v2",
    )


def delegate_failed(detail: str) -> EnclosError:
    """The kernel refused, or Slurm has put the task elsewhere."""
    return AdminError(
        "--container-cgroup=delegate",
        f"cannot make a cgroup for the task ({detail})",
        hint=f"{ADMIN}'enclos check' tests all requirements",
    )


def limit_killed(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the memory limit was reached."""
    return UserError(
        subject,
        f"the step reached this limit ({count} of its processes were killed)",
        hint="ask for more memory, or use less; 'enclos top' shows live use",
    )


def limit_refused_forks(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the limit of processes was reached."""
    return UserError(
        subject,
        f"the step reached this limit (a new process or thread was refused {count} times)",
        hint="ask for more, or start fewer; threads count",
    )


def limit_refused_huge_pages(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the limit of huge pages of one size was reached."""
    return UserError(
        subject,
        f"the step reached this limit (huge pages were refused {count} times)",
        hint="ask for more, or use fewer; a program without one sees ENOMEM, or ends with a bus error",
    )


def limit_refused_rdma(subject: str, count: int) -> EnclosError:
    """Told when a task ends: the limit of handles or objects of an RDMA device was reached."""
    return UserError(
        subject,
        f"the step reached this limit (objects of the device were refused {count} times)",
        hint="ask for more: each queue, region of memory and protection domain of each task counts",
    )


def readonly_and_writable() -> EnclosError:
    """Both forms at once."""
    return UserError("", "both --container-writable and --container-readonly were specified", hint="give one of them")


def bad_request(detail: str) -> EnclosError:
    """The plugin sent something that is not of the protocol."""
    return AdminError(
        "agent",
        "cannot understand the request of the Slurm plugin",
        detail,
        ADMIN + "are enclosd and spank_enclos.so of the same release?",
    )


def entrypoint_failed(status: int) -> EnclosError:
    """As spank/entrypoint.c says it."""
    return UserError(ENTRYPOINT, f"the image's entrypoint failed with status {status}", hint=ENTRYPOINT_HINT)


def entrypoint_stayed() -> EnclosError:
    """It ended well, and never executed what it was given."""
    return UserError(ENTRYPOINT, "the image's entrypoint did not execute its arguments", hint=ENTRYPOINT_HINT)
