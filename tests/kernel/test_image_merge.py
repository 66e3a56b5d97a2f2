"""The merge of layers against umoci: the same tree, merged whole and as squashfs files under an overlay."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from enclos.runtime.images import convert
from enclos.runtime.images.convert import Layer
from enclos.runtime.images.flatten import LAYER_BITS, Tree
from enclos.runtime.images.order import Limits, Packing
from enclos.runtime.images.rules import BadLayer, NeedsBase, TooLarge
from enclos.runtime.images.tar import BadArchive, Reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import Entry, Listing, compressed, layer, listing, umoci_unpack, write_layout

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PACKING = Packing("zstd", 1, 131072)
LIMITS = Limits(10_000, 1 << 30)


def pack(layers: Sequence[bytes], path: Path, *, lowest: bool = True, limits: Limits = LIMITS) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened = []
        for index, data in enumerate(layers):
            (folder / str(index)).write_bytes(data)
            opened.append(Layer(convert.open_path(str(folder / str(index)))))
        convert.pack(opened, lowest, limits, PACKING, str(path))


@contextmanager
def mounted(parts: Sequence[Path], folder: Path) -> Iterator[Path]:
    """The parts, lowest first, as a container sees them: each a squashfs mount, above them an overlay."""
    with ExitStack() as stack:
        lowers: list[str] = []
        for index, part in enumerate(parts):
            lower = folder / f"lower{index}"
            lower.mkdir()
            subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(part), str(lower)], check=True)
            stack.callback(subprocess.run, ["umount", str(lower)], check=True)
            lowers.insert(0, str(lower))
        if len(lowers) == 1:
            yield Path(lowers[0])
            return
        root = folder / "root"
        root.mkdir()
        options = f"ro,userxattr,lowerdir={':'.join(lowers)}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(root)], check=True)
        stack.callback(subprocess.run, ["umount", str(root)], check=True)
        yield root


def ours(layers: Sequence[bytes], splits: Sequence[int] = ()) -> Listing:
    """The tree that our parts make; layers from each split on go into a file of their own."""
    borders = [0, *splits, len(layers)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = []
        for index, (begin, end) in enumerate(itertools.pairwise(borders)):
            parts.append(folder / f"{index}.sqsh")
            pack(layers[begin:end], parts[-1], lowest=begin == 0)
        with mounted(parts, folder) as root:
            return listing(root)


def theirs(layers: Sequence[bytes]) -> Listing:
    with tempfile.TemporaryDirectory() as name:
        write_layout(Path(name, "layout"), layers, compression="")
        return listing(umoci_unpack(Path(name, "layout"), Path(name, "bundle")))


def imported(layers: Sequence[bytes], splits: Sequence[int]) -> Listing:
    """`ours`; as one part, as an import does it, where a part cannot be understood without those below it."""
    try:
        return ours(layers, splits)
    except NeedsBase:
        return ours(layers)


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
KINDS = ["file", "file", "dir", "dir", "dir", "symlink", "link", "whiteout", "whiteout", "opaque", "fifo"]
TARGETS = PATHS | st.sampled_from(["/a", "/a/b", "../b", "b", ".", "/"])


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    path = draw(PATHS)
    kind = draw(st.sampled_from(KINDS))
    if kind == "whiteout":
        head, _, tail = path.rpartition("/")
        return Entry(f"{head}/.wh.{tail}".lstrip("/"))
    if kind == "opaque":
        return Entry(f"{path}/.wh..wh..opq")
    mode = draw(st.sampled_from([0o644, 0o755, 0o4755, 0o2775, 0o1777, 0o600]))
    data = draw(st.binary(max_size=8)) if kind == "file" else b""
    target = draw(TARGETS) if kind == "symlink" else draw(PATHS)
    return Entry(path, kind, data, target if kind in ("symlink", "link") else "", mode)


def declared(made: Sequence[Entry]) -> list[Entry]:
    """As docker writes layers: every directory before what is in it."""
    seen: set[str] = set()
    result = []
    for entry in made:
        parts = entry.name.split("/")[:-1]
        for end in range(1, len(parts) + 1):
            parent = "/".join(parts[:end])
            if parent not in seen:
                result.append(Entry(parent, "dir", mode=0o755))
                seen.add(parent)
        if entry.kind == "dir":
            seen.add(entry.name)
        result.append(entry)
    return result


def without_refused(stack: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """The layers without the members for which the whole image would be refused: most stacks have one."""
    result: list[list[Entry]] = []
    for made in stack:
        result.append([])
        for entry in made:
            result[-1].append(entry)
            if is_refused(result):
                result[-1].pop()
    return result


def is_refused(stack: Sequence[Sequence[Entry]]) -> bool:
    tree = Tree(lowest=True)
    for index, made in enumerate(stack):
        tree.begin(index)
        for number, member in enumerate(Reader(io.BytesIO(layer(made)).read), index << LAYER_BITS):
            try:
                tree.add(number, member)
            except BadLayer:
                return True
    return False


LAYERS = st.lists(entries(), max_size=6)
STACKS = st.lists(LAYERS, min_size=1, max_size=4)
SEVERAL = st.lists(LAYERS, min_size=2, max_size=4)
THOROUGH = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@given(STACKS, st.booleans())
@THOROUGH
def test_a_merged_image_has_umocis_tree(stack: list[list[Entry]], cut: bool) -> None:
    layers = [layer(made, cut=cut) for made in stack]
    try:
        wanted = theirs(layers)
    except subprocess.CalledProcessError:
        wanted = None
    try:
        found = ours(layers)
    except BadLayer:
        # We refuse what leads out of the image, where umoci stops at its root; and what umoci can't unpack.
        return
    assert wanted is not None, "umoci refuses these layers"
    assert found == wanted


@given(SEVERAL, st.data())
@THOROUGH
def test_parts_under_an_overlay_have_umocis_tree(stack: list[list[Entry]], data: st.DataObject) -> None:
    splits = sorted(data.draw(st.sets(st.integers(1, len(stack) - 1), min_size=1)))
    layers = [layer(made) for made in without_refused([declared(made) for made in stack])]
    assert imported(layers, splits) == theirs(layers)


NEW = Entry("new", "dir", mode=0o755)
OLD, DEEPER = Entry("old", "dir", mode=0o711), Entry("old/deep", "dir", mode=0o755)
DEEP = [NEW, Entry("new/deep", "dir", mode=0o755)]


@pytest.mark.parametrize("stack", [
    pytest.param([[NEW, Entry("new/a"), Entry("new/b")], [NEW, Entry("new/.wh.a")]], id="brought and deleted",
                 marks=pytest.mark.vm),
    pytest.param([[NEW, Entry("new/a")], [NEW, Entry("new/.wh.a")]], id="nothing is left"),
    pytest.param([[NEW, Entry("new/.wh.never"), Entry("new/a")]], id="what never was"),
    pytest.param([[NEW, Entry("new/.wh.never")], [NEW, Entry("new/never")]], id="what comes later"),
    pytest.param([[*DEEP, Entry("new/deep/a")], [*DEEP, Entry("new/deep/.wh.a"), Entry("new/.wh.never")]], id="nested"),
    pytest.param([[*DEEP, Entry("new/deep/a")], [NEW, Entry("new/.wh.deep")]], id="a directory"),
    pytest.param([[*DEEP, Entry("new/deep/a")], [NEW, Entry("new/.wh.deep")], [*DEEP, Entry("new/deep/.wh.a")]],
                 id="a directory, which comes again"),
    pytest.param([[OLD, Entry("old/.wh..wh..opq"), Entry("old/a"), Entry("old/b")],
                  [OLD, Entry("old/.wh.a"), Entry("old/.wh.kept")]], id="opaque"),
    pytest.param([[OLD, DEEPER, Entry("old/deep/.wh..wh..opq"), Entry("old/deep/a"), Entry("old/deep/b")],
                  [OLD, DEEPER, Entry("old/deep/.wh.a"), Entry("old/.wh.kept")]], id="opaque in one that is merged"),
    pytest.param([[Entry("old", data=b"a file now")],
                  [OLD, Entry("old/a"), Entry("old/.wh.kept")],
                  [OLD, Entry("old/.wh.a")]], id="a file and a directory again"),
    pytest.param([[NEW, Entry("new/l", "symlink", target="../old"), Entry("new/h", data=b"h")],
                  [NEW, Entry("new/k", "link", target="new/h"), Entry("new/.wh.l")],
                  [NEW, Entry("new/.wh.h")]], id="links"),
])  # fmt: skip
def test_whiteouts_in_a_directory_that_no_part_below_has(stack: list[list[Entry]]) -> None:
    """Nothing of them is seen, wherever the parts begin."""
    layers = [layer(made) for made in ([OLD, DEEPER, Entry("old/kept")], *stack)]
    wanted = theirs(layers)
    for count in range(len(layers)):
        for splits in itertools.combinations(range(1, len(layers)), count):
            assert imported(layers, splits) == wanted, splits


ETC = [Entry("etc", "dir", mode=0o755)]


def test_all_that_a_layer_can_do() -> None:
    """One example of everything, so that a generator that finds nothing cannot hide it."""
    lower = [
        Entry("/", "dir", mode=0o755),
        *ETC,
        Entry("etc/gone", data=b"1"),
        Entry("etc/kept", data=b"2"),
        Entry("etc/same", "link", target="etc/kept"),
        Entry("opaque", "dir", mode=0o700),
        Entry("opaque/old"),
        Entry("replaced", "dir"),
        Entry("replaced/old"),
        Entry("long" * 60 + "/" + "name" * 60),
        Entry("lib", "symlink", target="usr/lib"),
        Entry("suid", mode=0o4755),
        Entry("tmp", "dir", mode=0o1777),
    ]
    upper = [
        *ETC,
        Entry("etc/.wh.gone"),
        Entry("opaque", "dir", mode=0o755),
        Entry("opaque/new"),
        Entry("opaque/.wh..wh..opq"),
        Entry("replaced", data=b"a file now"),
        Entry("null", "char"),
    ]
    layers = [layer(lower), layer(upper, cut=True)]
    found = ours(layers)
    assert found == ours(layers, [1]) == theirs(layers)
    assert "etc/gone" not in found and "opaque/old" not in found and "null" not in found
    assert found["replaced"][2] == b"a file now"
    assert found["etc/same"][2:] == found["etc/kept"][2:]
    assert found["suid"][1] == 0o755 and found["tmp"][1] == 0o1777


@pytest.mark.parametrize("made", [
    [Entry("a", data=b"1"), Entry("a", data=b"2")],
    [Entry("a", data=b"1"), Entry("a", "symlink", target="b")],
    [Entry("a", data=b"1"), Entry("a", "dir"), Entry("a/b")],
    [Entry("a", "dir", mode=0o700), Entry("a", "dir", mode=0o755), Entry("a/b")],
    [Entry("a/b", data=b"1"), Entry("a", data=b"2")],
    [Entry("a", data=b"1"), Entry("a", "char"), Entry("b")],
    [Entry("a", "char"), Entry("a", data=b"1")],
    [Entry("a", data=b"1"), Entry("b", "link", target="a"), Entry("a", data=b"2")],
    [Entry("a", data=b"1"), Entry("b", data=b"2"), Entry("b", "link", target="a")],
    [Entry("d/a", data=b"1"), Entry("l", "symlink", target="d"), Entry("h", "link", target="l/a"), Entry("l/b")],
    [Entry("a", data=b"1"), Entry("b", "link", target="a"), Entry("c", "link", target="b")],
    [Entry("a/b", data=b"1"), Entry("a", "dir", mode=0o711)],
])  # fmt: skip
def test_a_layer_that_changes_what_it_brought(made: list[Entry]) -> None:
    """It is read as if nothing in it came twice; where that was wrong, it is read again, and comes out the same."""
    assert ours([layer(made)]) == theirs([layer(made)])


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_each_compression(tmp_path: Path, compression: str) -> None:
    pack([compressed(layer([Entry("f", data=b"x" * 100_000)]), compression)], tmp_path / "out")
    with mounted([tmp_path / "out"], tmp_path) as root:
        assert (root / "f").read_bytes() == b"x" * 100_000


def test_what_is_dropped(tmp_path: Path) -> None:
    """Rights and an overlay's orders do not survive; a user's own xattrs do, and everything is 0:0."""
    xattrs = {
        "user.note": "kept",
        "user.overlay.opaque": "y",
        "user.overlay.redirect": "/etc",
        "trusted.overlay.opaque": "y",
        "security.capability": "\x01",
        "system.posix_acl_access": "x",
    }
    made = [Entry("d", "dir", xattrs=xattrs), Entry("d/f", mode=0o6755, xattrs=xattrs), Entry("dev", "char")]
    pack([layer(made)], tmp_path / "out")
    with mounted([tmp_path / "out"], tmp_path) as root:
        assert os.listxattr(root / "d") == os.listxattr(root / "d/f") == ["user.note"]
        assert os.stat(root / "d/f").st_mode & 0o7777 == 0o755
        assert (os.stat(root / "d").st_uid, os.stat(root / "d").st_gid) == (0, 0)
        assert sorted(os.listdir(root)) == ["d"]


@pytest.mark.parametrize("gnu", ["gnu", "posix --sparse-version=0.1", "posix --sparse-version=1.0"])
def test_sparse_files_of_gnu_tar(tmp_path: Path, gnu: str) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        for at in (0, 1 << 20, 3 << 20, 5 << 20, 8 << 20, 12 << 20):
            file.seek(at)
            file.write(b"data at %d" % at)
        file.truncate(20 << 20)
    command = ["tar", "-C", str(tmp_path), "--sparse", f"--format={gnu.split()[0]}", *gnu.split()[1:], "-c", "sparse"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(archive) < 1 << 20, "tar did not see the holes"
    pack([archive], tmp_path / "out")
    with mounted([tmp_path / "out"], tmp_path) as root:
        assert (root / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([Entry("../etc/passwd")], "the member ../etc/passwd has '..' in its path"),
        ([Entry("a/../../b")], "the member a/../../b has '..' in its path"),
        ([Entry("/etc/passwd")], "the member /etc/passwd has an absolute path"),
        (
            [Entry("out", "symlink", target="../../etc"), Entry("out/passwd")],
            "a member that leads out of the image through a symlink (out)",
        ),
        ([Entry("h", "link", target="../../etc/shadow")], "the target of the hard link h has '..' in its path"),
        ([Entry("h", "link", target="/etc/shadow")], "the target of the hard link h has an absolute path"),
        ([Entry("h", "link", target="nothing")], "a hard link to a file that is not there (h)"),
        ([Entry("h", "link", target="later"), Entry("later")], "a hard link to a file that is not there (h)"),
        ([Entry("h"), Entry("h", "link", target="h")], "a hard link to itself (h)"),
        ([*ETC, Entry("h", "link", target="etc")], "a hard link to a directory (h)"),
        ([*ETC, Entry("etc/f"), Entry("etc", "link", target="etc/f")], "a hard link to a file that is not there (etc)"),
        (
            [Entry("here", "symlink", target="."), Entry("f"), Entry("here", "link", target="here/f")],
            "a hard link to a file that is not there (here)",
        ),
        ([Entry("f"), Entry("f/g")], "a member below a file that is no directory (f)"),
        ([Entry("x" * 256)], "the member " + "x" * 100 + "… has a name longer than 255 bytes"),
        ([Entry("l", "symlink", target="l"), Entry("l/f")], "symlinks that lead in a circle (l)"),
        ([Entry(".", "symlink", target="/etc")], "the root directory is no directory"),
        ([Entry("l", "symlink")], "the target of the symlink l is empty or has a NUL in it"),
        ([Entry("l", "symlink", target="\0/etc")], "the target of the symlink l is empty or has a NUL in it"),
        ([Entry("l", "symlink", target="t" * 4096)], "the target of the symlink l is longer than 4095 bytes"),
        (
            [Entry("l", "symlink", target="t" * 256), Entry("l/f")],
            "a symlink to a name longer than 255 bytes (l)",
        ),
        # libsquashfs writes 16 bits of a name's length: the kernel took such a name's bytes for attributes.
        (
            [Entry("f", xattrs={"user." + "\1" * 65536: ""})],
            "f has an extended attribute whose name is none (user." + "\1" * 95 + "…)",
        ),
        ([Entry("f", xattrs={"user.": "x"})], "f has an extended attribute whose name is none (user.)"),
        ([Entry("f", xattrs={"user.a\0b": "x"})], "f has an extended attribute whose name is none (user.a\0b)"),
        ([Entry("d", "dir", xattrs={"user.a": "x" * 65537})], "d/ has an extended attribute of more than 65536 bytes"),
    ],
)
def test_what_is_refused(tmp_path: Path, made: list[Entry], words: str) -> None:
    with pytest.raises(BadLayer) as caught:
        pack([layer(made)], tmp_path / "out")
    assert str(caught.value) == words


def test_an_absolute_symlink_stays_inside(tmp_path: Path) -> None:
    """`out/passwd` through `out -> /etc` is the image's own /etc/passwd."""
    pack([layer([Entry("out", "symlink", target="/etc"), Entry("out/passwd", data=b"image's")])], tmp_path / "o")
    with mounted([tmp_path / "o"], tmp_path) as root:
        assert (root / "etc/passwd").read_bytes() == b"image's"
        assert os.readlink(root / "out") == "/etc"


