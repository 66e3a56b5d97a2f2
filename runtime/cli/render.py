"""`enclos render`: print the operations that would make a container, in their order, without doing them.

Takes the options as srun does. Runs as whoever types the command; nothing is opened but the CDI files of this machine,
and its agent asked for the list of GPUs, when devices are wanted, so it also works away from the compute nodes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from enclos.runtime import config, errors, plan, policy, request, slurmclient
from enclos.runtime.cli import client, common
from enclos.runtime.cli.check_node import node_name
from enclos.runtime.devices.gres import Files
from enclos.runtime.devices.node import NodeDevices
from enclos.runtime.idmap import container_maps
from enclos.runtime.options import OPTIONS, VISIBLE_VARIABLES

EXAMPLE_JOB = 1
STAGE = "/run/enclos/stage"


def run(arguments: list[str]) -> int:
    """Print the plan."""
    parser = common.Parser(
        prog="enclos render",
        description="Print the operations that would make a container for you, in their order, without doing them.",
    )
    for option in OPTIONS:
        if option.arginfo:
            parser.add_argument(f"--{option.name}", metavar=option.arginfo, action="append", dest=option.key)
        else:
            parser.add_argument(f"--{option.name}", action="append_const", const=option.fixed, dest=option.key)
    parser.add_argument("--gpus", metavar="N[,N...]", default="", help="as if Slurm had granted these GPUs")
    common.add_json(parser)
    given = parser.parse_args(arguments)
    fields = {f"option.{option.key}": getattr(given, option.key) or [] for option in OPTIONS}
    if not any(fields.values()):
        raise errors.image_required("render")
    fields["gpus"] = [given.gpus]
    lines = render({key: values for key, values in fields.items() if values})
    if given.json:
        common.print_json(lines)
    else:
        print("\n".join(lines))
    return 0


def render(options: dict[str, list[str]]) -> list[str]:
    """The plans of a step of the caller, early and late, one line per operation."""
    wanted = request.parse({**_facts(), **options})
    loaded = config.load()
    decision = policy.decide(wanted, loaded.config)
    maps = container_maps(wanted.uid, wanted.gid, wanted.groups, decision.remap_root)
    slurm = slurmclient.find() if decision.slurm else None
    known = _gpu_files() if wanted.gpus or wanted.devices else None
    devices = asyncio.run(NodeDevices(node_name(), loaded.config).preview(wanted, decision.network, known))
    early = plan.make(wanted, decision, loaded.config, maps, plan.NodeFacts(STAGE, slurm=slurm, devices=devices))
    late = plan.late(wanted, decision, plan.slurm_directories(wanted))
    return [*early.describe(), "(the first task is here)", *late.describe()]


def _gpu_files() -> Files | None:
    """Of the agent, if there is one and it knows: with cgroup v2, slurmd answers root only."""
    try:
        known = client.ask("status").get("gpus")
    except errors.EnclosError:
        return None
    return None if known is None else tuple(tuple(paths) for paths in known)


def _facts() -> dict[str, Sequence[str]]:
    """What slurmstepd would say of a step of the caller."""
    numbers = {"job": EXAMPLE_JOB, "step": 0, "uid": os.getuid(), "gid": os.getgid(), "stepd": os.getpid(), "tasks": 1}
    facts = {key: [str(number)] for key, number in numbers.items()}
    facts["groups"] = [",".join(str(group_id) for group_id in os.getgroups())]
    facts |= {"spool": ["/var/spool/slurmd"], "tmpfs": ["/tmp"], "cwd": [os.getcwd()]}
    facts["home"] = [os.environ.get("HOME", "")]
    facts |= {f"env.{name}": [os.environ[name]] for name in VISIBLE_VARIABLES if name in os.environ}
    return dict(facts)
