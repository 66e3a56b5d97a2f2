"""The syntax of limits, and which of several holds."""

from __future__ import annotations

import re

import pytest
from enclos.runtime import errors, policy
from enclos.runtime.config import parse as parse_config
from enclos.runtime.limits import BadLimit, Limit, SiteLimits, combine, parse, parse_site
from enclos.runtime.request import parse as parse_request
from enclos.runtime.settings import Config
from hypothesis import given
from hypothesis import strategies as st


def shown(text: str) -> list[tuple[str, str, int]]:
    return [(limit.file, limit.field, limit.value) for limit in parse(text)]


def test_every_limit_of_the_manual() -> None:
    text = "memory=8G,swap=0,cpu=2.5,pids=512,io=8:0:rbps=100M:wiops=50,hugetlb=2M:1G,rdma=mlx5_0:hca_handle=4"
    assert shown(text) == [
        ("memory.max", "", 8 << 30),
        ("memory.swap.max", "", 0),
        ("cpu.max", "", 250_000),
        ("pids.max", "", 512),
        ("io.max", "8:0 rbps", 100 << 20),
        ("io.max", "8:0 wiops", 50),
        ("hugetlb.2MB.max", "", 1 << 30),
        ("rdma.max", "mlx5_0 hca_handle", 4),
    ]


def test_a_list_of_processors_goes_on_behind_a_comma() -> None:
    first, second = parse("cpuset=0-3,8,pids=5")
    assert first.cpus == {0, 1, 2, 3, 8}
    assert (first.text, second.text) == ("cpuset=0-3,8", "pids=5")


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "memory", "memory=", "memory=8X", "memory=-1", "memory=8G,,pids=1", "memory=1.5G", "memory=512K"),
        *("memory=99999999999T", "cpu=0", "cpu=0.001", "cpu=two", "cpuset=3-1", "cpuset=a", "cpuset=12345"),
        *("pids=0", "pids=many", "io=8:0", "io=8:0:rbps", "io=8:0:rbps=0", "io=sda:rbps=1", "io=8:0:speed=1"),
        *("hugetlb=1G", "hugetlb=3:1G", "hugetlb=x:1G", "rdma=mlx5_0", "rdma=../x:hca_handle=1", "rdma=a:hca_qp=1"),
        *("8,cpuset=1", "disk=1G", "memory=1G,memory=2G", "pids=5,8"),
    ],
)
def test_bad_limits(text: str) -> None:
    with pytest.raises(BadLimit):
        parse(text)


@given(st.text(max_size=40) | st.from_regex(r"[a-z]+=[0-9:.,KMG=a-z-]{0,20}", fullmatch=True))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        found = parse(text)
    except BadLimit as error:
        assert error.detail
        return
    assert found
    # What a program may send to the kernel: no field holds a blank or a line end that would begin another.
    for limit in found:
        assert re.fullmatch(r"[a-z]+\.[A-Za-z0-9.]+", limit.file)
        assert re.fullmatch(r"|[A-Za-z0-9_.:-]+ [a-z_]+", limit.field)
        assert 0 <= limit.value < 1 << 62


# ---------------------------------------------------------------- the site


def entries(*texts: str) -> list[SiteLimits]:
    return [parse_site(text) for text in texts]


def texts(group: tuple[Limit, ...]) -> set[str]:
    return {limit.text for limit in group}


DEFAULTS = entries("pids=100,memory=1G", "account:lab pids=300", "partition:debug pids=200,cpu=1")


@pytest.mark.parametrize(
    ("partition", "account", "expected"),
    [
        ("main", "other", {"pids=100", "memory=1G"}),
        ("debug", "other", {"pids=200", "cpu=1", "memory=1G"}),
        ("debug", "lab", {"pids=300", "cpu=1", "memory=1G"}),
    ],
)
def test_the_narrowest_default_holds(partition: str, account: str, expected: set[str]) -> None:
    wanted, site = combine((), DEFAULTS, (), partition, account)
    assert (wanted, texts(site)) == ((), expected)


def test_the_user_goes_before_a_default() -> None:
    wanted, site = combine(parse("memory=2G"), DEFAULTS, (), "main", "other")
    assert (texts(wanted), texts(site)) == ({"memory=2G"}, {"pids=100"})


def test_the_smallest_maximum_holds_for_who_says_nothing() -> None:
    maxima = entries("pids=500", "partition:debug pids=50", "account:lab cpuset=0-3")
    assert texts(combine((), (), maxima, "debug", "lab")[1]) == {"pids=50", "cpuset=0-3"}
    assert texts(combine((), DEFAULTS, maxima, "debug", "")[1]) == {"pids=50", "cpu=1", "memory=1G"}


@pytest.mark.parametrize(("wish", "most"), [("pids=51", "pids=50"), ("cpuset=3-4", "cpuset=0-3")])
def test_a_wish_above_the_maximum_is_refused(wish: str, most: str) -> None:
    config = Config(limits=type(Config().limits)(maximum=("pids=50", "cpuset=0-3")))
    facts = {"job": "1", "gid": "9", "stepd": "9", "tasks": "1", "cwd": "/w", "uid": "9", "step": "0"}
    fields = {**facts, "option.image": "/i", "option.limit": wish}
    request = parse_request({key: [value] for key, value in fields.items()})
    with pytest.raises(errors.EnclosError) as caught:
        policy.decide(request, config)
    assert caught.value.line() == f"--container-limit={wish}: above the site's maximum ({most})"


def test_the_job_is_asked_for_only_where_a_rule_needs_it() -> None:
    assert not policy.asks_for_job(parse_config(b"limits: {default: [pids=9]}", "f", {}).config)
    assert policy.asks_for_job(parse_config(b'limits: {maximum: ["account:a pids=9"]}', "f", {}).config)


@pytest.mark.parametrize("text", ["everybody pids=9", "partition: pids=9", "pids=9 cpu=1", "account:a"])
def test_a_site_limit_that_is_none_keeps_the_agent_from_starting(text: str) -> None:
    with pytest.raises(errors.EnclosError, match=re.escape("limits.default")):
        parse_config(f'limits: {{default: ["{text}"]}}'.encode(), "f", {})
