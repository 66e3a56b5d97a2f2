"""Errors: networks."""

from __future__ import annotations

from collections.abc import Sequence

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason


def unknown_network(name: str, user: str = "") -> EnclosError:
    """No such name; reads the same for a network of another tenant."""
    return UserError(
        f"--container-network={name}",
        f"no such network{f' for user {user}' if user else ''}",
        hint="use host, job or none",
    )


def network_forbidden(name: str, allowed: Sequence[str]) -> EnclosError:
    """A built-in network that the site does not offer."""
    return UserError(f"--container-network={name}", "not allowed at this site", hint=f"allowed: {', '.join(allowed)}")


def vni_in_use(vni: int) -> EnclosError:
    """Another device on this node has the job's VNI."""
    return AdminError(
        "network job",
        "its number is in use on this node",
        f"VNI {vni}",
        "try another node; " + ADMIN + "'ip -d link show type vxlan' shows the device",
    )


def no_job_facts(job: int) -> EnclosError:
    """The prolog has not told the agent about the job."""
    return AdminError(
        "--container-network=job",
        f"the nodes of job {job} are not known",
        "the Slurm prolog did not announce the job",
        ADMIN + "set PrologFlags=Alloc in slurm.conf; 'enclos check' tests it",
    )


def parts_unknown(leader: int) -> EnclosError:
    """slurmctld did not say which nodes the parts of a heterogeneous job have."""
    return AdminError(
        "--container-network=job",
        f"the nodes of the parts of heterogeneous job {leader} are not known",
        "slurmctld did not tell them",
        "try again; " + ADMIN + f"'squeue --jobs={leader}' has to work for root on the node",
    )


def not_in_nodelist(node: str) -> EnclosError:
    """The job's node list does not have this node."""
    return AdminError(
        "--container-network=job",
        f"node {node} is not in the job's node list",
        hint=ADMIN + "does slurmd run under the name that slurm.conf has?",
    )


def name_unknown(name: str) -> EnclosError:
    """A node's underlay name does not resolve."""
    return AdminError(
        "network job",
        f"the name {name} of a node cannot be resolved",
        hint=ADMIN + "check /etc/hosts or DNS, and network.underlay.name in enclos.yaml",
    )


def underlay_not_found(detail: str) -> EnclosError:
    """No interface for the overlay."""
    return AdminError(
        "network job",
        "no network interface to the other nodes was found",
        detail,
        ADMIN + "set network.underlay in enclos.yaml; 'enclos check' tests it",
    )


def network_failed(number: int, what: str) -> EnclosError:
    """The kernel refused to make the job's network."""
    return AdminError(
        "network job",
        f"cannot be made: {what}",
        reason(number),
        ADMIN + "'enclos check' tests all requirements",
    )


def relay_port_taken(address: str, port: int) -> EnclosError:
    """PMIx cannot be brought into the network."""
    return UserError(
        "network job",
        f"PMIx port {port} on {address} is already used inside the container's network",
        "possibly by another step of this job",
        "end the program that listens there, or run the step again",
    )


def no_tunnels() -> EnclosError:
    """A job network where the agent found no Slurm when it started."""
    return AdminError(
        "--container-network=job",
        "the agent was started without Slurm",
        hint=ADMIN + "start enclosd again, with slurmd's PATH and SLURM_CONF",
    )
