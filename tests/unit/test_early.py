"""What srun refuses by itself: each option's rules, in Python and in the shim, and that the node agrees with them."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from enclos.runtime import early, limits, policy, request
from enclos.runtime.errors import EnclosError
from enclos.runtime.images import reference
from enclos.runtime.options import OPTIONS
from enclos.runtime.settings import Config
from hypothesis import given
from hypothesis import strategies as st

FACTS = {
    "job": ["7"], "step": ["0"], "uid": ["1001"], "gid": ["1001"], "groups": [""], "stepd": ["4242"], "tasks": ["1"],
    "spool": ["/spool"], "tmpfs": ["/tmp"], "cwd": ["/work"], "home": ["/home"], "option.image": ["/x"],
}  # fmt: skip

BAD = [
    ("image", "", "argument required"),
    ("mounts", "", "argument required"),
    ("mounts", ":", "mount without a source"),
    ("mounts", "/a:/b,", "mount without a source"),
    ("mounts", "/tmp:", "mount without a target"),
    ("mounts", "/tmp::ro", "mount without a target"),
    ("mounts", "tmp:/tmp", "mount source must be a relative path"),
    ("mounts", "/a,~/b:/b", "mount source must be a relative path"),
    ("mounts", "/home:../home", "Cross-device link"),
    ("mounts", "/home:..", "Cross-device link"),
    ("mounts", "/a:b", "mount target must be an absolute path"),
    ("mounts", "/a:/b:ro:rw", "too many colons"),
    ("mounts", "/a:/b:read-only", "unknown flag"),
    ("mounts", "/a,/c:/b:ro+what", "unknown flag"),
    ("mounts", "tmpfs:/t:sizes=1G", "unknown flag"),
    ("workdir", "", "argument required"),
    ("env", "", "argument required"),
    ("env", "A,,B", "invalid format"),
    ("env", "A=b", "invalid format"),
    ("unshare", "foo", "unknown namespace"),
    ("unshare", "net,foo", "unknown namespace"),
    ("unshare", "net,", "unknown namespace"),
    ("unshare", "net,pid", "no process can join a pid namespace"),
    ("network", "blue", "no such network"),
    ("name", "", "argument required"),
    ("save", "", "argument required"),
    ("save", "/a/", "target is a directory"),
    ("name", ":exec", "empty name"),
    ("name", "a/b", "a name has no slash"),
    ("name", "a:often", 'flag must be "auto", "create", "exec" or "no_exec"'),
    ("name", "a:exec:create", "flag must be"),
    ("image", "foo://x", "unknown kind of image"),
    ("image", "http:///x", "unknown kind of image"),
    ("image", "oci:", "a path has to follow"),
    ("image", "dir:", "a path has to follow"),
    ("image", "docker://", "neither a path"),
    ("image", "docker://Debian:12", "neither a path"),
    ("image", "docker://debian:", "neither a path"),
    ("image", "docker://debian:12@sha256:abc", "neither a path"),
    ("image", "docker://a b", "neither a path"),
    ("image", "~/x.sqsh", "neither a path"),
    ("image", "-x", "neither a path"),
    ("image", "/" + "x" * 4095, "longer than"),
    ("mounts", "tmpfs", "mount without a target"),
    ("mounts", "/a,umount", "mount without a target"),
    ("mounts", "/a:/b:ro+rw", "ro and rw exclude each other"),
    ("mounts", "/a:/b:rw+noexec+ro", "ro and rw exclude each other"),
    ("mounts", "/c,/a:/b:exec+noexec", "exec and noexec exclude each other"),
    ("mounts", "/a:/b:private+noexec+slave", "runbindable exclude each other"),
    ("mounts", "/a:/b:noatime+relatime", "noatime, relatime and strictatime exclude each other"),
    ("mounts", "/a:/b:x-create=dir+x-create=file", "exclude each other"),
    ("mounts", "tmpfs:/t:size=1G+size=2G", "size given twice"),
    ("mounts", "tmpfs:/t:size=lots", "unknown flag of a mount, or no value for it"),
    ("mounts", "tmpfs:/t:size=0", "unknown flag"),
    ("mounts", "tmpfs:/t:mode=9", "unknown flag"),
    ("mounts", "/a:/b:size=1G", "unknown flag"),
    ("mounts", "/a:/b:ro+", "unknown flag"),
    ("mounts", "/a\\b", "a backslash goes before"),
    ("mounts", "/a:/b\\", "a backslash goes before"),
    ("mounts", "/a\\,b,c:/d", "mount source must be"),
    ("mounts", "/a:/", "the container's root cannot be a target"),
    ("mounts", "/", "the container's root cannot be a target"),
    ("mounts", "/a:.", "the container's root cannot be a target"),
    ("mounts", "/a:/.//", "the container's root cannot be a target"),
    ("mounts", "/a:/b/..:ro", "the container's root cannot be a target"),
    ("workdir", "/" + "x" * 4095, "longer than"),
    ("save", "/" + "x" * 4095, "longer than"),
    ("name", "x" * 129, "at most 128 bytes"),
    ("name", "ä" * 65, "at most 128 bytes"),
    ("name", "a\tb", "no control character"),
    ("env", "A\\,B", "invalid format"),
    ("device", "", "argument required"),
    ("device", "acme", "invalid format"),
    ("device", "acme.com/fpga", "invalid format"),
    ("device", "acme.com/fpga=", "invalid format"),
    ("device", "acme.com/fpga=0,", "invalid format"),
    ("device", "acme.com-/fpga=0", "invalid format"),
    ("device", "acme.com/fpga=0-", "invalid format"),
    ("rdma", "", "argument required"),
    ("rdma", "0", "invalid format"),
    ("rdma", "100", "invalid format"),
    ("rdma", "mlx5_0,", "invalid format"),
    ("rdma", "mlx5_0,2", "invalid format"),
    ("rdma", "mlx5_*", "invalid format"),
    ("cgroup", "", "argument required"),
    ("cgroup", "writable", "expected readonly or delegate"),
    ("limit", "", "argument required"),
    ("limit", "8G", "not a limit"),
    ("limit", "ram=8G", "not a limit"),
    ("limit", "memory", "not a limit"),
    ("limit", "memory=", "not a limit"),
    ("limit", "memory=8G,", "not a limit"),
    ("limit", "memory=8Q", "expected a size such as 512M or 8G"),
    ("limit", "memory=-1", "expected a size"),
    ("limit", "memory=1.5G", "expected a size"),
    ("limit", "memory=9999999T", "expected a size"),
    ("limit", "memory=1023K", "less than 1M"),
    ("limit", "memory=1048575", "less than 1M"),
    ("limit", "memory=0G", "less than 1M"),
    ("limit", "swap=none", "expected a size"),
    ("limit", "cpu=two", "expected a number of processors"),
    ("limit", "cpu=0", "less than 0.01 of a processor"),
    ("limit", "cpu=0.009", "less than 0.01 of a processor"),
    ("limit", "cpuset=a", "expected processors"),
    ("limit", "cpuset=3-1", "expected processors"),
    ("limit", "cpuset=0,3-1", "expected processors"),
    ("limit", "cpuset=0-12345", "expected processors"),
    ("limit", "memory=1G,3", "only cpuset has a list of numbers"),
    ("limit", "3,cpuset=0", "only cpuset has a list of numbers"),
    ("limit", "pids=0", "expected a whole number from 1"),
    ("limit", "pids=1k", "expected a whole number from 1"),
    ("limit", "io=sda:rbps=1M", "expected MAJ:MIN:KEY=N"),
    ("limit", "io=8:0:speed=1M", "expected MAJ:MIN:KEY=N"),
    ("limit", "io=8:0:riops=1M", "expected MAJ:MIN:KEY=N"),
    ("limit", "io=8:0:rbps=0", "0 would stop every access"),
    ("limit", "io=8:0:rbps=1M:rbps=2M", "given twice"),
    ("limit", "hugetlb=1G", "expected PAGESIZE:SIZE"),
    ("limit", "hugetlb=0M:1G", "expected PAGESIZE:SIZE"),
    ("limit", "rdma=mlx5_0", "expected DEVICE:KEY=N"),
    ("limit", "rdma=mlx5_0:handles=4", "expected DEVICE:KEY=N"),
    ("limit", "memory=1G,memory=1G", "given twice"),
    ("limit", "io=8:0:rbps=1M,io=8:0:rbps=2M", "given twice"),
    ("limit", "hugetlb=2M:1G,hugetlb=2M:2G", "given twice"),
]
GOOD = [
    ("mounts", "/a,/b:/c,/d:/e:ro+rprivate+x-create=dir,./x:./y,..:/up,.:/here,/f g:/h i"),
    ("mounts", "tmpfs:/t:size=1G+mode=700,devpts:/dev/pts,umount:/x:x-detach,/a:/b:"),
    ("mounts", "/a\\,b:/c\\:d:ro,/e\\\\:/f"),
    ("mounts", "/home:/.hidden,/b:/..x,/c:/d/../e"),
    ("mounts", "/a:/b:ro+ro+private+private,tmpfs:/t:ro+size=50%+nr_inodes=1k"),
    ("mounts", "/ä:/ö"),
    ("env", "A,B_C,_d"),
    ("unshare", "net,ipc,uts"),
    ("network", "job"),
    ("name", "a b:no_exec"),
    ("name", "42.0"),
    ("name", "a:"),
    ("name", "x" * 128 + ":no_exec"),
    ("workdir", "../"),
    ("image", "/a://b"),
    ("image", "docker://debian:12"),
    ("image", "docker://me@registry.site:5000/a/b__c:1.2-x@sha256:" + "0" * 64),
    ("image", "nvcr.io#nvidia/pytorch:24.01-py3"),
    ("image", "docker://[::1]:5000/a"),
    ("image", "debian"),
    ("image", "oci-archive:a b.tar:Tag"),
    ("image", "oci://shared/layout:v1"),
    ("device", "acme.com/fpga=0,acme.com/fpga=all"),
    ("rdma", "auto"),
    ("rdma", "mlx5_0,mlx5_1"),
    ("rdma", "99"),
    ("limit", "memory=8G,swap=0,cpu=2.5,cpuset=0-3,8,pids=512,io=8:0:rbps=100M:wiops=50,hugetlb=2M:1G"),
    ("limit", "rdma=mlx5_0:hca_handle=4:hca_object=1000,rdma=mlx5_1:hca_handle=4,io=8:0:rbps=1,io=8:16:rbps=1"),
    ("limit", "memory=1M,cpu=0.01,cpuset=3-3,1"),
    ("limit", "memory=1048576"),
    ("limit", "memory=1024k,cpuset=0-3,9-12"),
]
# What the node alone finds out: it needs a whole value's meaning, and no pattern has that.
ON_THE_NODE = (
    "more than",  # How many mounts, names, limits and devices.
    "path longer than",  # A part of a mount.
    "the container's root can't be a target",  # By several `..`.
    "given twice",  # The same of several keys of io and rdma, or page size in other words.
    "expected a size of huge pages",  # A page in bytes.
    "a name has 1 to",  # What Unicode calls unprintable.
    "invalid format: expected VENDOR/CLASS",  # Length.
    "is not a name of a variable",  # Length.
)


def refusal(key: str, value: str) -> str:
    """The first words with which srun would refuse a value; "" if it would not."""
    (row,) = [o for o in OPTIONS if o.key == key and o.arginfo]
    return next((check.words for check in row.checks if check.refuses(value)), "")


def on_the_node(key: str, value: str) -> str:
    """What the agent says of a value; "" if it takes it."""
    try:
        policy.decide(request.parse({**FACTS, f"option.{key}": [value]}), Config())
        if key == "image":
            reference.parse(value, "registry.site")
    except EnclosError as error:
        return error.what
    except reference.BadReference as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def in_the_shim(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """The shim's own decision about a value: its table and its code."""
    folder = tmp_path_factory.mktemp("shim")
    spank = Path(__file__).resolve().parents[2] / "spank"
    source = folder / "checks.c"
    source.write_text(
        '#include <string.h>\n#include "options.gen.h"\nconst char *refusal(const char *key, const char *value)\n{\n'
        "\tfor (int i = 0; i < ENCLOS_OPTION_COUNT; i++)\n"
        "\t\tif (strcmp(enclos_option_rows[i].key, key) == 0 && enclos_option_rows[i].has_arg)\n"
        '\t\t\treturn checks_refusal(enclos_option_rows[i].checks, value);\n\treturn "no such option";\n}\n'
    )
    library = str(folder / "checks.so")
    sources = [str(source), str(spank / "checks.c")]
    words = ["cc", "-shared", "-fPIC", "-Wno-unused", f"-I{spank}", "-o", library, *sources]
    subprocess.run(words, check=True)
    function = ctypes.CDLL(library).refusal
    function.restype = ctypes.c_char_p
    return lambda key, value: (function(key.encode(), value.encode()) or b"").decode()


