"""The syntax of --container-mounts."""

from __future__ import annotations

from posixpath import normpath

import pytest
from enclos.runtime.errors import EnclosError
from enclos.runtime.mounts import MOUNT_LIMIT, Mount, parse
from hypothesis import given
from hypothesis import strategies as st


def bind(source: str, target: str, text: str, **others: object) -> Mount:
    fields = {"kind": "bind", "read_only": None, "options": (), **others}
    return Mount(source=source, target=target, text=text, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mounts"),
    [
        ("/data", [bind("/data", "/data", "/data")]),
        ("/a:/b", [bind("/a", "/b", "/a:/b")]),
        ("/a:/b:ro", [bind("/a", "/b", "/a:/b:ro", read_only=True)]),
        ("/a:/b:rw+bind", [bind("/a", "/b", "/a:/b:rw+bind", read_only=False)]),
        ("/a:/b:", [bind("/a", "/b", "/a:/b:")]),
        (
            "/a:/b:ro+noexec+rprivate,/c",
            [
                bind("/a", "/b", "/a:/b:ro+noexec+rprivate", read_only=True, options=("noexec", "rprivate")),
                bind("/c", "/c", "/c"),
            ],
        ),
        ("/a:/b:nosuid+nodev", [bind("/a", "/b", "/a:/b:nosuid+nodev")]),
        ("/a,/a", [bind("/a", "/a", "/a")]),
        ("/a\\,b:/c\\:d", [bind("/a,b", "/c:d", "/a\\,b:/c\\:d")]),
        ("./in:/in", [bind("/home/u/in", "/in", "./in:/in")]),
        ("./in", [bind("/home/u/in", "/home/u/in", "./in")]),
        (".:/work", [bind("/home/u", "/work", ".:/work")]),
        ("../x:/x", [bind("/home/u/../x", "/x", "../x:/x")]),
        (
            "/a:/b:suid+dev+defaults+rbind+unbindable",
            [bind("/a", "/b", "/a:/b:suid+dev+defaults+rbind+unbindable", options=("unbindable",))],
        ),
        ("/a:./b", [bind("/a", "/b", "/a:./b")]),
        ("umount:/x", [Mount("", "/x", "umount", None, (), "umount:/x")]),
        ("devpts:/dev/pts", [Mount("", "/dev/pts", "devpts", None, (), "devpts:/dev/pts")]),
        ("tmpfs:/scratch", [Mount("", "/scratch", "tmpfs", None, (), "tmpfs:/scratch")]),
        (
            "tmpfs:/s:size=1G+mode=700",
            [Mount("", "/s", "tmpfs", None, ("size=1G", "mode=700"), "tmpfs:/s:size=1G+mode=700")],
        ),
    ],
)
def test_parses(text: str, mounts: list[Mount]) -> None:
    assert list(parse(text, "/home/u")) == mounts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "argument required"),
        (":/b", "empty source"),
        ("/a:", "empty target"),
        ("/a,,/b", "empty source"),
        ("/a:/b:ro:x", "too many colons"),
        ("a:/b", "mount source must be"),
        ("~/a:/b", "mount source must be"),
        (".hidden:/b", "mount source must be"),
        ("/a:b", "mount target must be an absolute path"),
        ("/a:/b:read-only", "unknown flag 'read-only'"),
        ("/a:/b:ro+", "empty flag"),
        ("/a:/b:ro+rw", "ro and rw together"),
        ("/a:/b:private+slave", "private and slave together"),
        ("/a:../b", "Cross-device link"),
        ("/a:/b:private+shared", "private and shared together"),
        ("/a:/b:size=1G", "unknown flag"),
        ("tmpfs", "tmpfs needs a target"),
        ("tmpfs:/t:size=lots", "unknown flag"),
        ("tmpfs:/t:size=1G+size=2G", "together"),
        ("umount", "umount needs a target"),
        ("devpts", "devpts needs a target"),
        ("devpts:/dev/pts:size=1G", "unknown flag"),
        ("/a\\b", "backslash"),
        ("/a\\", "backslash"),
        ("/" + "x" * 4096, "longer than"),
    ],
)
def test_refuses_with_the_words_of_pyxis(text: str, words: str) -> None:
    with pytest.raises(EnclosError) as caught:
        parse(text, "/home/u")
    assert "invalid format: " in caught.value.what
    assert words in caught.value.what
    assert caught.value.subject.startswith("--container-mounts=")


def test_relative_source_needs_a_directory() -> None:
    with pytest.raises(EnclosError, match="absolute path here"):
        parse("./a")


def test_number_of_mounts_is_limited() -> None:
    assert len(parse(",".join(f"/{n}" for n in range(MOUNT_LIMIT)))) == MOUNT_LIMIT
    with pytest.raises(EnclosError, match="more than"):
        parse(",".join(f"/{n}" for n in range(MOUNT_LIMIT + 1)))


def escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")


PATHS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20).map(lambda text: "/" + text)


@given(st.lists(st.tuples(PATHS, PATHS), min_size=1, max_size=4, unique=True))
def test_any_path_survives_when_escaped(pairs: list[tuple[str, str]]) -> None:
    text = ",".join(f"{escape(source)}:{escape(target)}:ro" for source, target in pairs)
    if any(normpath(target).strip("/") == "" for _, target in pairs):
        with pytest.raises(EnclosError, match="the container's root"):
            parse(text)
        return
    assert [(mount.source, mount.target) for mount in parse(text)] == pairs


@given(st.text(alphabet="/a.:,+\\rotmpfs", max_size=40))
def test_either_parsed_or_refused(text: str) -> None:
    try:
        mounts = parse(text, "/cwd")
    except EnclosError:
        return
    assert mounts
    for mount in mounts:
        assert mount.target.startswith("/")
        assert mount.source.startswith("/") or (mount.kind == "tmpfs" and mount.source == "")
