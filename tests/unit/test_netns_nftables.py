"""The guard's table as text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from enclos.netns import nftables

GOLDEN = Path(__file__).parent.parent / "golden" / "netns"
KEYS = (
    nftables.element(0x123456, bytes([192, 0, 2, 1])),
    nftables.element(1, bytes([192, 0, 2, 2])),
    nftables.element(7, bytes.fromhex("20010db8000000000000000000000001")),
)


@pytest.mark.parametrize("ipv6", [False, True])
def test_ruleset_is_what_it_was(ipv6: bool) -> None:
    """Golden: `UPDATE_GOLDEN=1` writes it anew; the kernel tests load it."""
    text = nftables.ruleset(4789, "eth0", ipv6, KEYS if ipv6 else ())
    golden = GOLDEN / ("guard6.nft" if ipv6 else "guard4.nft")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text


def test_element_is_vni_reserved_byte_and_source() -> None:
    assert KEYS[0] == bytes.fromhex("12345600c0000201") and len(KEYS[2]) == 20


@pytest.mark.parametrize("name", ['eth0" drop', "eth*", "e\n0", "e\\0"])
def test_interface_names_cannot_change_the_rules(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be an interface"):
        nftables.ruleset(4789, name, False)
