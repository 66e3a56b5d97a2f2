"""`enclos check`: what it finds in Slurm's files, in the kernel, and in the plugin's file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from enclos.runtime import config
from enclos.runtime.cli import check, check_devices, check_kernel, check_node, check_slurm, probe
from enclos.runtime.cli.finding import MEND, NOTE, OK, SKIPPED, Finding
from enclos.runtime.cli.plugin import built_for, plugstack_lines

VERSION = (22, 5, 8)


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {f.subject: f.status for f in findings}


# ---------------------------------------------------------------- plugstack.conf


def build_plugin(path: Path, version: int, extra: str = "") -> None:
    """A shared object with the symbol that Slurm's SPANK_PLUGIN macro makes."""
    source = path.with_suffix(".c")
    source.write_text(f'const char plugin_name[] = "enclos";\nconst unsigned int plugin_version = {version};\n{extra}')
    path.parent.mkdir(exist_ok=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A directory with slurm.conf, plugstack.conf and a plugin for VERSION."""
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nPrologFlags=Alloc\n")
    (tmp_path / "plugstack.conf").write_text("# comment\ninclude conf.d/*.conf\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/enclos.conf").write_text(f"required {tmp_path}/lib/spank_enclos.so\n")
    (tmp_path / "lib").mkdir()
    build_plugin(tmp_path / "lib/spank_enclos.so", 22 << 16 | 5 << 8 | 8)
    return tmp_path


def plugin_findings(directory: Path, **settings: str) -> dict[str, Finding]:
    found = check_slurm.plugin_findings(settings, directory / "slurm.conf", VERSION)
    return {f.subject: f for f in found}


def test_plugin_is_found_through_an_include(slurm: Path) -> None:
    found = plugin_findings(slurm)
    assert {s: f.status for s, f in found.items()} == {"plugin": OK, "plugin file": OK}
    assert f"{slurm}/conf.d/enclos.conf:1: required" in found["plugin"].text
    assert "built for Slurm 22.05" in found["plugin file"].text


def test_plugin_is_found_in_plugindir(slurm: Path) -> None:
    (slurm / "conf.d/enclos.conf").write_text("optional spank_enclos.so a=b\n")
    found = plugin_findings(slurm, plugindir=f"/nonexistent:{slurm}/lib")
    assert found["plugin file"].status == OK


def test_plugin_that_is_not_listed(slurm: Path) -> None:
    (slurm / "conf.d/enclos.conf").write_text("# required spank_enclos.so\n")
    found = plugin_findings(slurm)
    assert found["plugin"].status == MEND
    assert "required" in found["plugin"].hint


def test_plugin_listed_twice(slurm: Path) -> None:
    (slurm / "conf.d/z.conf").write_text(f"optional {slurm}/lib/spank_enclos.so\n")
    findings = list(check_slurm.plugin_findings({}, slurm / "slurm.conf", VERSION))
    assert [f.status for f in findings if f.subject == "plugin"] == [OK, MEND]


def test_no_plugstack(tmp_path: Path) -> None:
    assert plugin_findings(tmp_path)["plugin"].status == MEND


def test_plugstack_that_slurmctld_names(slurm: Path, tmp_path: Path) -> None:
    found = plugin_findings(tmp_path / "elsewhere", plugstackconfig=str(slurm / "plugstack.conf"))
    assert found["plugin"].status == OK


def test_plugin_file_that_is_missing(slurm: Path) -> None:
    (slurm / "lib/spank_enclos.so").unlink()
    assert plugin_findings(slurm)["plugin file"].status == MEND


def test_plugin_for_another_slurm(slurm: Path) -> None:
    build_plugin(slurm / "lib/spank_enclos.so", 24 << 16 | 11 << 8 | 5)
    found = plugin_findings(slurm)["plugin file"]
    assert found.status == MEND
    assert "built for Slurm 24.11, installed is 22.05" in found.text


def test_file_that_is_no_plugin(slurm: Path) -> None:
    (slurm / "lib/spank_enclos.so").write_bytes(b"\x7fELF\x02\x01" + b"\xff" * 100)
    assert plugin_findings(slurm)["plugin file"].status == NOTE


def test_earlier_required_plugin(slurm: Path) -> None:
    (slurm / "conf.d/a.conf").write_text("optional /x/first.so\nrequired /x/second.so\n")
    (slurm / "conf.d/z.conf").write_text("required /x/last.so\n")
    found = plugin_findings(slurm)["plugin order"]
    assert found.status == NOTE
    assert "second.so" in found.text
    assert "first.so" not in found.text
    assert "last.so" not in found.text


def test_include_that_includes_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "plugstack.conf"
    path.write_text(f"include {path}\nrequired a.so\n")
    assert len(list(plugstack_lines(path))) < 20


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\0" * 200])
def test_version_of_something_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.so").write_bytes(data)
    assert built_for(tmp_path / "x.so") is None


SPANK_OF_SLURM = next(iter(Path("/usr/lib").glob("*/slurm-wlm/spank_pbs.so")), None)


@pytest.mark.skipif(SPANK_OF_SLURM is None or shutil.which("slurmd") is None, reason="needs Slurm's own SPANK plugin")
def test_version_of_slurms_own_plugin() -> None:
    assert SPANK_OF_SLURM is not None
    assert built_for(SPANK_OF_SLURM) == check_slurm.slurm_version(check_slurm.command_output)


# ---------------------------------------------------------------- slurmctld's configuration

SHOW_CONFIG = """Configuration data as of 2026-01-01T00:00:00
ClusterName             = x
JobContainerType        = job_container/none
PlugStackConfig         = {directory}/plugstack.conf
PluginDir               = {directory}/lib
PrologFlags             = {flags}
SLURM_CONF              = {directory}/slurm.conf
Slurmctld(primary) at x is UP
"""


def slurm_findings(directory: Path, flags: str = "Alloc,Contain") -> list[Finding]:
    answers = {
        "slurmd": "slurm-wlm 22.05.8\n",
        "scontrol": SHOW_CONFIG.format(directory=directory, flags=flags),
    }
    return list(check_slurm.findings(lambda command: answers[command[0]]))


def test_a_cluster_where_all_is_well(slurm: Path) -> None:
    found = slurm_findings(slurm)
    assert {f.status for f in found} == {OK}
    assert found[0].text == "22.05.8"


@pytest.mark.parametrize(
    ("flags", "status"), [("Alloc", OK), ("X11", OK), ("Contain", OK), ("(null)", MEND), ("NoHold", MEND)]
)
def test_prolog_flags(slurm: Path, flags: str, status: str) -> None:
    assert statuses(slurm_findings(slurm, flags))["PrologFlags"] == status


def test_without_slurmctld_the_file_is_read(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm / "slurm.conf"))
    found = statuses(list(check_slurm.findings(lambda command: "slurm 22.05.8" if command[0] == "slurmd" else "")))
    assert found["slurmctld"] == NOTE
    assert found["plugin"] == OK
    assert found["PrologFlags"] == OK


def test_oci_conf(slurm: Path) -> None:
    (slurm / "oci.conf").write_text("")
    assert statuses(slurm_findings(slurm))["oci.conf"] == NOTE


def test_job_container_with_user_namespaces(slurm: Path) -> None:
    settings = {"namespacetype": "namespace/linux"}
    assert statuses(list(check_slurm.container_findings(settings, slurm / "slurm.conf")))["job_container"] == OK
    (slurm / "namespace.yaml").write_text("defaults:\n  clone_ns_flags: CLONE_NEWNS|CLONE_NEWUSER\n")
    assert statuses(list(check_slurm.container_findings(settings, slurm / "slurm.conf")))["job_container"] == MEND


def test_no_slurm_here() -> None:
    assert [f.status for f in check_slurm.findings(lambda command: "")] == [SKIPPED]


# ---------------------------------------------------------------- kernel


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_root
@pytest.mark.kernel
@pytest.mark.parametrize("feature", check_kernel.FEATURES, ids=lambda feature: feature.subject)
def test_probe_on_this_kernel(feature: check_kernel.Feature) -> None:
    """This machine has all features; a probe that always says yes is caught by the tests below."""
    assert check_kernel.feature_finding(feature, is_root=True) == Finding(feature.subject, OK)


def run_with_limit(name: str, program: str) -> str:
    """Run Python as root of a user namespace in which a kind of namespace is forbidden."""
    script = f'echo 0 > /proc/sys/user/max_{name}_namespaces; exec {sys.executable} -c "{program}"'
    return subprocess.run(["unshare", "-Ur", "sh", "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs user namespaces",
)
@pytest.mark.parametrize(
    ("limit", "refused"),
    [
        ("user", {"user namespaces", "overlay", "tmpfs attributes"}),
        ("net", {"other namespaces", "nftables"}),
        ("mnt", {"other namespaces", "overlay", "tmpfs attributes"}),
    ],
)
def test_probes_notice_what_is_forbidden(limit: str, refused: set[str]) -> None:
    program = (
        "from enclos.runtime.cli import check_kernel as c\\n"
        "for f in c.FEATURES:\\n"
        "    if not f.root_only: x = c.feature_finding(f, True); print(x.status, x.subject, x.text, sep=';')"
    ).replace("\\n", "\n")
    lines = [line.split(";") for line in run_with_limit(limit, program).splitlines()]
    # A job network belongs to the node's user namespace and cannot be tried in another one.
    lines = [line for line in lines if line[1] != "vxlan"]
    assert {subject for status, subject, _ in lines if status == MEND} == refused
    assert {text for status, _, text in lines if status == MEND} == {f"user.max_{limit}_namespaces is 0"}


def crash() -> None:
    """A bug in a probe."""
    raise ZeroDivisionError("division by zero")


def test_probe_that_hangs_or_crashes_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(probe, "PROBE_SECONDS", 1)
    assert probe.refusal(lambda: time.sleep(60)) == "nothing after 1 s"
    assert probe.refusal(lambda: os.kill(os.getpid(), 9)) == "ended by SIGKILL"
    assert probe.refusal(crash) == "ZeroDivisionError: division by zero"
    assert probe.refusal(lambda: None) is None


def mounts_and_loops() -> tuple[str, list[str]]:
    used = [p.parent.name for p in Path("/sys/block").glob("loop*/loop") if p.is_dir()]
    return Path("/proc/self/mountinfo").read_text(), sorted(used)


@needs_root
@pytest.mark.kernel
def test_probes_leave_nothing() -> None:
    before = mounts_and_loops()
    for feature in check_kernel.FEATURES:
        probe.refusal(feature.probe)
    deadline = 50
    while mounts_and_loops() != before and deadline:  # a namespace ends a moment after its last process
        deadline -= 1
        os.sched_yield()
        subprocess.run(["sleep", "0.1"], check=True)
    assert mounts_and_loops() == before


@pytest.mark.parametrize(("values", "expected"), [
    ({"user/max_user_namespaces": "0"}, {"user.max_user_namespaces": MEND}),
    ({"user/max_user_namespaces": "9999"}, {"user.max_user_namespaces": OK}),
    ({"kernel/unprivileged_userns_clone": "0"}, {"kernel.unprivileged_userns_clone": OK}),
    ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, {"kernel.apparmor_restrict_unprivileged_userns": NOTE}),
])  # fmt: skip
def test_sysctls(tmp_path: Path, values: dict[str, str], expected: dict[str, str]) -> None:
    for name, value in values.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{value}\n")
    assert statuses(list(check_kernel.sysctl_findings(tmp_path))) == expected


# ---------------------------------------------------------------- node and verb


def test_node_without_an_agent(tmp_path: Path) -> None:
    (found,) = check_node.agent_findings(str(tmp_path / "none"))
    assert found.status == MEND
    assert found.hint == "systemctl status enclosd"


def test_device_that_is_missing() -> None:
    settings = config.parse(b"devices: {nodes: [/dev/null, /dev/nonexistent]}", "x", {}).config
    (found,) = check_devices.listed_findings(settings)
    assert found.status == MEND
    assert "/dev/nonexistent" in found.text
    assert "null" not in found.text


def test_output_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Finding("a", OK, "fine"), Finding("b", MEND, "broken", "mend it"), Finding("c", SKIPPED, "needs root")]
    monkeypatch.setattr(check, "_findings", lambda: iter(found))
    assert check.run([]) == 1
    assert capsys.readouterr().out == (
        "ok      a: fine\nmend    b: broken\n        -> mend it\nskipped c: needs root\n"
        "1 to mend, 1 ok: containers may fail on this node until then\n"
    )
    assert check.run(["--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert output["ok"] is False
    assert output["findings"][1] == {"subject": "b", "status": "mend", "text": "broken", "hint": "mend it"}
    del found[1]
    assert check.run([]) == 0


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root to become a user")
@pytest.mark.skipif(
    not all(folder.stat().st_mode & 0o001 for folder in Path(__file__).parents),
    reason="the checkout is below a folder that only its owner may enter",
)
def test_a_user_can_run_it() -> None:
    command = [
        "setpriv",
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        sys.executable,
        "-m",
        "enclos.runtime.cli.main",
    ]
    done = subprocess.run([*command, "check", "--json"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    found = {f["subject"]: f["status"] for f in json.loads(done.stdout)["findings"]}
    assert found["squashfs"] == SKIPPED
    assert MEND not in {found[f.subject] for f in check_kernel.FEATURES}
