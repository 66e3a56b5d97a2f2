"""What srun refuses by itself: each option's patterns, and that they refuse nothing that the agent would take."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from enclos.runtime import mounts, request
from enclos.runtime.errors import EnclosError
from enclos.runtime.settings import OPTIONS
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
]
GOOD = [
    ("mounts", "/a,/b:/c,/d:/e:ro+rprivate+x-create=dir,./x:./y,..:/up,.:/here,/f g:/h i"),
    ("mounts", "tmpfs:/t:size=1G+mode=700,devpts:/dev/pts,umount:/x:x-detach,/a:/b:"),
    ("mounts", "/a\\,b:/c\\:d:ro"),
    ("mounts", "/home:/.hidden"),
    ("env", "A,B_C,_d"),
    ("unshare", "net,ipc,uts"),
    ("network", "job"),
    ("name", "a b:no_exec"),
    ("name", "42.0"),
    ("name", "a:"),
    ("workdir", "../"),
]


def refusal(key: str, value: str) -> str:
    """The first words with which srun would refuse a value; "" if it would not."""
    (row,) = [o for o in OPTIONS if o.key == key and o.arginfo]
    return next((check.words for check in row.checks if check.refuses(value)), "")


@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_what_is_refused(key: str, value: str, words: str) -> None:
    assert words in refusal(key, value)


@pytest.mark.parametrize(("key", "value", "words"), BAD)
def test_the_agent_refuses_it_too(key: str, value: str, words: str) -> None:
    """Who gets past srun meets the same rules on the node."""
    if key == "network" or (value == "" and key != "mounts"):
        return  # Networks are the policy's; an empty option is as none.
    with pytest.raises(EnclosError):
        request.parse({**FACTS, f"option.{key}": [value]})


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_what_is_not_refused(key: str, value: str) -> None:
    assert refusal(key, value) == ""
    request.parse({**FACTS, f"option.{key}": [value]})


PIECES = ["/", "a", ".", ":", ",", "+", "\\", " ", "tmpfs", "umount", "ro", "x-create=dir", "size=1G", ":/", ",/"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_srun_never_refuses_a_mount_that_the_agent_takes(value: str) -> None:
    try:
        mounts.parse(value, "/work")
    except EnclosError:
        return
    assert refusal("mounts", value) == ""


def test_the_c_library_reads_the_patterns_as_python_does(tmp_path: Path) -> None:
    """The same values, through regcomp(3)."""
    source = tmp_path / "t.c"
    source.write_text(
        "#include <regex.h>\n#include <stdio.h>\n"
        "int main(int count, char **words)\n{\n\tregex_t pattern;\n"
        "\tif (count < 3 || regcomp(&pattern, words[1], REG_EXTENDED | REG_NOSUB) != 0)\n\t\treturn 2;\n"
        "\treturn regexec(&pattern, words[2], 0, NULL, 0) != 0;\n}\n"
    )
    program = tmp_path / "t"
    subprocess.run(["cc", "-o", str(program), str(source)], check=True)
    for key, value in [*((key, value) for key, value, _ in BAD), *GOOD]:
        (row,) = [o for o in OPTIONS if o.key == key and o.arginfo]
        for check in row.checks:
            if check.each and "\\" in value:
                continue
            for part in value.split(",") if check.each else [value]:
                done = subprocess.run([str(program), f"^({check.pattern})$", part], check=False)
                assert done.returncode in (0, 1)
                whole = check.refuses(part)
                assert (done.returncode == 1) is whole, (check.pattern, part)