@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_what_is_refused(key: str, value: str, words: str, in_the_shim: Callable[[str, str], str]) -> None:
    assert words in refusal(key, value)
    assert in_the_shim(key, value) == refusal(key, value)


@pytest.mark.parametrize(("key", "value", "words"), [row for row in BAD if row[1]])
def test_the_node_refuses_it_too(key: str, value: str, words: str) -> None:
    """Who gets past srun meets the same rules there. (An empty option is as none.)"""
    assert on_the_node(key, value)


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_what_is_not_refused(key: str, value: str, in_the_shim: Callable[[str, str], str]) -> None:
    assert in_the_shim(key, value) == refusal(key, value) == on_the_node(key, value) == ""


PIECES = {
    "mounts": ["/", "a", ".", ":", ",", "+", "\\", " ", "tmpfs", "tmpfs:/t:", "umount", "ro", "x-create=dir", "size=1G",
               "mode=7", ":/", ",/", "/a:/b:", "+rw", "+private", "+slave", "+exec", "..", "/..", "size=2G", "nofail"],
    "limit": ["memory", "swap", "cpu", "cpuset", "pids", "io", "hugetlb", "rdma", "=", ",", "0", "1", "9", "1024", "-",
              ":", "K", "M", "8G", "Q", ".5", "8:0", "rbps=", "wiops=", "2M:", "mlx5_0", "hca_handle=", "iB",
              "memory=1G", ",cpuset=0-", ",io=8:0:rbps=1", ",rdma=a:hca_handle=1", ",hugetlb=2M:1", ",cpu=", "0.0"],
    "image": ["docker://", "oci:", "dir:", "oci-archive:", "http://", "/", ".", "a", "B", "-", "_", ":", "#", "@",
              "5000", "registry.site", "@sha256:" + "0" * 64, " ", "localhost", "[::1]", "~"],
    "name": ["a", ":", "/", "auto", "exec", "no_exec", "create", " ", "\t", "x" * 64, "."],
    "device": ["acme.com", "/", "fpga", "=", "0", ",", "-", "all", ".", "_", ":"],
    "rdma": ["auto", "none", "mlx5_0", ",", "0", "1", "9", "-", "*"],
    "unshare": ["net", "ipc", "uts", "pid", ",", "cgroup"],
    "network": ["job", "host", "none", "blue", ","],
    "cgroup": ["readonly", "delegate", ","],
    "env": ["A", "b", ",", "=", "1", "_", ".", "-", " "],
    "save": ["/", "a", "./", "..", " "],
    "workdir": ["/", "a", "..", " "],
}  # fmt: skip


