"""Which devices a step gets: the grant is never exceeded, whatever names them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from enclos.runtime import errors
from enclos.runtime.devices import choice, gres
from enclos.runtime.devices.catalogue import Catalogue
from enclos.runtime.devices.cdi import Device, Edits, Node
from enclos.runtime.devices.choice import choose, narrow, renumber

SHARED = Edits(("NVIDIA_VISIBLE_DEVICES=void", "LIBRARY=x"), (Node("/dev/nvidiactl", "/dev/nvidiactl", "f"),))


def device(name: str, *nodes: str, kind: str = "nvidia.com/gpu", shared: Edits = SHARED) -> Device:
    return Device(kind, name, Edits(nodes=tuple(Node(node, node, "f") for node in nodes)), shared, "f")


FILES = tuple((f"/dev/nvidia{number}",) for number in range(4))
# As nvidia-ctk writes them: by index and by UUID, with the nodes of the display, and one device that is all of them.
GPUS = [device(str(n), f"/dev/nvidia{n}", f"/dev/dri/card{n + 1}") for n in range(4)]
UUIDS = [device(f"GPU-{n}{n}{n}", f"/dev/nvidia{n}", f"/dev/dri/card{n + 1}") for n in range(4)]
EVERY = device("all", *(f"/dev/nvidia{n}" for n in range(4)))
FPGA = device("0", "/dev/fpga0", kind="acme.com/fpga", shared=Edits())
CATALOGUE = Catalogue({d.qualified: d for d in [*UUIDS, EVERY, *GPUS, FPGA]})


def names(granted: Sequence[int], *named: tuple[str, str], allow: Sequence[str] = ()) -> list[str]:
    return [d.qualified for d in choose(granted, named, allow, CATALOGUE, FILES).devices]


def test_a_grant_is_what_slurm_numbered() -> None:
    assert names([]) == []
    assert names([2, 3]) == ["nvidia.com/gpu=2", "nvidia.com/gpu=3"]


def test_the_device_is_found_by_its_file_and_not_by_its_name() -> None:
    """NVML counts by bus, Slurm by the list of gres.conf."""
    crossed = (("/dev/nvidia3",), ("/dev/nvidia1",))
    assert [d.name for d in choose([0], [], [], CATALOGUE, crossed).devices] == ["3"]


def test_a_gpu_of_several_files() -> None:
    parts = [device(f"0:{n}", "/dev/nvidia0", f"/dev/nvidia-caps/nvidia-cap{n}") for n in range(2)]
    catalogue = Catalogue({d.qualified: d for d in [*GPUS, EVERY, *parts]})
    files = [("/dev/nvidia0", f"/dev/nvidia-caps/nvidia-cap{n}") for n in range(2)]
    assert [d.name for d in choose([1], [], [], catalogue, files).devices] == ["0:1"]


def test_a_gpu_that_no_file_describes() -> None:
    catalogue = Catalogue({d.qualified: d for d in GPUS[:1]})
    found = choose([0, 1], [], [], catalogue, FILES)
    assert [d.name for d in found.devices] == ["0"]
    assert found.notices == ("GPU 1 (/dev/nvidia1) is in no CDI file of this node, ignoring",)
    with pytest.raises(errors.EnclosError, match=r"/etc/cdi/x\.json: this CDI file cannot be used \(line 1\)"):
        choose([0, 1], [], [], Catalogue(catalogue.devices, {}, {"/etc/cdi/x.json": "line 1"}), FILES)
    with pytest.raises(errors.EnclosError, match="Slurm granted GPU 7, but the list of this node's GPUs has 4"):
        choose([7], [], [], catalogue, FILES)


@pytest.mark.parametrize("allow", [[], ["*"], ["nvidia.com/gpu=*"]])
def test_no_option_and_no_pattern_opens_what_was_not_granted(allow: list[str]) -> None:
    for name in ("3", "GPU-333"):
        with pytest.raises(errors.EnclosError, match="Slurm did not grant this GPU to the step"):
            names([0], ("nvidia.com/gpu", name), allow=allow)
    assert names([0, 1], ("nvidia.com/gpu", "all"), allow=allow)[:2] == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert not {"nvidia.com/gpu=2", "nvidia.com/gpu=all"} & set(names([0, 1], ("nvidia.com/gpu", "all"), allow=allow))


@pytest.mark.parametrize("allow", [[], ["*"]])
def test_the_nodes_of_a_step_are_never_more_than_its_grant(allow: list[str]) -> None:
    """Every grant, with every one or two names that the file has."""
    every = [d.name for d in [*GPUS, *UUIDS, EVERY]]
    wishes = [*itertools.combinations(every, 1), *itertools.combinations(every, 2)]
    given = 0
    for granted in (set for size in range(5) for set in itertools.combinations(range(4), size)):
        forbidden = {f"/dev/nvidia{n}" for n in range(4) if n not in granted}
        for wish in wishes:
            try:
                found = choose(granted, [("nvidia.com/gpu", name) for name in wish], allow, CATALOGUE, FILES)
            except errors.EnclosError:
                continue
            given += 1
            assert not {node.host_path for node in found.edits().nodes} & forbidden
    assert given > 100, "hardly anything was given: the test shows nothing"


def test_what_a_file_gives_all_devices_does_not_exceed_the_grant_either() -> None:
    careless = Edits(nodes=tuple(Node(path, path, "f") for (path,) in FILES))
    catalogue = Catalogue({"nvidia.com/gpu=0": device("0", "/dev/nvidia0", shared=careless)})
    found = choose([0], [], [], catalogue, FILES)
    assert [node.path for node in found.edits().nodes] == ["/dev/nvidia0"]


def test_devices_that_slurm_does_not_manage_need_the_sites_word() -> None:
    for name in ("0", "all"):
        with pytest.raises(errors.EnclosError, match="this device is not allowed"):
            names([], ("acme.com/fpga", name))
        assert names([], ("acme.com/fpga", name), allow=["acme.com/fpga=?"]) == ["acme.com/fpga=0"]
    with pytest.raises(errors.EnclosError, match="this device is not allowed"):
        names([], ("acme.com/fpga", "0"), allow=["acme.com/gpu=*", "other.com/fpga=0"])


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(errors.EnclosError, match=r"no such device on this node \(there are acme.com/fpga=0, .*, …\)"):
        names([], ("acme.com/fpga", "9"), allow=["*"])
    with pytest.raises(errors.EnclosError, match=r"no such device on this node \(it has no CDI files\)"):
        choose([], [("acme.com/fpga", "all")], ["*"], Catalogue(), FILES)


# ---------------------------------------------------------------- variables


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("all", [1, 2, 3]),
        ("0", [1]),
        ("2,0", [1, 3]),
        ("GPU-222", [2]),
        (" 1 , GPU-333 ", [2, 3]),
        ("", []),
        ("void", []),
        ("none", []),
        ("0,all", [1, 2, 3]),
    ],
)
def test_nvidia_visible_devices(value: str, kept: list[int]) -> None:
    found = narrow(choose([1, 2, 3], [], [], CATALOGUE, FILES), {"NVIDIA_VISIBLE_DEVICES": value})
    assert [gpu.number for gpu in found.gpus] == kept
    assert found.notices == ()
    shared = "/dev/nvidiactl" in [node.path for node in found.edits().nodes]
    assert shared is (bool(kept) or value == "none")


@pytest.mark.parametrize("entry", ["3", "7", "GPU-000", "nonsense", "-1", "²"])
def test_what_is_visible_is_never_more_than_the_grant(entry: str) -> None:
    found = narrow(choose([1, 2], [], [], CATALOGUE, FILES), {"NVIDIA_VISIBLE_DEVICES": f"0,{entry}"})
    assert [gpu.number for gpu in found.gpus] == [1]
    assert found.notices == (f"NVIDIA_VISIBLE_DEVICES: {entry} is not among the step's GPUs, ignoring",)


def test_a_vendors_variable_is_for_its_own_gpus() -> None:
    amd = device("0", "/dev/dri/renderD128", kind="amd.com/gpu")
    other = device("0", "/dev/gpu0", kind="acme.com/gpu")
    catalogue = Catalogue({d.qualified: d for d in (amd, other)})
    chosen = choose([0, 1], [], [], catalogue, (("/dev/gpu0",), ("/dev/dri/renderD128",)))
    assert [gpu.number for gpu in narrow(chosen, {"NVIDIA_VISIBLE_DEVICES": "void"}).gpus] == [0, 1]
    assert [gpu.number for gpu in narrow(chosen, {"AMD_VISIBLE_DEVICES": "void"}).gpus] == [0]


def test_a_file_sets_no_variable_that_would_reach_nested_steps_or_slurms_own() -> None:
    shared = Edits(("NVIDIA_VISIBLE_DEVICES=void", "CUDA_VISIBLE_DEVICES=9", "SLURM_JOB_ID=1", "GOOD=1"))
    catalogue = Catalogue({"nvidia.com/gpu=0": device("0", "/dev/nvidia0", shared=shared)})
    assert choose([0], [], [], catalogue, FILES).edits().environment == ("GOOD=1",)


@pytest.mark.parametrize(
    ("granted", "numbers", "kept", "places"),
    [
        ([0, 1], [0, 1], [0, 1], {}),
        ([2, 3], [0, 1], [2, 3], {}),  # ConstrainDevices: places in the grant already
        ([2, 3], [2, 3], [2, 3], {2: 0, 3: 1}),  # the node's numbers
        ([2, 3], [0, 1], [3], {1: 0}),
        ([2, 3], [2, 3], [3], {3: 0}),
        ([2, 3], [], [2, 3], {}),  # Slurm set no such variable
    ],
)
def test_numbers_become_places_in_the_container(
    granted: list[int], numbers: list[int], kept: list[int], places: dict[int, int]
) -> None:
    assert renumber(granted, numbers, kept) == places


def test_all_gpus_taken_away_leaves_no_number() -> None:
    assert choice.renumber([2], [2], []) == {}


# ---------------------------------------------------------------- slurmd -G


def test_the_list_of_slurmd() -> None:
    output = """\
