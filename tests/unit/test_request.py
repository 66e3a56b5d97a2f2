"""A step's request: forms of fields, and what contradicts itself."""

from __future__ import annotations

import pytest
from enclos.runtime.errors import AdminError, EnclosError, UserError
from enclos.runtime.request import StepRequest, parse
from hypothesis import given
from hypothesis import strategies as st

FIELDS: dict[str, list[str]] = {
    "version": ["1"],
    "verb": ["prepare"],
    "job": ["42"],
    "step": ["0"],
    "uid": ["1001"],
    "gid": ["1001"],
    "groups": ["1001,2000,1001"],
    "stepd": ["4711"],
    "tasks": ["2"],
    "spool": ["/var/spool/slurmd"],
    "tmpfs": ["/tmp"],
    "cwd": ["/home/usera"],
    "home": ["/home/usera"],
    "option.image": ["./mpi.sqsh"],
}


def request(**changes: list[str]) -> StepRequest:
    """A request with some fields changed; `option_x` stands for `option.x`, `_` in a name for `-`."""
    renamed = {
        ("option." + key.removeprefix("option_").replace("_", "-") if key.startswith("option_") else key): value
        for key, value in changes.items()
    }
    return parse({**FIELDS, **renamed})


def test_plain_request() -> None:
    found = request()
    assert (found.job, found.step, found.uid, found.gid, found.stepd, found.tasks) == (42, 0, 1001, 1001, 4711, 2)
    assert found.groups == (1001, 2000)
    assert found.image == "./mpi.sqsh"
    assert found.image_path() == "/home/usera/./mpi.sqsh"
    assert found.network == ""
    assert (found.writable, found.remap_root, found.mount_home) == (None, None, None)
    assert found.mounts == ()
    assert not found.asks_by_default


@pytest.mark.parametrize(
    ("text", "name", "flag"),
    [("w", "w", "auto"), ("w:", "w", "auto"), ("w:create", "w", "create"), ("a b:no_exec", "a b", "no_exec")],
)
def test_names_of_containers(text: str, name: str, flag: str) -> None:
    """With one, no image is needed."""
    found = request(option_image=[], option_name=[text])
    assert (found.image, found.name, found.name_flag) == ("", name, flag)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (":exec", "empty name"), ("a/b", "no slash"), ("..\n", "control character"), ("x" * 129, "128 bytes"),
        ("ä" * 65, "128 bytes"), ("w:run", "flag must be"), ("w:exec:create", "flag must be"),
    ],
)  # fmt: skip
def test_what_can_be_no_name_of_a_container(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        request(option_name=[text])


def test_all_options() -> None:
    found = request(
        option_network=["job"],
        option_mounts=["/a:/b", "./c", "/a:/b"],
        option_workdir=["/work"],
        option_readonly=["1"],
        option_remap_root=["1"],
        option_mount_home=["0"],
        option_env=["PATH,HOME", "LANG"],
    )
    assert found.network == "job"
    assert [(m.source, m.target) for m in found.mounts] == [("/a", "/b"), ("/home/usera/c", "/home/usera/c")]
    assert (found.writable, found.remap_root, found.mount_home) == (False, True, False)
    assert found.environment == ("PATH", "HOME", "LANG")


@pytest.mark.parametrize("step", ["4294967291", "4294967290"])
def test_batch_and_interactive_steps(step: str) -> None:
    assert request(step=[step]).asks_by_default


def test_interface_variables() -> None:
    found = parse({**FIELDS, "env.NCCL_SOCKET_IFNAME": ["ib0"], "env.FI_TCP_IFACE": ["x" * 5000]})
    assert found.interface_variables == {"NCCL_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job", "-1"),
        ("job", "4_2"),
        ("job", "٤٢"),
        ("uid", "4294967295"),
        ("gid", ""),
        ("groups", "1,x"),
        ("groups", "4294967295"),
        ("stepd", "1"),
        ("tasks", "0"),
        ("cwd", "home"),
        ("spool", "/" + "x" * 5000),
    ],
)
def test_facts_of_slurmstepd_have_to_have_their_form(key: str, value: str) -> None:
    with pytest.raises(AdminError, match="cannot understand the request"):
        parse({**FIELDS, key: [value]})


def test_home_may_be_anything() -> None:
    assert request(home=["not a path"]).home == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"option_image": [""], "option_network": ["job"]}, "it needs --container-image"),
        ({"option_image": ["a", "b"]}, "specified multiple times"),
        ({"option_image": ["/" + "x" * 5000]}, "longer than"),
        ({"option_unshare": ["net,foo"]}, "unknown namespace 'foo'"),
        ({"option_unshare": ["pid"]}, "no process can join a pid namespace"),
        ({"option_unshare": ["net"], "option_network": ["job"]}, "cannot be combined with --container-network=job"),
        ({"option_writable": ["1"], "option_readonly": ["1"]}, "both --container-writable and --container-readonly"),
        ({"option_remap_root": ["0", "1"]}, "both --container-remap-root and --no-container-remap-root"),
        ({"option_remap_root": ["yes"]}, "expected 0 or 1"),
        ({"option_mounts": ["a"]}, "invalid format"),
        ({"option_env": ["A,,B"]}, "invalid format"),
        ({"option_env": ["A=1"]}, "invalid format"),
        ({"option_env": [",".join(f"V{n}" for n in range(2000))]}, "more than"),
    ],
)
def test_mistakes_of_the_user(changes: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError) as caught:
        request(**changes)
    assert words in caught.value.line()


@pytest.mark.parametrize(
    ("changes", "writable"),
    [
        ({}, None),
        ({"option_writable": ["1"]}, True),
        ({"option_readonly": ["1"]}, False),
        ({"option_writable": ["0"]}, False),
        ({"option_readonly": ["0"]}, True),
        ({"option_writable": ["1"], "option_readonly": ["0"]}, True),
    ],
)
def test_writable(changes: dict[str, list[str]], writable: bool | None) -> None:
    assert request(**changes).writable is writable


@pytest.mark.parametrize("name", ["ubuntu:24.04", "docker://ubuntu", "image.sqsh", ".hidden", "~/x"])
def test_image_that_is_no_path(name: str) -> None:
    assert request(option_image=[name]).image_path() == ""


def test_a_digest_counts_for_the_image_that_srun_resolved() -> None:
    digest = f"sha256:{'ab' * 32}"
    wanted = {"option_image": ["docker://r.site/a:t"]}
    assert request(**wanted, pinned=[f"docker://r.site/a:t={digest}"]).image_digest() == digest
    for other in (f"docker://r.site/b:t={digest}", "docker://r.site/a:t=sha256:12", "docker://r.site/a:t", "", "="):
        assert request(**wanted, pinned=[other]).image_digest() == ""


KEYS = st.sampled_from([*FIELDS, "option.mounts", "option.env", "option.writable", "option.workdir", "env.X", "junk"])


@given(st.dictionaries(KEYS, st.lists(st.text(max_size=12), max_size=3)))
def test_whatever_comes_is_parsed_or_worded(changes: dict[str, list[str]]) -> None:
    try:
        parse({**FIELDS, **changes})
    except EnclosError as error:
        assert error.line().isprintable()
