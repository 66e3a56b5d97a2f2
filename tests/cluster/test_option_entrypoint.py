"""--container-entrypoint, its no- form and --container-entrypoint-log."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from boxes import BOX, make_box, shell, srun
from conftest import said
from enclos.runtime.cluster.cluster import Cluster

RC = """\
#!/bin/sh
# as enroot writes it
echo "hello from the entrypoint, task $SLURM_PROCID"
echo warned >&2
[ -z "$RUNS" ] || echo run >>"$RUNS"
export FROM_ENTRYPOINT="two words" JOB=changed SLURM_PROCID=77 LINES_TOO="a
b"
unset TO_UNSET
[ -z "$STATUS" ] || exit "$STATUS"
[ -z "$LEAVE" ] || exit 0
exec "$@"
"""
WITH = "/images/entrypoint"


@pytest.fixture(scope="module", autouse=True)
def with_entrypoint(cluster: Cluster, box: Path, shared: Path) -> Path:
    """The box with an entrypoint, as a directory."""
    root = cluster.layout.images / "entrypoint"
    shutil.copytree(box, root, symlinks=True)
    (root / "etc/rc").write_text(RC)
    (root / "etc/rc").chmod(0o755)
    return root


def test_entrypoint_is_not_run_by_default(idle: Cluster) -> None:
    for options in ((), ("--no-container-entrypoint",), ("--container-entrypoint-log",)):
        assert shell(idle, 'echo "$FROM_ENTRYPOINT|"', *options, image=WITH) == "|\n"


def test_entrypoint_runs_once_per_node(idle: Cluster, shared: Path) -> None:
    runs = shared / "data/runs"
    words = ["srun", "-w", "n[1-2]", "-N2", "--ntasks-per-node=3", f"--container-image={WITH}"]
    words += ["--container-entrypoint", "--container-mounts=/shared/data", "sh", "-c", 'echo "$FROM_ENTRYPOINT"']
    done = idle.run(words, "usera", env={"RUNS": "/shared/data/runs"})
    assert done.stdout == "two words\n" * 6, done.stderr
    assert runs.read_text() == "run\n" * 2
    runs.unlink()


def test_environment_of_the_entrypoint(idle: Cluster) -> None:
    """Set, changed and unset variables; those of Slurm stay, and the working directory."""
    script = 'echo "$FROM_ENTRYPOINT|$JOB|${TO_UNSET-unset}|$SLURM_PROCID|$LINES_TOO|$PWD"'
    job = {"JOB": "job", "TO_UNSET": "job"}
    out = shell(idle, script, "--container-entrypoint", image=WITH, **job)
    assert out == "two words|changed|unset|0|a\nb|/\n"
    done = srun(idle, "-n2", "--container-entrypoint", "sh", "-c", "echo $SLURM_PROCID", image=WITH)
    assert sorted(done.stdout.split()) == ["0", "1"]


def test_output_of_the_entrypoint(idle: Cluster) -> None:
    quiet = srun(idle, "--container-entrypoint", "echo", "program", image=WITH)
    assert (quiet.stdout, said(quiet.stderr)) == ("program\n", [])
    loud = srun(idle, "-n2", "--container-entrypoint", "--container-entrypoint-log", "echo", "program", image=WITH)
    assert loud.stdout == "program\n" * 2
    assert sorted(said(loud.stderr))[1] == "warned"
    assert "hello from the entrypoint, task" in loud.stderr
    assert len(said(loud.stderr)) == 2


def test_entrypoint_that_fails(idle: Cluster) -> None:
    """What it printed is shown, with the reason, once; the command does not run."""
    done = srun(idle, "-n2", "--container-entrypoint", "echo", "ran", image=WITH, STATUS="9")
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr.count("hello from the entrypoint") == 1
    line = "enclos: --container-entrypoint: the image's entrypoint failed with status 9 on n1\nhint: "
    assert done.stderr.count(line) == 1


def test_entrypoint_that_ignores_its_arguments(idle: Cluster) -> None:
    done = srun(idle, "--container-entrypoint", "echo", "ran", image=WITH, LEAVE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--container-entrypoint: the image's entrypoint did not execute its arguments on n1" in done.stderr


def test_entrypoint_that_is_no_program(idle: Cluster, with_entrypoint: Path) -> None:
    """enroot's is a script for a shell, whatever its mode; one that needs what the image lacks says so."""
    (with_entrypoint / "etc/rc").chmod(0o644)
    try:
        assert shell(idle, 'echo "$FROM_ENTRYPOINT"', "--container-entrypoint", image=WITH) == "two words\n"
        (with_entrypoint / "etc/rc").write_text("#!/no/such/shell\n")
        (with_entrypoint / "etc/rc").chmod(0o755)
        done = srun(idle, "--container-entrypoint", "echo", "ran", image=WITH)
        assert (done.returncode, done.stdout) == (127, "")
        assert "failed with status 127" in done.stderr
    finally:
        (with_entrypoint / "etc/rc").write_text(RC)
        (with_entrypoint / "etc/rc").chmod(0o755)


def test_image_without_an_entrypoint(idle: Cluster) -> None:
    assert shell(idle, "echo ran", "--container-entrypoint", "--container-entrypoint-log", image=BOX) == "ran\n"


def test_entrypoint_leaves_nothing_open(idle: Cluster) -> None:
    """Neither in the program nor behind: descriptors of ours and processes."""
    script = "ls /proc/self/fd | wc -l; ps | grep -c [e]nclos || true"
    assert shell(idle, script, "--container-entrypoint", image=WITH) == shell(idle, script, image=WITH)


def test_site_runs_entrypoints(make_cluster: Callable[..., Cluster]) -> None:
    """step.entrypoint, a TaskProlog before it, and the user's word against the site's."""
    made = make_cluster(1, config="step: {entrypoint: true}\n", slurm_conf_extra="TaskProlog=/etc/slurm/taskprolog")
    prolog = made.layout.slurm / "taskprolog"
    prolog.write_text('#!/bin/sh\necho "export RUNS=/shared/runs"\necho "export JOB=prolog"\n')
    prolog.chmod(0o755)
    root = make_box(made.layout.images)
    (root / "etc/rc").write_text(RC)
    (root / "etc/rc").chmod(0o755)
    options = ("--container-mounts=/shared",)
    script = 'echo "$FROM_ENTRYPOINT|$JOB"; cat /shared/runs'
    assert shell(made, script, *options, image="/images/box") == "two words|changed\nrun\n"
    assert shell(made, 'echo "$FROM_ENTRYPOINT|$JOB"', *options, "--no-container-entrypoint", image="/images/box") == (
        "|prolog\n"
    )
