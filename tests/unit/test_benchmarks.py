"""The pure parts of the benchmarks: statistics, the agent's log read back, tables and the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import agent, figures, launch, loglines, machine, plots, rdma, report
from benchmarks.figures import Figures
from benchmarks.result import Chart, Claim, Result, Table

STEP = (
    "INFO step=7.4294967291 uid=61001 image=/images/a=b@1.5:x.sqsh network=job tasks=4 attempt=1 "
    "image@4.8 joined@5.0 image@6.0 ready@8.25 built@8.3 ready@11.2: OpenImage=2.50 Attach=0.25"
)
LOG = f"""\
INFO ready on n1, version 0.1.0
INFO job=7 network made: vni=8 nodes=12 in 3.6 ms
{STEP}
INFO step=7.0 ended after 0.1 s
WARNING step=8.0 builder died (attempt 1)
INFO step=8.0 uid=0 image= network=host tasks=1 attempt=2 image@1.0 ready@2.0: OpenImage=0.50
"""


def test_figures() -> None:
    found = Figures.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == Figures(n=5, minimum=1.0, q1=2.0, median=3.0, q3=4.0, maximum=5.0)
    assert found.cells() == ("3.0", "1.0", "2.0", "4.0", "5.0", "5")
    assert len(found.cells()) == len(figures.HEADINGS)


def test_figures_of_one_and_of_none() -> None:
    assert Figures.of([2.5]) == Figures(1, 2.5, 2.5, 2.5, 2.5, 2.5)
    with pytest.raises(ValueError, match="no samples"):
        Figures.of([])


def test_differences_are_taken_round_by_round() -> None:
    assert figures.differences([1.0, 10.0], [3.0, 9.0]) == [2.0, -1.0]
    with pytest.raises(ValueError):
        figures.differences([1.0], [1.0, 2.0])


def test_what_stands_apart() -> None:
    assert figures.standing_apart([50.0, 51.0, 1050.0, 52.0, 53.0, 50.5]) == [1050.0]
    assert figures.standing_apart([50.0, 51.0, 52.0, 53.0]) == []


def test_steps_of_a_log() -> None:
    first, second = loglines.steps(LOG)
    assert (first.step, first.network, first.tasks) == ("7.4294967291", "job", 4)
    assert first.marks == (
        ("image", 4.8),
        ("joined", 5.0),
        ("image#2", 6.0),
        ("ready", 8.25),
        ("built", 8.3),
        ("ready#2", 11.2),
    )
    assert first.operations == {"OpenImage": 2.5, "Attach": 0.25}
    assert first.join_wait_ms == pytest.approx(6.2)
    assert (second.step, second.network, second.join_wait_ms) == ("8.0", "host", None)


def test_networks_of_a_log() -> None:
    assert loglines.networks(LOG) == [loglines.NetworkLine(7, 12, 3.6)]


def test_the_log_is_the_agents() -> None:
    """The format is the agent's: a change of its line has to be made here as well."""
    source = (Path(__file__).resolve().parents[2] / "runtime" / "building.py").read_text()
    assert '"step=%s uid=%d image=%s network=%s tasks=%d attempt=%d %s: %s"' in source
    assert 'f"{name}@{ms:.1f}"' in source
    assert 'f"{name}={ms:.2f}"' in source
    jobs = (Path(__file__).resolve().parents[2] / "runtime" / "jobs.py").read_text()
    assert '"job=%d network made: vni=%d nodes=%d in %.1f ms"' in jobs


def test_samples_by_mark_and_operation() -> None:
    lines = loglines.steps(LOG)
    assert list(loglines.by_mark(lines)) == ["image", "joined", "image#2", "ready", "built", "ready#2"]
    assert loglines.by_mark(lines)["image"] == [4.8, 1.0]
    assert loglines.by_operation(lines, most=1) == {"OpenImage": [2.5, 0.5], "all operations": [2.75, 0.5]}


def test_kilobytes_of_proc() -> None:
    text = "Name:\tenclosd\nVmRSS:\t   25640 kB\nThreads:\t1\nHugePages_Total:       0\n"
    assert machine.status_kb(text) == {"VmRSS": 25640}


def test_machine_is_described() -> None:
    assert set(machine.describe()) == {"time", "kernel", "processor", "memory", "load average", "python"}


def test_commands_of_the_launch_benchmark() -> None:
    shape = launch.SHAPES[1]
    assert launch.srun(shape, "bare") == ["srun", "-N4", "-n16", "--ntasks-per-node=4", "/shared/nothing"]
    contained = launch.srun(shape, "container, job network")
    assert contained[-3:] == ["--container-image=/images/nothing.sqsh", "--container-network=job", "/bin/nothing"]


def test_stations_of_the_agent_benchmark() -> None:
    assert agent.stations(1000)[:3] == [0, 1, 100]
    assert agent.stations(1000)[-1] == 1000
    assert agent.stations(5) == [0, 1, 2, 3, 4, 5]


def test_both_networks_are_used_inside_the_job_and_alone() -> None:
    inside = {srun for number in range(1, 100) if number % agent.JOB_EVERY for srun in agent.srun(number)}
    alone = {srun for number in range(1, 200) if number % agent.JOB_EVERY == 0 for srun in agent.srun(number)}
    for words in (inside, alone):
        assert {"--container-network=job", "--container-network=host"} <= words
    assert "--exact" in inside
    assert "--exact" not in alone


