"""The plan of a container, as golden files: a change of the order of things has to be seen by a person.

UPDATE_GOLDEN=1 writes the files anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from enclos.runtime import builder, config, errors, plan, policy, request, settings
from enclos.runtime import operations as op
from enclos.runtime.devices.cdi import Bind, Device, Edits, Node
from enclos.runtime.devices.choice import Gpu, Selection
from enclos.runtime.idmap import container_maps

GOLDEN = Path(__file__).parent.parent / "golden/plans"
FACTS = {
    "job": ["7"],
    "step": ["0"],
    "uid": ["1001"],
    "gid": ["1001"],
    "groups": ["1001,2000,2001"],
    "stepd": ["4242"],
    "tasks": ["2"],
    "spool": ["/var/spool/slurmd"],
    "tmpfs": ["/tmp"],
    "cwd": ["/scratch/ada"],
    "home": ["/home/ada"],
    "option.image": ["/images/mpi.sqsh"],
}
CASES: dict[str, dict[str, list[str]]] = {
    "host": {},
    "job": {"option.network": ["job"], "option.workdir": ["/data"]},
    "readonly": {"option.readonly": ["1"], "option.network": ["none"]},
    "root": {"option.remap-root": ["1"], "option.mount-home": ["0"]},
    "mounts": {"option.mounts": ["/scratch:/data:ro,tmpfs:/fast:size=1G,./in:/in:nofail"], "option.mount-home": ["1"]},
    "devices": {"option.mounts": ["/data"], "env.NVIDIA_VISIBLE_DEVICES": ["all"]},
    "batch": {"step": [str(request.BATCH_STEP)], "option.network": ["job"]},
}

FILE = "/etc/cdi/nvidia.yaml"
LIBRARY = "/usr/lib64/libcuda.so.77"
SHARED = Edits(mounts=(Bind(LIBRARY, LIBRARY, True, False, FILE),), linker_folders=("/usr/lib64",))
GPU = Device("nvidia.com/gpu", "0", Edits(nodes=(Node("/dev/nvidia0", "/dev/nvidia0", FILE),)), SHARED, FILE)
DEVICES = Selection(gpus=(Gpu(0, GPU, ("0",)),))


def make(case: str, settings: bytes = b"", cgroup: str = "/sys/fs/cgroup/step_0/user") -> builder.Plan:
    wanted = request.parse({**FACTS, **CASES[case]})
    loaded = config.parse(settings, "enclos.yaml", {})
    decision = policy.decide(wanted, loaded.config)
    maps = container_maps(wanted.uid, wanted.gid, wanted.groups, decision.remap_root)
    devices = DEVICES if case == "devices" else Selection()
    node = plan.NodeFacts("/run/enclos/stage", cgroup, devices=devices)
    early = plan.make(wanted, decision, loaded.config, maps, node)
    late = plan.late(wanted, decision, plan.slurm_directories(wanted))
    return builder.Plan(wanted.uid, wanted.gid, wanted.groups, (*early.operations, *late.operations))


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_as_it_was_reviewed(case: str) -> None:
    found = "\n".join(make(case).describe()) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


KEPT = {
    "named-created": plan.Kept("/run/enclos/named/1001.7.1"),
    "named-started": plan.Kept("/run/enclos/named/1001.7.1", "/local/enclos/1001.7.1.ext4", "fe00-1-2-3-4"),
    "named-beside": plan.Kept("/run/enclos/named/1001.7.1", image_key="fe00-1-2-3-4", beside=True),
    "named-entered": None,
}


@pytest.mark.parametrize("case", KEPT)
def test_the_plan_of_a_named_container_is_as_it_was_reviewed(case: str) -> None:
    wanted = request.parse({**FACTS, "option.name": ["work"]})
    loaded = config.parse(b"", "enclos.yaml", {})
    decision = policy.decide(wanted, loaded.config)
    maps = container_maps(wanted.uid, wanted.gid, wanted.groups, decision.remap_root)
    node = plan.NodeFacts("/run/enclos/stage")
    directories = plan.slurm_directories(wanted)
    kept = KEPT[case]
    early = plan.make(wanted, decision, loaded.config, maps, node, kept=kept) if kept else plan.enter(wanted)
    late = plan.late(wanted, decision, directories) if kept else plan.late_entered(wanted, directories)
    found = "\n".join([*early.describe(), *late.describe()]) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


def names(case: str) -> list[str]:
    return [type(operation).__name__ for operation in make(case).operations]


@pytest.mark.parametrize("case", CASES)
def test_users_paths_are_cloned_only_where_what_lies_below_is_locked(case: str) -> None:
    found = names(case)
    if "CloneSource" in found:
        assert found.index("EnterNamespaces") < found.index("CloneSource") < found.index("EnterRoot")


def test_root_looks_nothing_up_in_the_mounts_of_a_job() -> None:
    wanted = request.parse({**FACTS, "option.mounts": ["/tmp/x:/x"]})
    decision = policy.decide(wanted, settings.Config())
    node = plan.NodeFacts("/stage", "/sys/fs/cgroup/step_0/user", own_mounts=True)
    made = plan.make(wanted, decision, settings.Config(), container_maps(1, 1, ()), node)
    found = [type(operation).__name__ for operation in made.operations]
    assert found.index("TakeMounts") < found.index("OpenImage")
    assert found[found.index("JoinMounts") + 1] == "BecomeUser"
    assert "JoinMounts" not in names("mounts")


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_staged_as_root_after_the_user_is_taken(case: str) -> None:
    found = names(case)
    later = found[found.index("BecomeUser") :]
    staged = {"OpenImage", "StageFilesystem", "StageDevices", "SelectDevices", "CloneHostPath", "LookUpAccounts"}
    assert not staged & set(later)


@pytest.mark.parametrize("case", CASES)
def test_every_descriptor_that_is_attached_was_made(case: str) -> None:
    makers = [operation for operation in make(case).operations if not isinstance(operation, op.Attach)]
    made = {getattr(operation, "name", "") for operation in makers}
    made |= set(plan.slurm_directories(request.parse({**FACTS, **CASES[case]})))
    for operation in make(case).operations:
        if isinstance(operation, op.Attach):
            assert operation.name in made


@pytest.mark.parametrize("case", CASES)
def test_what_cdi_files_mount_is_cloned_as_the_user_too(case: str) -> None:
    found = names(case)
    assert ("CloneDevices" in found) is (case == "devices")
    if case == "devices":
        assert found.index("EnterNamespaces") < found.index("CloneDevices") < found.index("EnterRoot")
        assert found.index("SelectDevices") < found.index("StageDevices")


@pytest.mark.parametrize("case", CASES)
def test_a_plan_travels_through_a_memfd(case: str) -> None:
    made = make(case)
    assert builder.load_plan(builder.store_plan(made)) == made


def test_without_cgroup_v2_nothing_of_it_is_shown() -> None:
    assert not any("cgroup" in line for line in make("host", cgroup="").describe())


def test_home_without_a_home_is_refused() -> None:
    wanted = request.parse({**FACTS, "home": [""], "option.mount-home": ["1"]})
    decision = policy.decide(wanted, config.parse(b"", "enclos.yaml", {}).config)
    with pytest.raises(errors.EnclosError, match="home"):
        plan.make(wanted, decision, settings.Config(), container_maps(1, 1, ()), plan.NodeFacts("/stage"))


def test_the_sites_mounts_come_before_the_users() -> None:
    lines = make("mounts", b'mounts: {site: ["/opt/site:/opt/site:ro"]}').describe()
    sources = [line.split()[1] for line in lines if line.startswith("clone /")]
    assert sources == ["/opt/site", "/home/ada", "/scratch", "/scratch/ada/in"]
