"""The site's command for RDMA devices: what it gets, and what its failures read like."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from enclos.netns.rdmamove import Interface, Movable
from enclos.runtime.devices import sitehook
from enclos.runtime.devices.sitehook import Numbers
from enclos.runtime.errors import EnclosError

MOVABLE = Movable(
    0x0C42A1030065A6F2,
    "mlx5_3",
    (Interface("p0v1", "02:00:00:00:00:01", False), Interface("ib0", "02:00:00:00:00:02", True)),
    (0x0C42A1030065A6F3, 0x0C42A1030065A6F4),
)


def run(folder: Path, script: str, deadline: float = 10) -> None:
    command = folder / "hook"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    asyncio.run(sitehook.run(str(command), "attach", Numbers(4711, 4712, 4713), MOVABLE, deadline))


def test_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_AGENT", "1")
    told = tmp_path / "told"
    shown = "env | grep -v -e PWD -e SHLVL -e ^_ | sort"
    run(tmp_path, f'{{ echo "$*"; {shown}; pwd; }} > {told}')
    assert told.read_text() == (
        "attach\n"
        "ENCLOS_DEVICE=mlx5_3\n"
        "ENCLOS_GUID=0c42:a103:0065:a6f2\n"
        "ENCLOS_INTERFACES=p0v1 ib0\n"
        "ENCLOS_JOB=4712\n"
        "ENCLOS_PORT_GUIDS=0c42:a103:0065:a6f3 0c42:a103:0065:a6f4\n"
        "ENCLOS_TENANT=job4711\n"
        "ENCLOS_VNI=4713\n"
        f"PATH={sitehook.PATH}\n"
        "/\n"
    )


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("echo first >&2; echo 'the subnet manager does not answer' >&2; exit 3", "the subnet manager does not answer"),
        ("exit 3", "exit status 3"),
        ("kill -9 $$", "exit status -9"),
        ("exec sleep 60", "took more than 0 s"),
    ],
)
def test_how_it_fails(tmp_path: Path, script: str, detail: str) -> None:
    with pytest.raises(EnclosError) as caught:
        run(tmp_path, script, 0.4 if "sleep" in script else 10)
    assert caught.value.line() == f"rdma.hook: {tmp_path}/hook failed ({detail})"


def test_one_that_is_not_there() -> None:
    with pytest.raises(EnclosError) as caught:
        asyncio.run(sitehook.run("/nowhere/hook", "detach", Numbers(1, 1, 2), MOVABLE, 1))
    assert caught.value.line() == "rdma.hook: /nowhere/hook failed (No such file or directory)"