CUT = layer([Entry("f", data=b"x" * 2000)])[:1000]


@pytest.mark.parametrize("data", [b"hello", b"\0" * 100, os.urandom(4096), CUT])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadArchive):
        pack([data], tmp_path / "out")


def test_memory_is_asked_for_before_it_is_needed(tmp_path: Path) -> None:
    """More for files with data: where it is, and its end."""

    def asked(data: bytes) -> int:
        needs = [0]
        (tmp_path / "layer").write_bytes(layer([Entry(f"f{number}", data=data) for number in range(100)]))
        layers = [Layer(convert.open_path(str(tmp_path / "layer")))]
        convert.pack(layers, True, LIMITS, PACKING, str(tmp_path / "out"), needs.append)
        return max(needs)

    empty = asked(b"")
    assert empty > 100 * 60
    assert asked(b"x") > empty + 100 * 100


def test_limits(tmp_path: Path) -> None:
    many = layer([Entry(f"f{i}") for i in range(11)])
    with pytest.raises(TooLarge, match="more than 10 files"):
        pack([many], tmp_path / "out", limits=Limits(10, 1 << 30))
    bomb = compressed(layer([Entry("zeros", data=bytes(50 << 20))]), "gzip")
    assert len(bomb) < 1 << 20
    with pytest.raises(TooLarge, match="more than 1048576 bytes unpacked"):
        pack([bomb], tmp_path / "out", limits=Limits(10, 1 << 20))
