"""Ways to start a step in a container: each that Slurm has, as one types it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
from boxes import BOX, srun
from conftest import said
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")


def only_in_image() -> str:
    """A command of the box that this machine does not have."""
    return next(
        name for name in ("ash", "bbconfig", "ttysize", "usleep", "pipe_progress") if shutil.which(name) is None
    )


def test_command_that_only_the_image_has(idle: Cluster) -> None:
    name = only_in_image()
    done = srun(idle, name, *(["-c", "echo ran"] if name == "ash" else ["1"]))
    assert (done.returncode, said(done.stderr)) == (0, [])
    missing = srun(idle, "no-such-command")
    assert missing.returncode == 127
    assert "enclos: no-such-command: command not found in the container on n1" in missing.stderr


def test_multi_prog(idle: Cluster) -> None:
    """A file of commands for single tasks; they are looked up in the image."""
    (idle.layout.shared / "multi-prog").write_text("0 sh -c 'echo zero; cat /opt/file'\n1-2 busybox echo task-%t\n")
    done = idle.run(
        ["srun", "-w", "n1", "-n3", f"--container-image={BOX}", "--multi-prog", "/shared/multi-prog"], "usera"
    )
    assert sorted(done.stdout.splitlines()) == ["of the image", "task-1", "task-2", "zero"], done.stderr


def test_task_prolog_of_the_user(idle: Cluster) -> None:
    """Slurm runs it after TaskProlog, which is inside the container: the path has to be there."""
    script = idle.layout.shared / "data/prolog.sh"
    script.write_text("#!/bin/sh\necho export FROM_PROLOG=$(cat /opt/file | tr ' ' -)\necho print hello\n")
    script.chmod(0o755)
    words = ("--task-prolog=/shared/data/prolog.sh", "--container-mounts=/shared/data", "sh", "-c", "echo $FROM_PROLOG")
    done = srun(idle, *words)
    assert done.stdout == "hello\nof-the-image\n", done.stderr


def test_site_and_user_prologs(make_cluster: Callable[..., Cluster]) -> None:
    """The site's runs outside and first; the user's inside."""
    made = make_cluster(1, slurm_conf_extra="TaskProlog=/etc/slurm/taskprolog")
    from boxes import make_box

    make_box(made.layout.images)
    site, user = made.layout.slurm / "taskprolog", made.layout.shared / "prolog.sh"
    site.write_text("#!/bin/bash\n[ -e /opt/file ] && where=inside || where=outside\necho export SITE=$where\n")
    user.write_text(
        "#!/bin/sh\n[ -e /opt/file ] && where=inside || where=outside\necho export USER_PROLOG=$SITE-$where\n"
    )
    for script in (site, user):
        script.chmod(0o755)
    words = ("--task-prolog=/shared/prolog.sh", "--container-mounts=/shared", "sh", "-c", "echo $SITE $USER_PROLOG")
    assert srun(made, *words).stdout == "outside outside-inside\n"


def test_pty_bash(idle: Cluster, image: str) -> None:
    """A shell on a terminal, that one types into."""
    typed = f"srun -w n1 --pty --container-image={image} bash --norc"
    command = ["sh", "-c", f"(sleep 1; echo 'tty; echo in-$((40+2)); exit 7') | script -qec '{typed}' /dev/null"]
    done = idle.run(command, "usera", timeout=40)
    assert re.search(r"^/dev/pts/\d+\r?$", done.stdout, re.M), done.stdout
    assert "in-42" in done.stdout
    assert done.returncode == 7


def test_sattach(idle: Cluster) -> None:
    """Somebody else's look at a running step: its output comes, from inside."""
    script = "while :; do cat /opt/file; sleep 0.1; done"
    with idle.popen(["srun", "-w", "n1", f"--container-image={BOX}", "sh", "-c", script], "usera") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "of the image\n"
        job = idle.run("squeue -h -u usera -o %A").stdout.split()[0]
        with idle.popen(["sattach", f"{job}.0"], "usera") as attached:
            assert attached.stdout is not None
            assert attached.stdout.readline() == "of the image\n"
            attached.kill()
        idle.run(f"scancel {job}")
        running.communicate(timeout=20)


def test_without_x11_forwarding(idle: Cluster) -> None:
    """DISPLAY is the job's; the site forwards nothing, and a step that asks is refused by Slurm as outside."""
    assert srun(idle, "sh", "-c", "echo $DISPLAY", DISPLAY="somewhere:0").stdout == "somewhere:0\n"
    asked = ["srun", "-w", "n1", "--x11"]
    outside = idle.run([*asked, "true"], "usera", env={"DISPLAY": "localhost:0"})
    inside = idle.run([*asked, f"--container-image={BOX}", "true"], "usera", env={"DISPLAY": "localhost:0"})
    assert (inside.returncode, said(inside.stderr)) == (outside.returncode, said(outside.stderr))
