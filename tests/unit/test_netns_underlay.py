"""Names to underlay addresses: /etc/hosts first, the resolver for the rest."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from enclos.netns import underlay
from enclos.netns.facts import NameUnknown
from enclos.netns.underlay import HostsFile, Underlay, parse_hosts

HOSTS = """\
127.0.0.1 localhost
127.0.1.1 n1.site n1      # as Debian's installer writes it
::1 localhost ip6-localhost
192.0.2.1 n1 N1.Site
2001:db8::1 n1
fe80::1 n1
fe80::1%eth0 n1
ff02::1 n1
::ffff:192.0.2.9 n1
0.0.0.0 blocked
192.0.2.7
not-an-address n1
2001:db8::2 n2-ib
198.51.100.2 n2-ib # comment n3
"""


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    monkeypatch.setattr(underlay, "_HOSTS", HostsFile(str(path)))
    return path


def no_resolver(*_arguments: object, **_keywords: object) -> None:
    raise AssertionError("the resolver was asked")


def test_only_addresses_that_a_tunnel_can_end_at() -> None:
    names = parse_hosts(HOSTS.splitlines())
    assert names == {
        "n1": ["192.0.2.1", "2001:db8::1"],
        "n1.site": ["192.0.2.1"],
        "n2-ib": ["2001:db8::2", "198.51.100.2"],
    }


@pytest.mark.usefixtures("hosts")
def test_hosts_file_answers_without_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_resolver)
    assert underlay.resolve(["n1", "N1"], "{node}") == ["192.0.2.1", "192.0.2.1"]
    assert underlay.resolve(["n1"], "{node}", socket.AF_INET6) == ["2001:db8::1"]
    assert underlay.resolve(["n2"], "{node}-ib") == ["198.51.100.2"]
    assert underlay.known_addresses(["n1", "n3"], "{node}") == ["192.0.2.1", ""]


@pytest.mark.usefixtures("hosts")
def test_unknown_names_are_asked_for_and_then_named() -> None:
    assert underlay.resolve(["192.0.2.50"], "{node}") == ["192.0.2.50"]
    for bad in ("no-such-name.invalid", "127.0.0.1", "a" * 70):
        with pytest.raises(NameUnknown) as caught:
            underlay.resolve(["n1", bad], "{node}")
        assert caught.value.name == bad


def test_file_is_read_again_only_when_it_changed(hosts: Path) -> None:
    file = HostsFile(str(hosts))
    file.refresh()
    reads = []
    original = underlay.parse_hosts

    def counting(lines: object) -> dict[str, list[str]]:
        reads.append(1)
        return original(lines)  # type: ignore[arg-type]

    underlay.parse_hosts = counting
    try:
        file.refresh()
        assert not reads
        os.utime(hosts, ns=(1, 1))
        file.refresh()
        hosts.unlink()
        file.refresh()
    finally:
        underlay.parse_hosts = original
    assert len(reads) == 1 and file.addresses("n1") == []


def test_mtu_of_the_overlay() -> None:
    assert Underlay(2, "eth0", "192.0.2.1", 1500).overlay_mtu == 1450
    assert Underlay(2, "eth0", "2001:db8::1", 9000).overlay_mtu == 8930
    assert Underlay(2, "eth0", "2001:db8::1", 9000).ipv6
