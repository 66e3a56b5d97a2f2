"""Which RDMA devices a step gets, and when it gets none."""

from __future__ import annotations

import pytest
from enclos.netns.rdma import CONNECTION_MANAGER, NodeDevice, NodeRdma
from enclos.runtime.devices import rdma
from enclos.runtime.errors import EnclosError

UP = [NodeDevice(f"mlx5_{n}", n, True, f"/dev/infiniband/uverbs{n}") for n in range(3)]
DOWN = NodeDevice("mlx5_3", 3, False, "/dev/infiniband/uverbs3")
BARE = NodeDevice("mlx5_4", 4, True, "")
NODE = NodeRdma("shared", (*UP, DOWN, BARE))
ALL = ("mlx5_*",)


def names(text: str, *patterns: str, asked: bool = True, node: NodeRdma = NODE) -> list[str]:
    return [device.name for device in rdma.choose(text, asked, "host", patterns, node)]


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
    (device,) = rdma.choose("1", True, "host", ALL, NODE)
    assert [node.path for node in device.edits.nodes] == ["/dev/infiniband/uverbs0"]
    assert [(node.path, node.optional) for node in device.shared.nodes] == [(CONNECTION_MANAGER, True)]


@pytest.mark.parametrize(
    ("option", "default", "network", "text"),
    [
        ("", "none", "host", ""),
        ("", "auto", "host", "auto"),
        ("", "auto", "job", ""),
        ("none", "auto", "host", ""),
        ("2", "none", "job", "2"),
        ("auto", "none", "none", "auto"),
    ],
)
def test_what_a_step_asks_for(option: str, default: str, network: str, text: str) -> None:
    assert rdma.wanted(option, default, network) == text


def test_who_asked_is_told_that_there_is_nothing() -> None:
    for node in (NodeRdma("", ()), NodeRdma("shared", ())):
        assert names("auto", *ALL, asked=False, node=node) == []
        with pytest.raises(EnclosError):
            names("auto", *ALL, node=node)
    with pytest.raises(EnclosError, match="this node has no RDMA"):
        names("auto", *ALL, node=NodeRdma("", ()))
    with pytest.raises(EnclosError, match="too few RDMA devices"):
        names("auto")


@pytest.mark.parametrize(
    ("mode", "words"), [("shared", "shares RDMA devices"), ("exclusive", "not moved into private")]
)
@pytest.mark.parametrize("network", ["job", "none"])
def test_a_private_network_has_none(mode: str, words: str, network: str) -> None:
    with pytest.raises(EnclosError, match=rf"not possible on --container-network={network} \(.*{words}"):
        rdma.choose("auto", True, network, ALL, NodeRdma(mode, tuple(UP)))
