"""What the node needs an RDMA device for, told from what the kernel lists of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from enclos.netns import link, nldev, rdmamove
from enclos.netns.link import Card, LinkAddress
from enclos.netns.netlink import Netlink
from enclos.netns.nldev import RdmaDevice, Resource

DEVICE = RdmaDevice(0, "mlx5_0", 1, 7, "ib")
CARD = Card(5, "p0", link.IFF_UP, 1, b"\2\0\0\0\0\1", 0, 0)


@pytest.mark.parametrize(
    ("resources", "contexts", "reason"),
    [
        ([], 0, ""),
        ([Resource(1, "ib_core", 0), Resource(2, "ib_ipoib", 0)], 0, ""),
        ([Resource(2, "rpcrdma", 0), Resource(2, "nvme_rdma", 0)], 3, "the kernel uses it (nvme_rdma, rpcrdma)"),
        ([Resource(1, "ib_core", 0), Resource(2, "", 4711), Resource(2, "", 99)], 1, "process 99 of the node uses it"),
        # Its processes are in another pid namespace, or it has no queue pair yet.
        ([Resource(2, "", 0)], 1, "a program of the node has it open"),
    ],
)
def test_who_has_it_open(
    monkeypatch: pytest.MonkeyPatch, resources: list[Resource], contexts: int, reason: str
) -> None:
    monkeypatch.setattr(nldev, "resources", lambda _nl, _device: resources)
    monkeypatch.setattr(nldev, "counts", lambda _nl: {"mlx5_0": {"ctx": contexts}, "mlx5_1": {"ctx": 9}})
    assert rdmamove._user(None, DEVICE) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("addresses", "routes", "cards", "underlay", "reason"),
    [
        ([], set(), [CARD], 9, ""),
        ([LinkAddress(5, b"\xfe\x80" + bytes(14), link.RT_SCOPE_LINK)], {6}, [CARD], 9, ""),
        ([LinkAddress(5, b"\x0a\0\0\1", 0)], set(), [CARD], 9, "its interface p0 has an address of the node"),
        ([], {5}, [CARD], 9, "the node has routes over its interface p0"),
        ([], set(), [CARD], 5, "its interface p0 is the underlay of the networks"),
        ([], set(), [CARD._replace(master=8)], 9, "its interface p0 is part of a bridge or bond"),
        (
            [],
            set(),
            [CARD, CARD._replace(ifindex=6, name="p0.7", lower=5)],
            9,
            "interface p0.7 stands on its interface p0",
        ),
    ],
)
def test_what_goes_over_its_interface(
    monkeypatch: pytest.MonkeyPatch,
    addresses: list[LinkAddress],
    routes: set[int],
    cards: list[Card],
    underlay: int,
    reason: str,
) -> None:
    monkeypatch.setattr(link, "get_addresses", lambda _nl: addresses)
    monkeypatch.setattr(link, "list_route_links", lambda _nl: routes)
    monkeypatch.setattr(link, "list_cards", lambda _nl: cards)
    assert rdmamove._carries(None, cards[:1], underlay) == reason  # type: ignore[arg-type]


def test_guids_of_ports_are_those_of_infiniband(tmp_path: Path) -> None:
    """As OpenSM's partitions have them: not always the device's own."""
    for number, layer, address in (
        (10, "InfiniBand", "fe80:0000:0000:0000:0c42:a103:0065:a6fc"),
        (1, "InfiniBand", "fec0:0000:0000:0001:0c42:a103:0065:a6f3"),
        (2, "Ethernet", "fe80:0000:0000:0000:5054:00ff:fe00:0000"),
    ):
        port = tmp_path / "mlx5_0/ports" / str(number)
        (port / "gids").mkdir(parents=True)
        (port / "gids/0").write_text(f"{address}\n")
        (port / "link_layer").write_text(f"{layer}\n")
    assert rdmamove.port_guids("mlx5_0", str(tmp_path)) == (0x0C42A1030065A6F3, 0x0C42A1030065A6FC)
    assert rdmamove.port_guids("mlx5_7", str(tmp_path)) == ()


def test_a_record_that_an_older_agent_made_has_no_ports() -> None:
    made = rdmamove.Movable(1, "mlx5_0", (), (7, 8))
    assert rdmamove.Movable.of_record(made.record()) == made
    older = {name: value for name, value in made.record().items() if name != "ports"}
    assert rdmamove.Movable.of_record(older).ports == ()


def test_the_machines_own_interfaces_and_routes_are_read() -> None:
    with Netlink() as nl:
        cards = {card.name: card for card in link.list_cards(nl)}
        routes = link.list_route_links(nl)
    assert cards["lo"].ifindex == 1 and cards["lo"].mac == bytes(6) and not cards["lo"].master
    assert routes <= {card.ifindex for card in cards.values()}
