"""Errors: enclos exec, shell and run."""

from __future__ import annotations

from collections.abc import Sequence

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason


def exec_no_container(name: str) -> EnclosError:
    """Not there, or another user's, or without a container: the same words, so that nothing leaks."""
    return UserError(
        name, "you have no container of this name here", hint="'enclos ps' on the node where it runs shows yours"
    )


def exec_several(job: str, names: Sequence[str]) -> EnclosError:
    """Which one?"""
    return UserError(job, "the job has several containers here", ", ".join(names), "name one of them")


def exec_building(name: str) -> EnclosError:
    """Nobody is in yet."""
    return UserError(
        name, "the container is not ready, or cannot be entered any more", hint="'enclos ps' shows its state"
    )


def exec_too_many(name: str, limit: int) -> EnclosError:
    """A bound of what one user may hold."""
    return UserError(
        name, f"you have {limit} programs of 'enclos exec' on this node, or too many are starting", hint="end some"
    )


def exec_failed(name: str, cause: str) -> EnclosError:
    """The kernel or the record is in the way."""
    return AdminError(
        name,
        "the container cannot be entered",
        cause,
        "srun --overlap with --container-name=JOB.STEP does the same; " + ADMIN + "journalctl -u enclosd",
    )


def exec_ended(name: str) -> EnclosError:
    """Its step ended, or somebody killed what waited for the program."""
    return UserError(name, "the program was ended, possibly with its step", hint="'enclos ps' shows what runs")


def exec_too_large(number: int) -> EnclosError:
    """Command and environment do not fit into a packet."""
    return UserError("exec", f"command and environment are larger than {number} bytes", hint="begin with env -i")


def exec_not_found(command: str) -> EnclosError:
    """In the container; srun's tasks say the same."""
    return UserError(command, "command not found in the container", hint="it is looked for along the PATH inside")


def exec_not_run(command: str, number: int) -> EnclosError:
    """It is there."""
    return UserError(command, "cannot be run in the container", reason(number), "is it a program for this machine?")


def run_forbidden(slurm: str) -> EnclosError:
    """`enclos run` where it may not be; `slurm` is what shows that the machine is a node of Slurm's."""
    if slurm:
        hint = "srun --container-image=IMAGE starts containers here; " + ADMIN + "run.allow in enclos.yaml"
        return UserError("run", "this machine is a node of Slurm's", slurm, hint)
    return UserError("run", "not allowed by the administrator", hint=ADMIN + "run.allow in enclos.yaml")


def run_too_many(limit: int) -> EnclosError:
    """A bound of what one user may hold."""
    hint = "'enclos ps' shows them; " + ADMIN + "run.per_user in enclos.yaml"
    what = f"you have {limit} containers of 'enclos run' on this machine, more are not allowed"
    return UserError("run", what, hint=hint)


def run_confined(why: str) -> EnclosError:
    """The command is in a sandbox: what it starts here would be outside of it."""
    return UserError("run", "it cannot be used from inside a container or sandbox", why, "type it in a login shell")


def run_failed(cause: str) -> EnclosError:
    """The kernel is in the way, or what stands for slurmstepd was killed."""
    return AdminError("run", "the program could not be started", cause, ADMIN + "journalctl -u enclosd")


def run_nowhere(number: int) -> EnclosError:
    """The command's working directory has no path any more."""
    return UserError("run", "the directory that you are in cannot be named", reason(number), "cd to another one")


def run_useless(option: str) -> EnclosError:
    """An option that only means something in a job."""
    return UserError(option, "it means nothing without Slurm", hint="leave it away")
