"""enclos.yaml: values, their origins, and errors with file and line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from enclos.runtime import config
from enclos.runtime.errors import EnclosError
from enclos.runtime.settings import Config, rows
from hypothesis import given
from hypothesis import strategies as st


def parse(text: str, environ: dict[str, str] | None = None) -> config.Loaded:
    return config.parse(text.encode(), "f.yaml", environ or {})


def test_absent_file_gives_defaults(tmp_path: Path) -> None:
    loaded = config.load(str(tmp_path / "none.yaml"), {})
    assert loaded.config == Config()
    assert not loaded.exists
    assert set(loaded.origins.values()) == {"default"}


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "---\n", "step:\nnetwork:\n  underlay:\n", "network:\n  port:\n"]
)
def test_empty_file_and_empty_sections_give_defaults(text: str) -> None:
    assert parse(text).config == Config()


def test_values_and_origins() -> None:
    loaded = parse(
        "# site\nnetwork:\n  port: 4790\n  underlay:\n    name: '{node}-ib'\nmounts:\n  site: [/opt, '/a:/b:ro']\n",
        {"ENCLOS_ROOTFS_TMPFS_SIZE": "1G", "ENCLOS_STEP_NETWORKS": "[host, job]", "ENCLOS_STEP_ALLOW_ROOT": "yes"},
    )
    found = loaded.config
    assert (found.network.port, found.network.underlay.name) == (4790, "{node}-ib")
    assert found.mounts.site == ("/opt", "/a:/b:ro")
    assert (found.rootfs.tmpfs_size, found.step.networks, found.step.allow_root) == ("1G", ("host", "job"), True)
    assert loaded.origins["network.port"] == "f.yaml:3"
    assert loaded.origins["network.underlay.name"] == "f.yaml:5"
    assert loaded.origins["rootfs.tmpfs_size"] == "environment (ENCLOS_ROOTFS_TMPFS_SIZE)"
    assert loaded.origins["log.level"] == "default"
    assert set(loaded.origins) == {row.key for row in rows()}


def test_environment_goes_before_the_file() -> None:
    loaded = parse("network: {port: 5000}", {"ENCLOS_NETWORK_PORT": "6000"})
    assert loaded.config.network.port == 6000


def test_path_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("enabled: false")
    loaded = config.load(environ={"ENCLOS_CONFIG": str(tmp_path / "e.yaml")})
    assert not loaded.config.enabled


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\n", "f.yaml:1: unknown key 'a'"),
        ("network:\n  prot: 3\n", "f.yaml:2: unknown key 'network.prot'"),
        ("network:\n  underlay:\n    port: 3\n", "f.yaml:3: unknown key 'network.underlay.port'"),
        ("step: 1\n", "f.yaml:1: step: expected keys with values"),
        ("- a\n", "f.yaml:1: the file: expected keys with values"),
        ("log:\n  level: info\n\n  level: debug\n", "f.yaml:4: key 'log.level' again (first in line 2)"),
        ("log: {}\nlog: {}\n", "f.yaml:2: key 'log' again (first in line 1)"),
        ("network: [\n", "f.yaml:2: not valid YAML"),
        ("a: b: c\n", "f.yaml:1: not valid YAML"),
        ("\tx: 1\n", "f.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("network:\n  port: 80\n", "f.yaml:2: network.port: bad value 80: expected a whole number from 1024"),
        ("network:\n  port: yes\n", "f.yaml:2: network.port: bad value true"),
        ("network:\n  port: '4789'\n", 'f.yaml:2: network.port: bad value "4789"'),
        ("network:\n  underlay:\n    name: {node}\n", "f.yaml:3: network.underlay.name: bad value"),
        ("network:\n  underlay:\n    name: fixed\n", "f.yaml:3: network.underlay.name: bad value"),
        ("network: {ipv4: 10.77.1.0/16}\n", "f.yaml:1: network.ipv4: bad value"),
        ("network: {ipv4: 'fd00::/48'}\n", "f.yaml:1: network.ipv4: bad value"),
        ("network: {ifname: a/b}\n", "f.yaml:1: network.ifname: bad value"),
        ("network: {ifname: '..'}\n", "f.yaml:1: network.ifname: bad value"),
        ("rootfs: {tmpfs_size: 2GB}\n", 'f.yaml:1: rootfs.tmpfs_size: bad value "2GB"'),
        ("rootfs: {tmpfs_size: 150%}\n", "f.yaml:1: rootfs.tmpfs_size: bad value"),
        ("mounts: {site: /opt}\n", "f.yaml:1: mounts.site: bad value"),
        ("mounts: {site: ['/a:/b:what']}\n", "unknown flag 'what'"),
        ("mounts: {site: [./a]}\n", "absolute path here"),
        ("mounts: {site: [[/a]]}\n", "f.yaml:1: mounts.site: bad value (nested)"),
        ("devices: {nodes: [/etc/passwd]}\n", "f.yaml:1: devices.nodes: bad value"),
        ("devices: {nodes: [/dev/../etc/passwd]}\n", "f.yaml:1: devices.nodes: bad value"),
        ("step: {networks: []}\n", "f.yaml:1: step.networks: bad value []: expected 1 to"),
        ("step: {networks: [job, job]}\n", "expected each item once"),
        ("step: {networks: [job]}\n", 'step.networks: bad value ["job"]: step.networks has to include'),
        (
            "step: {default_network: blue}\n",
            'f.yaml:1: step.default_network: bad value "blue": expected host, job or none',
        ),
        ("step:\n  default_network: none\n  networks: [job, host]\n", "f.yaml:2: step.default_network: bad value"),
        ("enabled: maybe\n", 'f.yaml:1: enabled: bad value "maybe": expected true or false'),
    ],
)
def test_mistakes_name_file_and_line(text: str, line: str) -> None:
    with pytest.raises(EnclosError) as caught:
        parse(text)
    assert line in caught.value.line()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("network.prot", "network.port"),
        ("netwrok", "network"),
        ("port", "network.port"),
        ("default_network", "step.default_network"),
        ("rootfs.home", "mounts.home"),
        ("zzz", ""),
    ],
)
def test_nearest_key(key: str, nearest: str) -> None:
    assert config.nearest(key) == nearest


def test_bad_environment_names_the_variable() -> None:
    with pytest.raises(EnclosError) as caught:
        parse("", {"ENCLOS_NETWORK_PORT": "low"})
    assert caught.value.line().startswith('ENCLOS_NETWORK_PORT: network.port: bad value "low"')


def test_not_text() -> None:
    with pytest.raises(EnclosError) as caught:
        config.parse(b"log:\n  level: \xff\n", "f.yaml", {})
    assert caught.value.line() == "f.yaml:2: not valid YAML: not UTF-8 text"


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(EnclosError, match="cannot read the configuration"):
        config.load(str(tmp_path), {})
    with pytest.raises(EnclosError, match="no such file") as caught:
        config.load(str(tmp_path / "none"), {}, must_exist=True)
    assert "owner and mode" not in caught.value.hint


def test_every_default_is_a_good_value() -> None:
    for row in rows():
        value = list(row.default) if isinstance(row.default, tuple) else row.default
        assert row.kind.check(value) == row.default, row.key


NAMES = st.sampled_from(["network", "port", "step", "networks", "underlay", "name", "x"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@given(DOCUMENTS)
def test_any_yaml_is_taken_or_worded(document: object) -> None:
    import yaml

    try:
        config.parse(yaml.safe_dump(document).encode(), "f.yaml", {})
    except EnclosError as error:
        assert error.line().startswith("f.yaml")


def test_a_file_that_refers_to_itself_ends() -> None:
    with pytest.raises(EnclosError):
        parse("network: &a\n  underlay: *a\n")


def test_the_agents_imports_stay_light() -> None:
    """What the agent imports from here must not pull in the big ones."""
    names = "settings config errors request mounts hostlist policy"
    program = f"import sys\nfor n in {names.split()}: __import__('enclos.runtime.' + n)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {
        "jsonschema",
        "asyncio",
        "rich",
        "difflib",
        "argparse",
        "json",
        "subprocess",
        "logging",
        "typing_extensions",
    }
    assert not heavy & set(done.stdout.split())


def test_few_modules_import_yaml() -> None:
    """profile.py is the user's side alone (enclos profile): the agent never reads YAML of users."""
    runtime = Path(config.__file__).parent
    users = [p.name for p in runtime.glob("**/*.py") if re.search(r"^\s*(import|from) yaml", p.read_text(), re.M)]
    assert sorted(users) == ["config.py", "profile.py", "registry.py"]
