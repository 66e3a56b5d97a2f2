"""The node guards its tunnels: only peers of a network may speak into it, and no user of the node may.

Privileged: runs in the agent, in the node's network namespace. The table stands from the agent's start to
uninstall(); it never belongs to a step. Elements are added with a network and taken out with it.

VXLAN has no authentication, so without this any user process that can send UDP to the port injects frames
into any tenant's network, and from a peer even with a source address that is right. What is dropped where
is in `nftables.py`; which packets pass is decided by `(VNI, source)` alone.

Rejected: a table with `flags owner`, which survives another's `nft flush ruleset`, because it would vanish
with the agent's socket, and running networks with it would be open. Instead the removal is noticed.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Sequence
from typing import Self, TypeVar

from enclos.netns import nftables
from enclos.netns.batch import NLM_F_DUMP
from enclos.netns.facts import KernelRefused, RulesRefused
from enclos.netns.holder import hold_port, release_port
from enclos.netns.link import get_addresses, pack_address
from enclos.netns.netlink import NETLINK_NETFILTER, Netlink

__all__ = ["Guard", "hold_port", "uninstall"]

T = TypeVar("T")
NFT = "nft"
NFT_SECONDS = 30


class Guard:
    """The table, and what this agent has put into its sets.

    Owns two netfilter sockets; close() or a `with` gives them back and leaves the table.

    Args:
        port: UDP port of the tunnels.
        underlay_ifname: the interface on which they arrive.
        ipv6: the underlay is IPv6.
    """

    def __init__(self, port: int, underlay_ifname: str, ipv6: bool = False) -> None:
        self._rules = (port, underlay_ifname, ipv6)
        self._elements: set[bytes] | None = None
        self._shape: list[object] = []
        self._session = Netlink(NETLINK_NETFILTER)
        self._events = Netlink(NETLINK_NETFILTER, nftables.NFNLGRP_NFTABLES, blocking=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """The table and its elements stay."""
        self._session.close()
        self._events.close()

    def ensure(self) -> None:
        """Load the table in one transaction, so no packet meets half of it or none.

        The first time, the elements of a table that is there are kept: networks outlive the agent.

        Raises:
            RulesRefused: nft is missing or does not take the table.
        """
        if self._elements is None:
            self._elements = self._kernel_elements()
        self._load()

    def _load(self) -> None:
        script = nftables.ruleset(*self._rules, self._elements or ())
        try:
            done = subprocess.run(
                [NFT, "-f", "-"],
                input=script,
                capture_output=True,
                text=True,
                timeout=NFT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RulesRefused(f"{NFT}: {error}") from error
        if done.returncode != 0:
            raise RulesRefused(done.stderr.strip())
        self._shape = self._kernel_shape()

    def admit(self, vni: int, addresses: Sequence[str]) -> None:
        """Let these peers speak into this network. Present is fine; the node's own addresses are left out.

        A table that somebody has just taken away is brought back here already.

        Raises:
            KernelRefused: ENFILE if a set is full.
            RulesRefused: the table was gone, and nft does not load it.
        """
        with Netlink() as nl:
            own = {entry.address for entry in get_addresses(nl)}
        packed = [pack_address(address) for address in addresses]
        keys = [nftables.element(vni, address) for address in packed if address not in own]
        known = self._remembered()
        added = set(keys) - known
        known |= added
        try:
            if keys:
                self._add(keys)
        except BaseException:
            known -= added
            raise

    def _add(self, keys: Sequence[bytes]) -> None:
        try:
            self._session.transact(nftables.element_batch(nftables.NFT_MSG_NEWSETELEM, keys))
        except KernelRefused as refused:
            if refused.errno != errno.ENOENT:
                raise
            self._load()

    def evict(self, vni: int, addresses: Sequence[str]) -> None:
        """The reverse; absent is fine."""
        keys = {nftables.element(vni, pack_address(address)) for address in addresses}
        known = self._remembered()
        try:
            if keys & known:
                self._delete(keys & known)
        except KernelRefused as refused:
            if refused.errno != errno.ENOENT:
                raise
            # Somebody took one of them out, and a transaction is all or nothing.
            present = keys & self._kernel_elements()
            if present:
                self._delete(present)
        known -= keys

    def _delete(self, keys: set[bytes]) -> None:
        self._session.transact(nftables.element_batch(nftables.NFT_MSG_DELSETELEM, keys))

    def _remembered(self) -> set[bytes]:
        if self._elements is None:
            self._elements = self._kernel_elements()
        return self._elements

    def fileno(self) -> int:
        """Readable when somebody has changed nftables; then call handle_event()."""
        return self._events.fileno()

    def handle_event(self) -> bool:
        """Look whether a change was about our table, and mend it. True if it was mended.

        Raises:
            RulesRefused: the table could not be loaded again.
        """
        events = self._events.events()
        ours = self._session.port_id
        if events is not None and not any(
            nftables.table_of(event) == nftables.TABLE and event.port_id != ours for event in events
        ):
            return False
        if self.intact():
            return False
        self._load()
        return True

    def intact(self) -> bool:
        """The kernel has our rules, as they were loaded, and our elements, no fewer and no more."""
        return self._kernel_shape() == self._shape != [] and self._kernel_elements() == self._elements

    def elements(self) -> set[tuple[int, bytes]]:
        """(VNI, packed source address), from the kernel."""
        return {(int.from_bytes(key[:3], "big"), key[4:]) for key in self._kernel_elements()}

    def counters(self) -> dict[str, int]:
        """Packets dropped since the table was loaded, by the name of the counter; empty without a table."""
        dump = nftables.request(nftables.NFT_MSG_GETOBJ, NLM_F_DUMP)
        try:
            found = [nftables.parse_counter(reply) for reply in self._session.query(dump, "guard counters")]
        except KernelRefused as refused:
            return _nothing_if_absent(refused, {})
        return dict(counter for counter in found if counter)

    def _kernel_elements(self) -> set[bytes]:
        found: set[bytes] = set()
        for version in nftables.SETS:
            try:
                for reply in self._session.query(nftables.dump_elements(version), "guard elements"):
                    found.update(nftables.parse_elements(reply))
            except KernelRefused as refused:
                return _nothing_if_absent(refused, set())
        return found

    def _kernel_shape(self) -> list[object]:
        asked = (
            nftables.request(nftables.NFT_MSG_GETTABLE, 0),
            nftables.request(nftables.NFT_MSG_GETCHAIN, NLM_F_DUMP),
            nftables.request(nftables.NFT_MSG_GETRULE, NLM_F_DUMP),
        )
        try:
            return [
                nftables.shape(reply)
                for question in asked
                for reply in self._session.query(question, "guard table")
                if nftables.table_of(reply) == nftables.TABLE
            ]
        except KernelRefused as refused:
            return _nothing_if_absent(refused, [])


def _nothing_if_absent(refused: KernelRefused, nothing: T) -> T:
    if refused.errno != errno.ENOENT:
        raise refused
    return nothing


def uninstall() -> None:
    """Take table and port holders away; missing is fine. Only when the product leaves the node."""
    with Netlink(NETLINK_NETFILTER) as nl:
        try:
            nl.transact(nftables.delete_table_batch())
        except KernelRefused as refused:
            if refused.errno != errno.ENOENT:
                raise
    release_port()
