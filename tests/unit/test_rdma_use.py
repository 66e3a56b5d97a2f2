"""What the node needs an RDMA device for, told from what the kernel lists of it."""

from __future__ import annotations

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


def test_the_machines_own_interfaces_and_routes_are_read() -> None:
    with Netlink() as nl:
        cards = {card.name: card for card in link.list_cards(nl)}
        routes = link.list_route_links(nl)
    assert cards["lo"].ifindex == 1 and cards["lo"].mac == bytes(6) and not cards["lo"].master
    assert routes <= {card.ifindex for card in cards.values()}