def test_no_option_is_left_out() -> None:
    assert set(PIECES) == {option.key for option in OPTIONS if option.checks} - {"profile"}


@pytest.mark.parametrize("key", PIECES)
def test_srun_and_the_node_agree(key: str, in_the_shim: Callable[[str, str], str]) -> None:
    """Whatever is typed: the shim's code decides as its rules in Python do, and the node as both."""

    @given(st.lists(st.sampled_from(PIECES[key]), min_size=1, max_size=9).map("".join))
    def agree(value: str) -> None:
        early_words, words = refusal(key, value), on_the_node(key, value)
        assert in_the_shim(key, value) == early_words
        if early_words:
            assert words, "srun refuses what the node takes"
        elif words and key != "image":  # What a name means there depends on the site's registry.
            assert any(part in words for part in ON_THE_NODE), words

    agree()


@given(st.sampled_from(sorted(PIECES)), st.text(max_size=12))
def test_srun_never_refuses_what_the_node_takes(key: str, value: str) -> None:
    if "\0" not in value and value and on_the_node(key, value) == "":
        assert refusal(key, value) == ""


@given(st.integers(1, 10**7), st.integers(0, 10**8))
def test_numbers_below(limit: int, number: int) -> None:
    for value in (number, limit, limit - 1, limit + 1):
        assert (re.fullmatch(early.below(limit), f"00{value}") is not None) == (value < limit)


def test_no_size_is_too_large_for_the_kernel() -> None:
    largest = max(
        limits.size(text, text) for text in ("9" * 18, "9" * 15 + "K", "9" * 12 + "M", "9" * 9 + "G", "9" * 6 + "T")
    )
    assert largest < 1 << 62
