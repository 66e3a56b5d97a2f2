"""What the site allows: a request and the configuration to what the step gets, or a refusal.

The one place where a user's wish meets enclos.yaml. Pure: it looks at nothing but its
arguments, so that `enclos render` and tests decide exactly as the agent does. Must not
hold: syntax (request.py), how it is made (plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from enclos.runtime import errors, limits, mounts
from enclos.runtime.limits import Limits, SiteLimits
from enclos.runtime.mounts import Mount
from enclos.runtime.request import StepRequest
from enclos.runtime.settings import NETWORKS, Config


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step gets. `site_mounts` come before `user_mounts`."""

    network: str
    writable: bool
    remap_root: bool
    mount_home: bool
    entrypoint: bool
    slurm: bool
    site_mounts: tuple[Mount, ...]
    user_mounts: tuple[Mount, ...]
    limits: Limits = ()
    site_limits: Limits = ()
    oom_group: bool = False
    delegate: bool = False


def decide(request: StepRequest, config: Config, partition: str = "", account: str = "") -> Decision:
    """Apply the site's rules.

    Args:
        partition, account: the job's, by slurmctld; looked at only where `asks_for_job` says so.

    Raises:
        EnclosError: disabled, root_step, unknown_network, network_forbidden, mounts_forbidden,
            slurm_commands_useless, run_useless, limit_above_maximum, delegate_forbidden.
    """
    if not config.enabled:
        raise errors.disabled()
    if request.uid == 0 and not config.step.allow_root:
        raise errors.root_step()
    if request.mounts and not config.mounts.user:
        raise errors.mounts_forbidden(request.mounts[0].text)
    if request.delegate and not config.limits.delegate:
        raise errors.delegate_forbidden()
    network = _network(request, config)
    if request.is_run and network == "job" and request.rdma not in ("", "none"):
        raise errors.run_useless("--container-rdma with --container-network=job")
    remap_root = _wish(request.remap_root, config.rootfs.remap_root)
    wanted, from_site = _limits(request, config, partition, account)
    return Decision(
        network=network,
        writable=_wish(request.writable, config.rootfs.writable),
        remap_root=remap_root,
        mount_home=_wish(request.mount_home, config.mounts.home),
        entrypoint=_wish(request.entrypoint, config.step.entrypoint),
        slurm=request.slurm and _slurm_works(request, network, remap_root),
        site_mounts=site_mounts(config),
        user_mounts=request.mounts,
        limits=wanted,
        site_limits=from_site,
        oom_group=config.limits.oom_group and request.oom_kill_step,
        delegate=request.delegate,
    )


def _slurm_works(request: StepRequest, network: str, remap_root: bool) -> bool:
    """Whether srun could work inside: not away from slurmctld, and not under another user id than munge sees.

    Nested steps inherit the option from their script, so only a script's own step is refused.
    """
    if request.slurm and request.is_run:
        raise errors.run_useless("--container-slurm")
    useless = f"--container-network={network}" if network != "host" else "--container-remap-root" if remap_root else ""
    if useless and request.asks_by_default:
        raise errors.slurm_commands_useless(useless)
    return not useless


def site_mounts(config: Config) -> tuple[Mount, ...]:
    """The mounts of mounts.site; config.py has checked their syntax."""
    return tuple(mount for text in config.mounts.site for mount in mounts.parse(text))


def asks_for_job(config: Config) -> bool:
    """Whether a rule depends on the job's partition or account."""
    return any(entry.kind for entry in _site_limits((*config.limits.default, *config.limits.maximum)))


def _site_limits(texts: tuple[str, ...]) -> tuple[SiteLimits, ...]:
    return tuple(limits.parse_site(text) for text in texts)


def _limits(
    request: StepRequest, config: Config, partition: str, account: str
) -> tuple[Limits, Limits]:
    """The user's limits, and those that the site adds."""
    if not (request.limits or config.limits.default or config.limits.maximum):
        return (), ()
    defaults, maxima = _site_limits(config.limits.default), _site_limits(config.limits.maximum)
    try:
        return limits.combine(request.limits, defaults, maxima, partition, account)
    except limits.Exceeded as fact:
        raise errors.limit_above_maximum(f"--container-limit={fact.wanted.text}", fact.maximum.text) from fact


def _wish(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _network(request: StepRequest, config: Config) -> str:
    """The network by name, the site's default, or `host` for batch and interactive steps.

    The latter without a look at step.networks: the user did not ask, and a batch script
    without slurmctld in reach could start nothing.
    """
    if not request.network:
        return "host" if request.asks_by_default else config.step.default_network
    if request.network not in NETWORKS:
        raise errors.unknown_network(request.network)
    if request.network not in config.step.networks:
        raise errors.network_forbidden(request.network, config.step.networks)
    return request.network
