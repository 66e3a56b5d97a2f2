"""What images say about themselves, in the files that enroot, Singularity, Charliecloud and registries leave."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from enclos.runtime.images import facts
from enclos.runtime.images.facts import Facts, expand, fstab, rc_workdir
from hypothesis import given
from hypothesis import strategies as st

KNOWN = {"HOME": "/home/usera", "PWD": "/work"}
RC = """\
mkdir -p "/workspace" 2> /dev/null
cd "/workspace" && unset OLDPWD || exit 1

if [ -s /etc/rc.local ]; then
    . /etc/rc.local
fi

if [ $# -gt 0 ]; then
    exec "/opt/entry.sh" "$@"
else
    exec "/opt/entry.sh" "bash"
fi
"""
DOCKER_TO_SINGULARITY = """\
#!/bin/sh
export PATH="/opt/bin:/usr/bin:/bin"
export VERSION="${VERSION:-"1.2 3"}"
export EMPTY="${EMPTY:-""}"
"""
USERS_ENVIRONMENT = """\
#!/bin/sh
# Custom environment shell code should follow

    export LC_ALL=C
    export PATH=/more/bin:$PATH
    LATER='$HOME is not replaced'
    export LATER OTHER
    OTHER="${HOME}/data"; export OTHER
"""


def read(files: Mapping[str, str], config: str = "") -> Facts:
    def names(path: str) -> list[str]:
        return [name.removeprefix(f"{path}/") for name in files if name.startswith(f"{path}/")]

    return facts.read(config, lambda path: files.get(path, "").encode(), names, KNOWN)


def test_an_image_that_says_nothing() -> None:
    assert read({}) == Facts()


# -- enroot ------------------------------------------------------------------------------------------------------


def test_enroots_files() -> None:
    environment = 'PATH=/usr/bin\nDATA=${HOME}/data\nDISPLAY=${DISPLAY}\nWHERE="$PWD"\nGONE=a${NOTHING}b\n'
    found = read({"/etc/environment": environment, "/etc/rc": RC})
    assert found.variables == [
        ("PATH", "/usr/bin"),
        ("DATA", "/home/usera/data"),
        ("WHERE", "/work"),
        ("GONE", "ab"),
    ]
    assert (found.workdir, found.entrypoint, found.warnings) == ("/workspace", ("/etc/rc",), [])


@pytest.mark.parametrize(("script", "workdir"), [
    ("cd /plain\n", "/plain"),
    ('cd "/with blanks" && unset OLDPWD || exit 1\n', "/with blanks"),
    ("cd relative\n", ""),
    ("cd $HOME\n", ""),
    ("echo no\n  cd /later\n", ""),
    ("", ""),
])  # fmt: skip
def test_the_directory_that_rc_goes_into(script: str, workdir: str) -> None:
    assert rc_workdir(script.encode()) == workdir


def test_fstab_as_enroot_understands_it() -> None:
    text = """\
# comment
${HOME} /data none bind,ro,x-create=dir
/with\\040blank /target rbind,nofail 0 0
tmpfs /scratch tmpfs size=1M
tmpfs /tmp
/proc /proc none rbind
LABEL=root / ext4 defaults 0 1
UUID=1234 /boot ext4 defaults 0 2
/dev/sda1 /mnt ext4 defaults
nothing
"""
    mounts, warnings = fstab(text.encode(), KNOWN)
    shown = [(mount.kind, mount.source, mount.target, mount.read_only, mount.options) for mount in mounts]
    assert shown == [
        ("bind", "/home/usera", "/data", True, ("x-create=dir",)),
        ("bind", "/with blank", "/target", None, ("nofail",)),
        ("tmpfs", "", "/scratch", None, ("size=1M",)),
        ("tmpfs", "", "/tmp", None, ()),
    ]
    assert warnings == []


def test_a_line_of_fstab_that_cannot_be_a_mount_is_told() -> None:
    mounts, warnings = fstab(b"/a /b none bind,madeup\n/c /d none bind\n", {})
    assert [mount.source for mount in mounts] == ["/c"]
    assert len(warnings) == 1 and "madeup" in warnings[0] and warnings[0].endswith("ignoring '/a:/b:bind+madeup'")


# -- Singularity -------------------------------------------------------------------------------------------------


def test_singularitys_scripts_are_read_in_their_order() -> None:
    files = {
        "/.singularity.d/env/90-environment.sh": USERS_ENVIRONMENT,
        "/.singularity.d/env/10-docker2singularity.sh": DOCKER_TO_SINGULARITY,
        "/.singularity.d/env/01-base.sh": "#!/bin/sh\nif true; then :; fi\n",
        "/.singularity.d/env/notes": "NOT=read",
        "/etc/environment": "NOT=read\n",
    }
    found = read(files)
    assert dict(found.variables) == {
        "PATH": "/more/bin:/opt/bin:/usr/bin:/bin",
        "VERSION": "1.2 3",
        "EMPTY": "",
        "LC_ALL": "C",
        "LATER": "$HOME is not replaced",
    }
    # Two commands in its last line.
    assert len(found.warnings) == 1 and "/.singularity.d/env/90-environment.sh of the image" in found.warnings[0]
    assert found.entrypoint[:2] == ("/bin/sh", "-c")


@pytest.mark.parametrize("line", [
    "export A=$(hostname)", "export A=`hostname`", "if [ -z $A ]; then", "export A=b; export B=c", '. /etc/profile',
    'export A="a" "b"', "A=b program", "for x in a b", "export A=*",
])  # fmt: skip
def test_what_needs_a_shell_is_left_out_with_a_word(line: str) -> None:
    found = read({"/.singularity.d/env/90-environment.sh": f"export BEFORE=1\n{line}\nexport AFTER=2\n"})
    assert found.variables == [("BEFORE", "1"), ("AFTER", "2")]
    path = "/.singularity.d/env/90-environment.sh"
    assert found.warnings == [f"{path} of the image needs a shell, which --container-entrypoint starts, ignoring"]


# -- Charliecloud ------------------------------------------------------------------------------------------------


def test_charlieclouds_files() -> None:
    files = {
        "/ch/environment": "A=b\nPATH=/opt/bin:$A:$NOTHING:/bin\nDOLLAR=costs 3$\nQUOTED='as is'\nbad line\n",
        "/ch/metadata.json": json.dumps({"cwd": "/work"}),
        "/etc/environment": "NOT=read\n",
    }
    found = read(files)
    assert found.variables == [("A", "b"), ("PATH", "/opt/bin:b:/bin"), ("DOLLAR", "costs 3$"), ("QUOTED", "as is")]
    assert found.workdir == "/work"


# -- registries --------------------------------------------------------------------------------------------------


def test_a_registrys_configuration() -> None:
    variables = ["PATH=/usr/bin", 'Q="as is"', "bad", 7, "TWO=a\nB=c"]
    config = {"Env": variables, "WorkingDir": "/app", "Entrypoint": ["/e", "x"]}
    found = read({"/etc/environment": "NOT=read\n", "/etc/rc": RC}, json.dumps(config))
    assert found == Facts([("PATH", "/usr/bin"), ("Q", '"as is"')], "/app", ("/e", "x"))


@pytest.mark.parametrize("config", ["[]", "no json", "3", '{"Env": 3, "WorkingDir": [], "Entrypoint": "sh"}'])
def test_a_configuration_of_another_form_gives_nothing(config: str) -> None:
    found = read({}, config)
    assert (found.variables, found.workdir, found.entrypoint) == ([], "", ())


# -- whatever is in it -------------------------------------------------------------------------------------------


@given(st.text(max_size=300), st.sampled_from(["/etc/environment", "/etc/rc", "/ch/environment", "/ch/metadata.json",
                                               "/.singularity.d/env/90-environment.sh", "config"]))  # fmt: skip
def test_no_text_of_an_image_breaks_it(text: str, where: str) -> None:
    found = read({"/ch/environment": "A=b\n", where: text}, text if where == "config" else "")
    for name, value in found.variables:
        assert name.isidentifier() and "\0" not in value


@given(st.text(alphabet="$}{:-aA\"' \\/", max_size=60))
def test_references_are_replaced_once(text: str) -> None:
    """A value that looks like a reference is not looked at again."""
    assert expand(text, {}) == expand(text, {"UNUSED": "${HOME}"})
    fstab(text.encode(), {})


def test_expansion() -> None:
    assert expand("$A ${A} ${B:-c} ${B-d} $$A ${B} $", {"A": "${A}"}) == "${A} ${A} c d $A  $"
