"""--container-profile: options from a file, read where srun is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from boxes import BOX, BOX_DIRECTORY
from conftest import Result, said
from enclos.runtime.cluster.cluster import Cluster

pytestmark = pytest.mark.usefixtures("box", "shared")

PROFILES = {
    "site.toml": f'image = "{BOX}"\nmounts = ["/shared/site:/site"]\nreadonly = true\n'
    '[env]\nBOTH = "profile"\nONLY = "a b"\n',
    "own.toml": 'base = "site"\nmounts = ["${PLACE}:/place"]\nwritable = true\n',
    "other.yaml": f"image: {BOX_DIRECTORY}\nworkdir: /opt\n",
    "bad.toml": 'images = "/x"\n',
}


@pytest.fixture(scope="module", autouse=True)
def profiles(cluster: Cluster) -> Path:
    folder = cluster.layout.homes / "usera/.edf"
    folder.mkdir()
    for name, text in PROFILES.items():
        (folder / name).write_text(text)
    return folder


def run(cluster: Cluster, *words: str, **env: str) -> Result:
    return cluster.run(["srun", "-w", "n1", *words], "usera", timeout=30, env={"PLACE": "/shared/data", **env})


def out(cluster: Cluster, *words: str, **env: str) -> str:
    done = run(cluster, *words, **env)
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    return done.stdout


def test_options_and_variables_of_a_profile(idle: Cluster) -> None:
    """The image, mounts of both files, and variables that count more than the image's."""
    script = 'cat /opt/file /site/file; ls -d /place; echo "$BOTH|$ONLY|$FROM_IMAGE"; touch /x && echo wrote'
    words = ("--container-profile=own", "sh", "-c", script)
    assert out(idle, *words) == "of the image\nof the site\n/place\nprofile|a b|image\nwrote\n"


def test_command_line_counts_more_than_a_profile(idle: Cluster) -> None:
    script = "stat -c %u /bin/busybox; ls -d /site /mine 2>/dev/null; (touch /tmp/x) 2>/dev/null || echo ro"
    options = (f"--container-image={BOX_DIRECTORY}", "--container-mounts=/shared:/mine", "--container-readonly")
    assert out(idle, "--container-profile=own", *options, "sh", "-c", script) == "65534\n/mine\nro\n"


def test_profile_counts_more_than_variables(idle: Cluster) -> None:
    script = "stat -c %u /bin/busybox; (touch /tmp/x) 2>/dev/null || echo ro"
    variables = {"ENCLOS_CONTAINER_IMAGE": BOX_DIRECTORY, "ENCLOS_CONTAINER_WRITABLE": "1"}
    assert out(idle, "--container-profile=site", "sh", "-c", script, **variables) == "61001\nro\n"
    assert out(idle, "sh", "-c", script, ENCLOS_CONTAINER_PROFILE="site") == "61001\nro\n"


def test_steps_inherit_a_profile(idle: Cluster) -> None:
    """Of salloc and of sbatch, on its command line and in the script; a step may name another."""
    steps = "srun sh -c 'cat /site/file; pwd'; srun --container-profile=other sh -c 'stat -c %u /bin/busybox; pwd'"
    done = idle.run(
        ["salloc", "-Q", "-w", "n1", "--container-profile=own", "bash", "-c", steps], "usera", env={"PLACE": "/shared"}
    )
    assert done.stdout == "of the site\n/\n65534\n/opt\n", done.stderr
    script = idle.layout.shared / "profiled.sh"
    script.write_text("#!/bin/sh\n#SBATCH --container-profile=site\ncat /site/file; echo $ONLY\n")
    batch = ["sbatch", "-W", "-w", "n1", "-o", "/shared/profiled.out", "/shared/profiled.sh"]
    assert idle.run(batch, "usera").returncode == 0
    assert (idle.layout.shared / "profiled.out").read_text() == "of the site\na b\n"


def test_script_in_a_profile_starts_steps(idle: Cluster) -> None:
    """Inside there is no `enclos`: what the profile said is in the environment already."""
    script = idle.layout.shared / "profiled.sh"
    script.write_text("#!/bin/sh\ncat /site/file\nsrun sh -c 'cat /site/file; echo $ONLY'\n")
    batch = ["sbatch", "-W", "-w", "n1", "-o", "/shared/profiled.out", "--container-profile=own", "--container-slurm"]
    assert idle.run([*batch, "/shared/profiled.sh"], "usera", env={"PLACE": "/shared"}).returncode == 0
    assert (idle.layout.shared / "profiled.out").read_text() == "of the site\nof the site\na b\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad", "cannot be used (unknown key 'images', did you mean 'image'?)"),
        ("none", "--container-profile=none: profile not found (searched /home/usera/.config/enclos/profiles, "),
        ("", "--container-profile=: argument required"),
    ],
)
def test_bad_profile_is_refused_by_srun(idle: Cluster, name: str, words: str) -> None:
    before = idle.run("scontrol show config | grep NEXT_JOB_ID").stdout
    done = run(idle, f"--container-profile={name}", "true")
    assert done.returncode != 0
    assert words in done.stderr
    assert idle.run("scontrol show config | grep NEXT_JOB_ID").stdout == before


def test_profile_without_an_image(idle: Cluster) -> None:
    (idle.layout.homes / "usera/.edf/imageless.toml").write_text("readonly = true\n")
    done = run(idle, "--container-profile=imageless", "true")
    assert done.returncode != 0
    assert "needs --container-image" in done.stderr
    assert out(idle, "--container-profile=imageless", f"--container-image={BOX}", "echo", "ran") == "ran\n"


@pytest.mark.parametrize("export", ["NONE", "NIL", "ALL,SLURM_ENCLOS_PROFILE="])
def test_profile_that_gets_lost_lets_nothing_run_outside(idle: Cluster, export: str) -> None:
    """Its options travel in a variable: a step without it is refused on the node, as its image may have got lost."""
    done = run(idle, "--container-profile=site", f"--export={export}", "/bin/sh", "-c", "cat /opt/file || echo outside")
    if done.returncode == 0:
        assert done.stdout == "of the image\n"
    else:
        assert done.stdout == ""
        assert "it needs --container-image as well" in done.stderr


def test_step_inherits_a_profile_that_it_reads_again(idle: Cluster) -> None:
    """Where the variable was taken away, the name is still there."""
    lost = "unset SLURM_ENCLOS_PROFILE; exec srun sh -c 'cat /opt/file || echo outside'"
    done = idle.run(["salloc", "-Q", "-w", "n1", "--container-profile=site", "bash", "-c", lost], "usera")
    assert done.stdout == "of the image\n", done.stderr