@pytest.mark.parametrize(
    ("row", "waiting"),
    [
        ("strace: Process 12 detached", True),
        ("epoll_wait(3,  <detached ...>", True),
        ("[pid    12] recvmsg(4,  <unfinished ...>", True),
        ("[pid    12] epoll_wait(3, [], 64, 1000) = 0", False),
        ("<... epoll_wait resumed>[], 64, 1000) = 0", False),
    ],
)
def test_calls_that_were_begun_are_no_wake_ups(row: str, waiting: bool) -> None:
    assert agent.waits(row) is waiting


def sample(steps: int, anonymous: int, descriptors: int) -> agent.Sample:
    size = agent.Footprint(anonymous + 10000, anonymous, anonymous, descriptors)
    return agent.Sample(steps, size, dict.fromkeys(agent.STAYING, size), 100)


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (sample(1000, 15000 + agent.SLACK_KB, 14), [True, True, True]),
        (sample(1000, 15001 + agent.SLACK_KB, 14), [True, False, True]),
        (sample(1000, 15000, 15), [True, True, False]),
        (sample(1000, agent.LIMIT_KB, 14), [False, False, True]),
    ],
)
def test_claims_about_memory(last: agent.Sample, kept: list[bool]) -> None:
    result = Result("agent", "")
    agent.report_memory(result, [sample(0, 1, 12), sample(1, 14000, 14), sample(100, 15000, 14), last])
    assert [claim.kept for claim in result.claims] == kept


def result() -> Result:
    made = Result("one", "the first", machine={"kernel": "6.18"})
    made.tables.append(Table.of_samples("times, ms", {"bare": [1.0, 2.0, 3.0], "none": []}))
    made.claims.append(Claim("at most 2 ms", "3.0 ms", False))
    made.charts.append(Chart("spread", "1 node, 1 task", "times", "ms", {"bare": [1.0, 2.0, 3.0]}))
    return made


def test_a_table_in_plain_text() -> None:
    table = result().tables[0]
    assert table.lines() == [
        "times, ms",
        "        median  min   q1   q3  max  n",
        "  bare     2.0  1.0  1.5  2.5  3.0  3",
    ]


def test_a_missed_claim_is_told() -> None:
    assert list(result().lines())[-1] == "MISSED: at most 2 ms; measured 3.0 ms"


def test_the_report(tmp_path: Path) -> None:
    path = report.write([result()], tmp_path)
    text = path.read_text()
    assert "- **missed**: at most 2 ms; measured 3.0 ms\n" in text
    assert "|  | median | min | q1 | q3 | max | n |\n|---|--:|--:|--:|--:|--:|--:|\n| bare | 2.0 |" in text
    assert (tmp_path / "one.json").exists()
    if plots.available():
        assert (tmp_path / "one-1-node-1-task.png").read_bytes().startswith(b"\x89PNG")
        assert "![one-1-node-1-task.png](one-1-node-1-task.png)" in text
    else:
        assert not list(tmp_path.glob("*.png"))


PINGPONG = """\
  local address:  LID 0x0000, QPN 0x000011, PSN 0x2c5b7e, GID ::ffff:10.79.0.1
  remote address: LID 0x0000, QPN 0x000011, PSN 0x6a5c0f, GID ::ffff:10.79.0.2
8192000 bytes in 3.08 seconds = 21.27 Mbit/sec
1000 iters in 3.08 seconds = 3080.83 usec/iter
"""


def test_figures_of_a_pingpong() -> None:
    found = {what: figure.search(PINGPONG) for what, (_, figure, _) in rdma.VERBS.items()}
    assert {what: match and match[1] for what, match in found.items()} == {
        rdma.LATENCY: "3080.83",
        rdma.BANDWIDTH: "21.27",
    }


def test_a_container_that_costs_verbs_something_is_missed() -> None:
    cases = {"node": [100.0, 200.0, 100.0], "container": [101.0, 204.0, 100.0]}
    cases |= {"node with the guard": [105.0, 210.0, 102.0], "overlay TCP": [50.0, 60.0, 55.0]}
    slower = {**cases, "container": [110.0, 220.0, 110.0]}
    vague = {**cases, "container": [90.0, 200.0, 104.0]}
    found = {rdma.LATENCY: cases, rdma.BANDWIDTH: slower, "of which too little is known, s": vague}
    result = rdma.judge(found, Result(rdma.NAME, rdma.TITLE))
    assert [(claim.measured, claim.kept) for claim in result.claims] == [
        ("1.010 (1.000 to 1.020)", True),
        ("1.100 (1.100 to 1.100)", False),
        ("1.000 (0.900 to 1.040)", False),
    ]
    assert result.notes[:2] == [
        "latency, us: with the guard's table the node has 1.050 of what it has without",
        "latency, us: TCP over the overlay is 0.55 of verbs",
    ]


def test_interval_of_a_median() -> None:
    """Which samples these are by their order, as tables of the sign test have it."""
    assert figures.median_interval([3.0]) == (3.0, 3.0)
    assert figures.median_interval([5.0, 1.0, 4.0]) == (1.0, 5.0)
    assert figures.median_interval(range(10, 0, -1)) == (2, 9)
    assert figures.median_interval(range(1, 21)) == (6, 15)
    assert figures.median_interval(range(1, 61)) == (22, 39)
