"""CDI files: every version's fields, and what is wrong with a wrong one, by its place."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from enclos.runtime import errors
from enclos.runtime.devices import cdi
from enclos.runtime.devices.cdi import Bind, BrokenFile, Link, Node
from enclos.runtime.devices.registry import Registry, read
from hypothesis import given
from hypothesis import strategies as st

FILE = "/etc/cdi/nvidia.json"

# As `nvidia-ctk cdi generate` writes it, shortened.
NVIDIA: dict[str, Any] = {
    "cdiVersion": "0.5.0",
    "kind": "nvidia.com/gpu",
    "devices": [
        {
            "name": "0",
            "containerEdits": {
                "deviceNodes": [{"path": "/dev/nvidia0"}, {"path": "/dev/dri/card1", "hostPath": "/dev/dri/card1"}],
                "hooks": [
                    {
                        "hookName": "createContainer",
                        "path": "/usr/bin/nvidia-ctk",
                        "args": ["nvidia-ctk", "hook", "chmod", "--mode", "755", "--path", "/dev/dri"],
                    }
                ],
            },
        },
        {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
    ],
    "containerEdits": {
        "env": ["NVIDIA_VISIBLE_DEVICES=void"],
        "deviceNodes": [{"path": "/dev/nvidiactl"}],
        "mounts": [
            {
                "hostPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.14",
                "containerPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.14",
                "options": ["ro", "nosuid", "nodev", "bind"],
            }
        ],
        "hooks": [
            {
                "hookName": "createContainer",
                "path": "/usr/bin/nvidia-ctk",
                "args": ["nvidia-ctk", "hook", "create-symlinks", "--link", "libcuda.so.1::/usr/lib/libcuda.so"],
            },
            {
                "hookName": "createContainer",
                "path": "/usr/bin/nvidia-cdi-hook",
                "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "/usr/lib64", "--folder=/usr/lib32"],
            },
        ],
    },
}


def changed(place: str, value: object) -> dict[str, Any]:
    """The file with something else at a place such as devices.0.name."""
    document = copy.deepcopy(NVIDIA)
    *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
    target: Any = document
    for part in path:
        target = target[part]
    target[last] = value
    return document


def test_a_file_of_nvidia() -> None:
    gpu, every = cdi.parse(NVIDIA, FILE)
    assert (gpu.qualified, every.qualified) == ("nvidia.com/gpu=0", "nvidia.com/gpu=all")
    assert gpu.edits.nodes == (
        Node("/dev/nvidia0", "/dev/nvidia0", FILE),
        Node("/dev/dri/card1", "/dev/dri/card1", FILE),
    )
    assert gpu.host_nodes == {"/dev/nvidia0", "/dev/dri/card1"}
    assert gpu.edits.left_out == ()
    library = "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.14"
    assert gpu.shared.mounts == (Bind(library, library, True, False, FILE),)
    assert gpu.shared.links == (Link("/usr/lib/libcuda.so", "libcuda.so.1"),)
    assert gpu.shared.linker_folders == ("/usr/lib32", "/usr/lib64")
    assert gpu.shared.environment == ("NVIDIA_VISIBLE_DEVICES=void",)


@pytest.mark.parametrize("version", [*cdi.VERSIONS, "0.6.7", "v0.5.0"])
def test_versions(version: str) -> None:
    assert len(cdi.parse(changed("cdiVersion", version), FILE)) == 2


BROKEN: dict[str, tuple[str, object, str]] = {
    "no version": ("cdiVersion", None, "cdiVersion: expected a version such as 0.6.0"),
    "a version to come": ("cdiVersion", "2.0.0", "cdiVersion: 2.0.0 is not known (known: 0.3.0 to 1.1.0)"),
    "before the first": ("cdiVersion", "0.2.0", "cdiVersion: 0.2.0 is not known (known: 0.3.0 to 1.1.0)"),
    "a kind without vendor": ("kind", "gpu", "kind: expected VENDOR/CLASS, such as nvidia.com/gpu"),
    "no devices": ("devices", [], "devices: expected at least one"),
    "devices of another form": ("devices", {"0": {}}, "devices: expected a list"),
    "a name twice": ("devices.1.name", "0", "devices[1].name: 0 is there twice"),
    "a name with a slash": ("devices.0.name", "a/b", "devices[0].name: expected letters, digits, . _ - and :"),
    "a slip": ("devices.0.containerEdits.deviceNode", [], "devices[0].containerEdits: unknown field deviceNode"),
    "a node outside of /dev": (
        "devices.0.containerEdits.deviceNodes.0.path",
        "/etc/nvidia0",
        "devices[0].containerEdits.deviceNodes[0].path: expected a path below /dev",
    ),
    "a way out of /dev": (
        "devices.0.containerEdits.deviceNodes.0.path",
        "/dev/../etc/x",
        "devices[0].containerEdits.deviceNodes[0].path: expected an absolute path without ..",
    ),
    "a variable without a value": ("containerEdits.env", ["A"], "containerEdits.env[0]: expected NAME=VALUE"),
    "a mount on the root": (
        "containerEdits.mounts.0.containerPath",
        "/",
        "containerEdits.mounts[0].containerPath: /: nothing is mounted there",
    ),
    "a file system": (
        "containerEdits.mounts.0",
        {"hostPath": "/x", "containerPath": "/y", "type": "proc", "options": ["ro"]},
        "containerEdits.mounts[0].type: proc: only bind mounts are made",
    ),
    "a mount option": (
        "containerEdits.mounts.0.options",
        ["suid"],
        "containerEdits.mounts[0].options: suid is not known",
    ),
    "a link without a place": (
        "containerEdits.hooks.0.args",
        ["nvidia-ctk", "hook", "create-symlinks", "--link", "libcuda.so.1"],
        "containerEdits.hooks[0].args: expected --link DESTINATION::PATH",
    ),
    "a hook without a program": (
        "containerEdits.hooks.0.path",
        "nvidia-ctk",
        "containerEdits.hooks[0].path: expected an absolute path without ..",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_the_place(case: str) -> None:
    place, value, words = BROKEN[case]
    with pytest.raises(BrokenFile) as caught:
        cdi.parse(changed(place, value), FILE)
    assert str(caught.value) == words


@pytest.mark.parametrize("document", [None, [], "text", 3])
def test_a_document_that_is_no_object(document: object) -> None:
    with pytest.raises(BrokenFile, match="the file: expected fields and values"):
        cdi.parse(document, FILE)


KEYS = st.sampled_from(["cdiVersion", "kind", "devices", "name", "containerEdits", "hooks", "mounts", "env"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
DOCUMENTS = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=4), max_leaves=12
)


@given(DOCUMENTS)
def test_whatever_is_in_a_file_only_one_error_comes_out(document: object) -> None:
    for value in (document, {**NVIDIA, "containerEdits": document}, {**NVIDIA, "devices": document}):
        try:
            cdi.parse(value, FILE)
        except BrokenFile:
            continue


def test_what_is_left_out_is_said() -> None:
    edits = {
        "intelRdt": {"closID": "x"},
        "additionalGids": [44],
        "netDevices": [{"hostInterfaceName": "eth1", "name": "eth1"}],
        "hooks": [{"hookName": "createRuntime", "path": "/opt/acme/setup", "args": ["setup", "reset"]}],
    }
    (device,) = cdi.parse(
        {"cdiVersion": "1.1.0", "kind": "acme.com/fpga", "devices": [{"name": "a", "containerEdits": edits}]}, FILE
    )
    assert device.edits.left_out == (
        "cache and memory bandwidth classes (intelRdt) are Slurm's",
        "additional groups (additionalGids) are not given",
        "network interfaces (netDevices) are not moved",
        "its hook setup reset is not run",
    )


def test_edits_merge_by_place() -> None:
    first = cdi.Edits(("A=1",), (Node("/dev/a", "/dev/a", "f"),), linker_folders=("/x",))
    second = cdi.Edits(("A=2", "B=1"), (Node("/dev/a", "/dev/b", "g"), Node("/dev/c", "/dev/c", "g")))
    merged = cdi.merge([first, second])
    assert merged.environment == ("A=2", "B=1")
    assert [node.host_path for node in merged.nodes] == ["/dev/a", "/dev/c"]
    assert merged.linker_folders == ("/x",)


# ---------------------------------------------------------------- the files of a node


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("files that only root can write: needs root")
    for name in ("etc", "run"):
        (tmp_path / name).mkdir(mode=0o755)
    return [str(tmp_path / "etc"), str(tmp_path / "run")]


def spec(*names: str, kind: str = "acme.com/fpga", node: str = "/dev/null") -> dict[str, Any]:
    devices = [{"name": name, "containerEdits": {"deviceNodes": [{"path": node}]}} for name in names]
    return {"cdiVersion": "0.6.0", "kind": kind, "devices": devices}


def put(directory: str, name: str, content: object) -> Path:
    path = Path(directory, name)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o644)
    return path


def test_both_formats_and_both_directories(directories: list[str]) -> None:
    etc, run = directories
    put(etc, "a.json", spec("0", "1"))
    put(run, "b.yaml", 'cdiVersion: "0.6.0"\nkind: acme.com/net\ndevices:\n- {name: 7, containerEdits: {}}\n')
    put(run, "notes.txt", "nothing")
    assert sorted(read(directories).devices) == ["acme.com/fpga=0", "acme.com/fpga=1", "acme.com/net=7"]


def test_the_later_directory_counts(directories: list[str]) -> None:
    etc, run = directories
    put(etc, "a.json", spec("0", node="/dev/null"))
    put(run, "a.json", spec("0", node="/dev/zero"))
    assert read(directories).get("acme.com/fpga=0").host_nodes == {"/dev/zero"}


def test_two_files_of_one_directory_are_a_conflict_when_asked_for(directories: list[str]) -> None:
    etc, run = directories
    put(etc, "a.json", spec("0", "1"))
    put(etc, "b.json", spec("0"))
    found = read(directories)
    assert found.get("acme.com/fpga=1").file == f"{etc}/a.json"
    with pytest.raises(errors.EnclosError, match=r"two CDI files describe it \(.*/a\.json and .*/b\.json\)"):
        found.get("acme.com/fpga=0")
    put(run, "c.json", spec("0"))
    assert read(directories).get("acme.com/fpga=0").file == f"{run}/c.json"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "line 1: expecting property name enclosed in double quotes"),
        ("a.yaml", "a: b: c\n", "line 1: mapping values are not allowed"),
        ("a.json", "[]", "the file: expected fields and values"),
        ("a.yaml", "a: \x01\n", "not a text that can be read"),
    ],
)
def test_a_broken_file_counts_only_when_a_device_is_missing(
    directories: list[str], name: str, content: str, words: str
) -> None:
    put(directories[0], name, content)
    put(directories[1], "good.json", spec("0"))
    found = read(directories)
    assert found.get("acme.com/fpga=0").name == "0"
    with pytest.raises(errors.EnclosError) as caught:
        found.get("acme.com/fpga=1")
    assert caught.value.subject == f"{directories[0]}/{name}"
    assert words in caught.value.cause
    with pytest.raises(errors.EnclosError, match="this CDI file cannot be used"):
        found.of_kind("acme.com/net")


@pytest.mark.parametrize("what", ["owner", "mode", "directory"])
def test_only_roots_files_are_believed(directories: list[str], what: str) -> None:
    path = put(directories[0], "a.json", spec("0"))
    match what:
        case "owner":
            os.chown(path, 1001, 0)
        case "mode":
            path.chmod(0o664)
        case "directory":
            os.chmod(directories[0], 0o777)
    with pytest.raises(errors.EnclosError, match="can be written by others than root"):
        read(directories).get("acme.com/fpga=0")


def test_a_change_is_noticed_at_the_next_look(directories: list[str]) -> None:
    registry = Registry(directories)
    assert registry.catalogue().devices == {}
    path = put(directories[0], "a.json", spec("0"))
    first = registry.catalogue()
    assert list(first.devices) == ["acme.com/fpga=0"]
    assert registry.catalogue() is first, "parsed again without a change"
    put(directories[0], "a.json", spec("1"))
    assert list(registry.catalogue().devices) == ["acme.com/fpga=1"]
    os.chmod(directories[0], 0o777)
    assert list(registry.catalogue().devices) == []
    os.chmod(directories[0], 0o755)
    assert list(registry.catalogue().devices) == ["acme.com/fpga=1"]
    path.unlink()
    assert list(registry.catalogue().devices) == []
