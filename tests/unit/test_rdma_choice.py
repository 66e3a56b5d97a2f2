"""Which RDMA devices a step gets, and when it gets none."""

from __future__ import annotations

import pytest
from enclos.netns.rdma import CONNECTION_MANAGER, NodeDevice, NodeRdma
from enclos.runtime.devices import rdma
from enclos.runtime.devices.rdma import Candidate
from enclos.runtime.errors import EnclosError

UP = [NodeDevice(f"mlx5_{n}", n, True, f"/dev/infiniband/uverbs{n}") for n in range(3)]
DOWN = NodeDevice("mlx5_3", 3, False, "/dev/infiniband/uverbs3")
BARE = NodeDevice("mlx5_4", 4, True, "")
NODE = NodeRdma("shared", (*UP, DOWN, BARE))
ALL = ("mlx5_*",)


def names(text: str, *patterns: str, asked: bool = True, node: NodeRdma = NODE) -> list[str]:
    return [device.name for device in rdma.choose(text, asked, patterns, node)]


def test_auto_is_what_is_listed_and_active() -> None:
    assert names("auto", *ALL) == ["mlx5_0", "mlx5_1", "mlx5_2"]
    assert names("auto", "mlx5_1", "mlx5_3") == ["mlx5_1"]


def test_a_number_takes_the_first() -> None:
    assert names("2", *ALL) == ["mlx5_0", "mlx5_1"]
    with pytest.raises(EnclosError, match=r"--container-rdma=4: too few .* \(3\)"):
        names("4", *ALL)


def test_names_also_of_devices_whose_port_is_down() -> None:
    assert names("mlx5_3,mlx5_0,mlx5_3", *ALL) == ["mlx5_3", "mlx5_0"]
    with pytest.raises(EnclosError, match="RDMA device mlx5_0 is not for containers"):
        names("mlx5_3,mlx5_0", "mlx5_3")
    for name in ("mlx5_4", "mlx5_9"):
        with pytest.raises(EnclosError, match=f"no RDMA device {name} on this node \\(there are mlx5_0, mlx5_1"):
            names(name, *ALL)


def test_the_nodes_are_those_of_verbs_alone() -> None:
    (device,) = rdma.choose("1", True, ALL, NODE)
    assert [node.path for node in device.edits.nodes] == ["/dev/infiniband/uverbs0"]
    assert [(node.path, node.optional) for node in device.shared.nodes] == [(CONNECTION_MANAGER, True)]


@pytest.mark.parametrize(
    ("option", "default", "network", "mode", "text"),
    [
        ("", "none", "host", "exclusive", ""),
        ("", "auto", "host", "exclusive", "auto"),
        ("", "auto", "job", "exclusive", ""),
        ("", "auto", "job", "shared", ""),
        ("", "auto", "job", "soft", "auto"),
        ("", "auto", "none", "soft", ""),
        ("none", "auto", "host", "exclusive", ""),
        ("2", "none", "job", "exclusive", "2"),
        ("auto", "none", "none", "exclusive", "auto"),
    ],
)
def test_what_a_step_asks_for(option: str, default: str, network: str, mode: str, text: str) -> None:
    assert rdma.wanted(option, default, network, mode) == text


def test_who_asked_is_told_that_there_is_nothing() -> None:
    assert names("auto", *ALL, asked=False, node=NodeRdma("shared", ())) == []
    with pytest.raises(EnclosError, match="too few RDMA devices"):
        names("auto", *ALL, node=NodeRdma("shared", ()))
    with pytest.raises(EnclosError, match="too few RDMA devices"):
        names("auto")


@pytest.mark.parametrize(
    ("network", "mode", "kernel", "words"),
    [
        ("host", "exclusive", "", "this node has no RDMA"),
        ("job", "exclusive", "", "this node has no RDMA"),
        ("job", "exclusive", "shared", "RDMA isolation needs namespace mode exclusive, found shared"),
        ("job", "shared", "exclusive", "rdma.mode shared needs namespace mode shared, found exclusive"),
        ("job", "soft", "exclusive", "rdma.mode soft needs namespace mode shared, found exclusive"),
        ("none", "soft", "shared", "not possible on --container-network=none"),
        ("none", "exclusive", "exclusive", "not possible on --container-network=none"),
    ],
)
def test_what_a_mode_cannot_give_is_refused(network: str, mode: str, kernel: str, words: str) -> None:
    with pytest.raises(EnclosError) as caught:
        rdma.check("auto", network, mode, kernel)
    assert caught.value.line() == f"--container-rdma=auto: {words}"


@pytest.mark.parametrize(
    ("network", "mode", "kernel"),
    [
        ("host", "exclusive", "shared"),
        ("host", "soft", "exclusive"),
        ("job", "exclusive", "exclusive"),
        ("job", "shared", "shared"),
        ("job", "soft", "shared"),
        ("job", "soft", ""),
    ],
)
def test_what_a_mode_can_give(network: str, mode: str, kernel: str) -> None:
    rdma.check("auto", network, mode, kernel)


CANDIDATES = [
    Candidate("mlx5_2", busy="job 7 has it"),
    Candidate("mlx5_0"),
    Candidate("mlx5_1", ready=False),
    Candidate("mlx5_3", busy="its interface p0 has an address of the node"),
    Candidate("mlx5_4"),
    Candidate("storage0"),
]


def test_a_job_gets_what_is_free() -> None:
    assert rdma.choose_moving("auto", ALL, CANDIDATES) == ["mlx5_0", "mlx5_4"]
    assert rdma.choose_moving("1", ALL, CANDIDATES) == ["mlx5_0"]
    assert rdma.choose_moving("mlx5_4,mlx5_1", ALL, CANDIDATES) == ["mlx5_4", "mlx5_1"]


def test_what_a_job_has_comes_first() -> None:
    own = [*CANDIDATES, Candidate("mlx5_5", own=True)]
    assert rdma.choose_moving("1", ALL, own) == ["mlx5_5"]
    assert rdma.choose_moving("3", ALL, own) == ["mlx5_5", "mlx5_0", "mlx5_4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlx5_2", "RDMA device mlx5_2 is in use (job 7 has it)"),
        ("mlx5_0,mlx5_3", "RDMA device mlx5_3 is in use (its interface p0 has an address of the node)"),
        ("mlx5_9", "no RDMA device mlx5_9 on this node (there are mlx5_2, mlx5_0, mlx5_1, mlx5_3, mlx5_4)"),
        ("storage0", "RDMA device storage0 is not for containers (not in rdma.devices)"),
        (
            "3",
            "too few RDMA devices are active and for containers (2) (mlx5_2: job 7 has it; "
            "mlx5_3: its interface p0 has an address of the node)",
        ),
    ],
)
def test_a_job_does_not_get_what_others_need(text: str, words: str) -> None:
    with pytest.raises(EnclosError) as caught:
        rdma.choose_moving(text, ALL, CANDIDATES)
    assert caught.value.line() == f"--container-rdma={text}: {words}"


def test_nothing_is_too_few_for_who_asked() -> None:
    with pytest.raises(EnclosError, match=r"too few .* \(0\)"):
        rdma.choose_moving("auto", ALL, [])
