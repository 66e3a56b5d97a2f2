"""Profiles: where they are found, what they may hold, and what srun gets of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from enclos.runtime import profile
from enclos.runtime.cli import main
from enclos.runtime.errors import EnclosError
from enclos.runtime.options import OPTIONS
from hypothesis import given
from hypothesis import strategies as st


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text)


def load(folder: Path, name: str, **variables: str) -> profile.Profile:
    return profile.load(name, {"ENCLOS_PROFILE_PATH": str(folder), **variables})


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    write(
        tmp_path,
        a_toml='image = "/i"\nmounts = ["/a", "/b:/c:ro"]\nmount_home = true\nentrypoint = false\n'
        '[env]\nX = "1"\nN = 2\n',
        b_yaml="image: /i\nmounts: ['/a', '/b:/c:ro']\ncontainer-mount-home: true\nentrypoint: false\n"
        "env: {X: '1', N: 2}\n",
    )
    first, second = load(tmp_path, "a"), load(tmp_path, "b")
    assert (
        first.options
        == second.options
        == {
            "container-image": "/i",
            "container-mounts": "/a,/b:/c:ro",
            "container-mount-home": "",
            "no-container-entrypoint": "",
        }
    )
    assert first.variables == second.variables == {"X": "1", "N": "2"}


def test_bases_come_first(tmp_path: Path) -> None:
    """Lists add up, tables are merged, the rest is replaced; the last base counts most; a path is beside its file."""
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        site_toml='image = "/site"\nmounts = ["/a"]\nreadonly = true\n[env]\nX = "site"\nY = "site"\n',
        more_yaml="image: /more\nmounts: [/b]\nenv: {Y: more}\n",
    )
    write(
        tmp_path / "sub",
        own_toml='base_environment = ["../site.toml", "more"]\nmounts = ["/c"]\nwritable = true\n[env]\nZ = "own"\n',
    )
    found = load(tmp_path, str(tmp_path / "sub/own.toml"))
    assert found.options == {"container-image": "/more", "container-mounts": "/a,/b,/c", "container-writable": ""}
    assert found.variables == {"X": "site", "Y": "more", "Z": "own"}
    assert [Path(name).name for name in found.files] == ["site.toml", "more.yaml", "own.toml"]


def test_variables_are_replaced(tmp_path: Path) -> None:
    write(
        tmp_path,
        a_toml='image = "/i/${REL}-${OTHER:-x}.sqsh"\nmounts = ["${HOME}/d:/d"]\n[env]\nP = "$$1 $2 ${EMPTY:-}"\n',
    )
    found = load(tmp_path, "a", REL="7", HOME="/h")
    assert found.options == {"container-image": "/i/7-x.sqsh", "container-mounts": "/h/d:/d"}
    assert found.variables == {"P": "$1 $2 "}
    with pytest.raises(EnclosError, match=r"\$\{REL\} is not set"):
        load(tmp_path, "a", HOME="/h")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mount = ['/a']", "unknown key 'mount', did you mean 'mounts'?"),
        ("profile = 'x'", "unknown key 'profile'"),
        ("mounts = ['/a:b']", "mount target must be an absolute path"),
        ("network = 'blue'", "no such network"),
        ("writable = 'yes'", "writable: expected true or false"),
        ("image = ['''/a\n/b''']", "a value has one line"),
        ("image = {a = 1}", "image: expected a text"),
        ("image = ", "Invalid value"),
        ("base = 'a'", "leads back to itself"),
        ("base = 'nothing'", "profile not found"),
        ("[env]\n'A B' = '1'", "'A B' is no variable"),
        ("[env]\nA = ['1']", "'A' is no variable with a value"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, a_toml=text)
    with pytest.raises(EnclosError) as caught:
        load(tmp_path, "a")
    assert words in caught.value.line()


def test_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one", a_toml="image = '/one'")
    write(tmp_path / "two", a_toml="image = '/two'", b_yml="image: /two")
    path = f"{tmp_path}/one:{tmp_path}/two"
    assert profile.load("a", {"ENCLOS_PROFILE_PATH": path}).options["container-image"] == "/one"
    assert profile.load("b", {"EDF_PATH": path}).options["container-image"] == "/two"
    with pytest.raises(EnclosError, match=f"searched {tmp_path}/one, {tmp_path}/two"):
        profile.load("c", {"ENCLOS_PROFILE_PATH": path})
    monkeypatch.setenv("ENCLOS_PROFILE_PATH", path)
    assert main.main(["profile", "ls"]) == 0
    assert capsys.readouterr().out.split() == [
        "NAME",
        "FILE",
        "a",
        f"{tmp_path}/one/a.toml",
        "b",
        f"{tmp_path}/two/b.yml",
    ]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a_toml="image = '/i'\nreadonly = true\n[annotations]\nx = 1\n[env]\nX = 'a b'\n", bad_toml="x = 1")
    assert main.main(["profile", "show", "a.toml"]) == 0
    assert capsys.readouterr().out == "# a.toml\n--container-image=/i\n--container-readonly\nX=a b\n"
    assert main.main(["profile", "options", "./a.toml"]) == 0
    assert capsys.readouterr().out == "container-image=/i\ncontainer-readonly=\nset X=a b\n"
    assert main.main(["profile", "validate", "a.toml"]) == 0
    assert capsys.readouterr().out == "a.toml: annotations means nothing here, ignoring\na.toml: ok\n"
    assert main.main(["profile", "validate", "bad.toml"]) == 1
    assert "enclos: profile bad.toml: cannot be used (unknown key 'x')" in capsys.readouterr().err


def test_every_option_can_stand_in_a_profile(tmp_path: Path) -> None:
    for row in OPTIONS:
        if row.key == "profile":
            continue
        texts = ["/x", "x", "acme.com/v=v", "none", "net", "pids=9", "delegate"]
        taken = next(text for text in texts if not any(check.refuses(text) for check in row.checks))
        value = "true" if row.fixed else f"[{taken!r}]" if row.key == "env" else repr(taken)
        write(tmp_path, a_toml=f"{row.name.replace('container-', '').replace('-', '_')} = {value}")
        assert list(load(tmp_path, "a").options) == [row.name]


@given(st.binary(max_size=200), st.sampled_from(["toml", "yaml"]))
def test_any_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("p") / f"a.{suffix}"
    path.write_bytes(data)
    try:
        profile.load(str(path), {})
    except EnclosError as error:
        assert error.line().isprintable()