slurmd: Gres Name=gpu Type=b Count=2 Index=0 ID=7696487 File=/dev/nvidia[2-3] (null)
slurmd: Gres Name=gpu Type=a Count=2 Index=1 ID=7696487 File=/dev/nvidia0,/dev/nvidia1 (null)
slurmd: Gres Name=nic Type=(null) Count=1 Index=0 ID=7696488 File=/dev/nic0 (null)
slurmd: Gres Name=gpu Type=mig Count=1 Index=2 ID=7696487 File=/dev/nvidia9,/dev/nvidia-caps/nvidia-cap[21-22] Cores=0-3
slurmd: Gres Name=gpu Type=(null) Count=1 Index=3 ID=7696487 File=(null) (null)
"""
    assert gres.parse(output) == (
        *(("/dev/nvidia2",), ("/dev/nvidia3",), ("/dev/nvidia0",), ("/dev/nvidia1",)),
        ("/dev/nvidia9", "/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap22"),
        (),
    )
    with pytest.raises(errors.EnclosError, match="Count=3 with File=/dev/a,/dev/b"):
        gres.parse("Gres Name=gpu Type=x Count=3 Index=0 ID=1 File=/dev/a,/dev/b")


def test_the_sites_own_list() -> None:
    found = asyncio.run(gres.GpuList("n1", ["/dev/nvidia[0-1]", "/dev/nvidia7"]).files("", 0))
    assert found == (("/dev/nvidia0",), ("/dev/nvidia1",), ("/dev/nvidia7",))


def test_a_slurmd_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurmd = tmp_path / "slurmd"
    slurmd.write_text("#!/bin/sh\necho 'slurmd: fatal: no such gres'\nexit 1\n")
    slurmd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(errors.EnclosError, match=r"slurmd -G: slurmd: fatal: no such gres"):
        asyncio.run(gres.ask("n1"))


def test_slurmd_is_asked_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurmd, conf, count = tmp_path / "slurmd", tmp_path / "gres.conf", tmp_path / "count"
    slurmd.write_text(f"#!/bin/sh\necho x >> {count}\ncat {conf}\n")
    slurmd.chmod(0o755)
    (tmp_path / "slurm.conf").write_text("")
    record = "Gres Name=gpu Type=(null) Count=1 Index=0 ID=1 File=/dev/nvidia%d\n"
    conf.write_text(record % 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    async def ask() -> list[gres.Files]:
        gpus = gres.GpuList("n1", ())
        found = list(await asyncio.gather(*(gpus.files(str(tmp_path / "slurm.conf"), 0) for _ in range(3))))
        conf.write_text(record % 0 + record % 1)
        return [*found, await gpus.files(str(tmp_path / "slurm.conf"), 0)]

    one, two = (("/dev/nvidia0",),), (("/dev/nvidia0",), ("/dev/nvidia1",))
    assert asyncio.run(ask()) == [one, one, one, two]
    assert count.read_text() == "x\nx\n"
