"""What the site allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from enclos.runtime import config, policy
from enclos.runtime.errors import EnclosError
from enclos.runtime.request import BATCH_STEP, StepRequest, parse
from enclos.runtime.settings import Config


def settings(text: str = "") -> Config:
    return config.parse(text.encode(), "test.yaml", {}).config


def request(uid: int = 1001, step: int = 0, **options: str) -> StepRequest:
    facts = {"job": "1", "gid": "1001", "stepd": "9", "tasks": "1", "cwd": "/w", "uid": str(uid), "step": str(step)}
    fields = {**facts, "option.image": "/i", **{f"option.{k.replace('_', '-')}": v for k, v in options.items()}}
    return parse({key: [value] for key, value in fields.items()})


def test_defaults() -> None:
    found = policy.decide(request(), settings())
    assert found == policy.Decision("host", True, False, False, False, False, (), (), oom_group=True)


def test_the_site_decides_where_the_user_says_nothing() -> None:
    text = "step: {default_network: job}\nrootfs: {writable: no, remap_root: yes}\nmounts: {home: yes, site: [/opt]}"
    found = policy.decide(request(), settings(text))
    assert (found.network, found.writable, found.remap_root, found.mount_home) == ("job", False, True, True)
    assert [mount.source for mount in found.site_mounts] == ["/opt"]


def test_the_user_goes_before_the_default() -> None:
    text = "step: {default_network: job}\nrootfs: {writable: no, remap_root: yes}\nmounts: {home: yes}"
    found = policy.decide(request(network="none", writable="1", remap_root="0", mount_home="0"), settings(text))
    assert (found.network, found.writable, found.remap_root, found.mount_home) == ("none", True, False, False)


@pytest.mark.parametrize("networks", ["[job]", "[job, host]"])
def test_a_batch_step_stays_on_the_nodes_network(networks: str) -> None:
    text = f"step: {{default_network: job, networks: {networks}}}"
    assert policy.decide(request(step=BATCH_STEP), settings(text)).network == "host"
    assert policy.decide(request(step=BATCH_STEP, network="job"), settings(text)).network == "job"


@pytest.mark.parametrize(
    ("text", "wishes", "words"),
    [
        ("enabled: false", {}, "switched off"),
        ("", {"uid": 0}, "steps of root are refused"),
        ("mounts: {user: false}", {"mounts": "/a"}, "not allowed at this site"),
        ("", {"network": "blue"}, "no such network"),
        ("step: {networks: [host, job]}", {"network": "none"}, "not allowed at this site"),
    ],
)
def test_refusals(text: str, wishes: dict[str, object], words: str) -> None:
    with pytest.raises(EnclosError) as caught:
        policy.decide(request(**wishes), settings(text))  # type: ignore[arg-type]
    assert words in caught.value.line()
    assert caught.value.hint


def test_root_where_the_site_allows_it() -> None:
    assert policy.decide(request(uid=0), settings("step: {allow_root: true}")).network == "host"


def test_the_kill_switch_goes_before_all_else() -> None:
    with pytest.raises(EnclosError, match="switched off"):
        policy.decide(request(uid=0, network="blue"), settings("enabled: false"))


@pytest.mark.parametrize(("value", "site", "whole"), [("0", "yes", False), ("1", "yes", True), ("1", "no", False)])
def test_a_user_who_wants_no_step_killed_whole_is_heard(value: str, site: str, whole: bool) -> None:
    asks = replace(request(), oom_kill_step=value != "0")
    assert policy.decide(asks, settings(f"limits: {{oom_group: {site}}}")).oom_group == whole


def test_cgroups_of_ones_own_are_for_the_site_to_allow() -> None:
    asks = request(cgroup="delegate")
    assert policy.decide(asks, settings()).delegate
    assert not policy.decide(request(cgroup="readonly"), settings()).delegate
    with pytest.raises(EnclosError, match="--container-cgroup=delegate: the site does not allow it"):
        policy.decide(asks, settings("limits: {delegate: no}"))
