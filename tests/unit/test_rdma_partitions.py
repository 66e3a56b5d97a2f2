"""OpenSM's partitions.conf: each tenant has a key of its own, and the site's lines stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from enclos.runtime.cli import partition as verb
from enclos.runtime.devices import partitions
from enclos.runtime.devices.partitions import BEGIN, END, BadPartitions, attach, detach, read
from enclos.runtime.errors.error import EnclosError, UsageError
from hypothesis import given
from hypothesis import strategies as st

SITE = """\
# the site's
Default=0x7fff, ipoib, defmember=full : ALL, ALL_SWITCHES=full, SELF=full;
storage=0x1000, ipoib : 0x0002c903000e0b72=full;
"""


def as_opensm(text: str) -> dict[str, tuple[int, set[str]]]:
    """What OpenSM makes of a file: name, key and members of each partition. After osm_prtn_config_parse_file."""
    found: dict[str, tuple[int, set[str]]] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        assert len(line) < 4095, "the rest would be read as another line"
        *ends, rest = line.partition("#")[0].strip().split(";")
        for part, last in [*((end, True) for end in ends), (rest, False)]:
            if not part.strip():
                assert not (last and name), "a statement whose last line is empty"
                continue
            members = part
            if not name:
                header, colon, members = part.partition(":")
                assert colon, "no partition definition found"
                name, _, key = (word.strip() for word in header.partition(",")[0].partition("="))
                found[name] = (int(key, 0), set())
            words = {word.strip() for word in members.split(",")}
            assert "" not in words, "taken for ALL"
            found[name][1].update(words)
            name = "" if last else name
    assert not name, "a statement without end"
    return found


def test_a_tenant_with_more_ports_than_a_line_holds() -> None:
    """OpenSM reads lines of 4,094 characters; a job of 300 nodes needs 8,000."""
    ports = range(1, 301)
    text = attach(attach(SITE, "job8", [1000]), "job41", ports)
    found = as_opensm(text)
    assert found["job41"] == (0x1002, {f"0x{port:016x}=full" for port in ports})
    assert list(found) == ["Default", "storage", "job41", "job8"]
    assert read(text)["job41"].ports == set(ports)
    assert detach(detach(text, "job41", range(2, 301)), "job8") == attach(SITE, "job41", [1]).replace(
        "0x1001", "0x1002"
    )
    # One line per tenant, as it was written before.
    assert read(text.replace("=full\n0x", "=full, 0x")) == read(text)


@pytest.mark.parametrize(
    "site",
    [
        "a=0x1000 : ALL; b=0x1001, ipoib : ALL;\nc=0x9002:ALL;\n",
        "a=4096, ipoib :\nALL,\nSELF=full;b = 010001 : ALL;\n =0x1002 : ALL;",
        "# b=0x1003 : ALL;\na=0x1000 : ALL; # =0x1003\nb=0x1001 : 0x1003=full; c=0X1002 : ALL;\nd : ALL; e=08 : SELF;",
    ],
)
def test_the_sites_keys_in_every_form(site: str) -> None:
    """Several in a line, over lines, with the bit of full members, octal as C has it, without a name."""
    assert read(attach(site, "job7", [1]))["job7"].key == 0x1003


def test_the_file_as_opensm_reads_it() -> None:
    text = attach(SITE, "job41", [0x2C903000E0B73])
    text = attach(text, "job7", [0x2C903000E0B75, 0x2C903000E0B74])
    assert text == (
        f"{SITE}{BEGIN}\n"
        "job41=0x1001, ipoib : 0x0002c903000e0b73=full;\n"
        "job7=0x1002, ipoib : 0x0002c903000e0b74=full, 0x0002c903000e0b75=full;\n"
        f"{END}\n"
    )
    assert as_opensm(text)["job7"] == (0x1002, {"0x0002c903000e0b74=full", "0x0002c903000e0b75=full"})


def test_a_key_stays_until_the_last_port_is_gone() -> None:
    text = attach(attach(SITE, "a", [1]), "b", [2])
    text = detach(text, "a", [1])
    assert read(text) == {"b": partitions.Partition(0x1002, frozenset({2}))}
    text = attach(attach(text, "b", [3]), "c", [4])
    assert {tenant: found.key for tenant, found in read(text).items()} == {"b": 0x1002, "c": 0x1001}
    assert detach(detach(text, "b"), "c") == SITE


def test_again_is_the_same() -> None:
    text = attach(SITE, "a", [1, 2])
    assert attach(text, "a", [2, 1]) == attach(text, "a", [1]) == text
    assert detach(text, "nobody") == detach(text, "a", [9]) == text


def test_a_port_is_in_one_tenants_partition() -> None:
    text = attach(attach(SITE, "a", [1, 2]), "b", [2])
    assert {tenant: set(found.ports) for tenant, found in read(text).items()} == {"a": {1}, "b": {2}}


def test_what_is_behind_our_part_stays() -> None:
    text = attach(SITE, "a", [1]) + "later=0x1001 : ALL;\n"
    assert attach(text, "b", [2]).endswith(f"{END}\nlater=0x1001 : ALL;\n")
    assert read(attach(text, "b", [2]))["b"].key == 0x1002
    assert detach(text, "a") == f"{SITE}later=0x1001 : ALL;\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{BEGIN}\n",
        f"{END}\n{BEGIN}\n",
        f"{BEGIN}\nmine = 5;\n{END}\n",
        f"{BEGIN}\na=0x1001, ipoib : ALL;\n{END}\n",
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n",
    ],
)
def test_an_edited_part_is_not_overwritten(text: str) -> None:
    with pytest.raises(BadPartitions):
        attach(text, "a", [1])
    with pytest.raises(BadPartitions):
        detach(text, "a")


@pytest.mark.parametrize("tenant", ["", "a b", "a;b", "a=1", "a\nb", "-a", "x" * 64, "a:b", "#a"])
def test_a_name_that_would_be_something_else_in_the_file(tenant: str) -> None:
    with pytest.raises(BadPartitions):
        attach(SITE, tenant, [1])


@pytest.mark.parametrize(
    "text", ["", "0x1", "5054:00ff:fe00", "0x505400fffe00000g", "ALL", "0x505400fffe0000000", "0" * 16]
)
def test_what_is_no_guid(text: str) -> None:
    with pytest.raises(BadPartitions):
        partitions.parse_guid(text)


def test_all_keys_taken() -> None:
    text = "".join(f"p{key}={hex(key)} : ALL;\n" for key in range(partitions.FIRST_KEY, partitions.LAST_KEY + 1))
    with pytest.raises(BadPartitions, match="all partition keys are in use"):
        attach(text, "a", [1])


STEPS = st.lists(
    st.tuples(
        st.sampled_from([attach, detach]), st.sampled_from(["a", "b", "c"]), st.sets(st.integers(1, 6), min_size=1)
    )
)


@given(STEPS)
def test_keys_and_ports_are_never_shared(steps: list[tuple[object, str, set[int]]]) -> None:
    text = SITE
    for change, tenant, ports in steps:
        text = change(text, tenant, ports)  # type: ignore[operator]
        found = read(text)
        assert list(as_opensm(text)) == ["Default", "storage", *found]
        keys = [partition.key for partition in found.values()]
        given_ports = [port for partition in found.values() for port in partition.ports]
        assert len(set(keys)) == len(keys) and 0x1000 not in keys
        assert len(set(given_ports)) == len(given_ports)
        assert text.startswith(SITE)
        assert all(partition.ports for partition in found.values())


def test_the_command_changes_the_file_and_keeps_its_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "partitions.conf"
    file.write_text(SITE)
    file.chmod(0o640)
    assert verb.run(["attach", f"--file={file}", "job7", "5054:00ff:fe00:0002", "0x505400fffe000004"]) == 0
    assert capsys.readouterr().out == "job7 0x1001\n"
    assert read(file.read_text())["job7"].ports == {0x505400FFFE000002, 0x505400FFFE000004}
    assert file.stat().st_mode & 0o777 == 0o640
    assert verb.run(["detach", f"--file={file}", "--all", "job7"]) == 0
    assert file.read_text() == SITE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partitions.conf", "partitions.conf.lock"]


def test_the_command_tells_opensm_by_a_command_of_the_sites(tmp_path: Path) -> None:
    file, told = tmp_path / "partitions.conf", tmp_path / "told"
    file.write_text(SITE)
    words = ["attach", f"--file={file}", f"--reload=echo reload >> {told}", "job7", "0x505400fffe000004"]
    assert verb.run(words) == 0 and verb.run(words) == 0
    # The second time nothing has changed.
    assert told.read_text() == "reload\n"


def test_what_opensm_could_not_be_told_it_is_told_by_the_next_call(tmp_path: Path) -> None:
    """Also where that call changes nothing: a job's hook that failed is called again with the same ports."""
    file, told, broken = tmp_path / "partitions.conf", tmp_path / "told", tmp_path / "broken"
    file.write_text(SITE)
    broken.touch()
    reload = f"--reload=test ! -e {broken} && echo reload >> {told}"
    attach_words = ["attach", f"--file={file}", reload, "job7", "0x505400fffe000004"]
    for _ in range(2):
        with pytest.raises(EnclosError, match="OpenSM was not told"):
            verb.run(attach_words)
    assert not told.exists()
    # Who has no command to tell OpenSM has not told it either.
    assert verb.run(["attach", f"--file={file}", "job7", "0x505400fffe000004"]) == 0
    broken.unlink()
    assert verb.run(attach_words) == 0 and verb.run(attach_words) == 0
    assert told.read_text() == "reload\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partitions.conf", "partitions.conf.lock", "told"]


def test_a_call_that_is_killed_owes_the_reload_too(tmp_path: Path) -> None:
    file, told = tmp_path / "partitions.conf", tmp_path / "told"
    file.write_text(SITE)
    words = ["attach", f"--file={file}", "--reload=kill -9 $PPID", "job7", "0x505400fffe000004"]
    program = f"from enclos.runtime.cli import partition; partition.run({words!r})"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert verb.run([*words[:2], f"--reload=echo reload >> {told}", *words[3:]]) == 0
    assert told.read_text() == "reload\n"


@pytest.mark.parametrize("words", [["job7"], ["--all", "job7", "0x505400fffe000001"]])
def test_no_tenant_is_taken_out_for_want_of_a_port(words: list[str], tmp_path: Path) -> None:
    """A hook passes ENCLOS_PORT_GUIDS on, which may be nothing."""
    file = tmp_path / "partitions.conf"
    text = attach(SITE, "job7", [1, 2])
    file.write_text(text)
    with pytest.raises(UsageError, match="or --all for the whole tenant"):
        verb.run(["detach", f"--file={file}", *words])
    assert file.read_text() == text
