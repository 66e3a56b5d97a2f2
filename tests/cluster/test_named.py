"""--container-name: one container for several steps of a job, made once, entered while it runs, its files kept."""

from __future__ import annotations

import subprocess

import pytest
from conftest import Leftovers, said
from enclos.runtime.cluster.cluster import Cluster

IMAGE = "--container-image=/images/openmpi.sqsh"
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module", autouse=True)
def _image(image: str) -> None:
    """The image is there."""


def job(cluster: Cluster, script: str, *options: str, user: str = "usera", timeout: float = 60) -> Done:
    """A job on n1 whose script starts steps; `step` in it is srun in one task, with the image."""
    step = f"srun -n1 --overlap {IMAGE}"
    words = ["salloc", "-Q", "-w", "n1", *options, "bash", "-c", f'step="{step}"; bare="srun -n1 --overlap"\n{script}']
    return cluster.run(words, user, timeout=timeout)


def lines(done: Done) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_written_is_there_in_the_next_step(idle: Cluster) -> None:
    script = """
        $step --container-name=work sh -c 'echo kept > /opt/note; rm /etc/os-release; mkdir -p ~/d; echo x > ~/d/f'
        $step --container-name=work sh -c 'cat /opt/note ~/d/f; ls /etc/os-release 2>/dev/null || echo gone'
        $bare --container-name=work cat /opt/note
        $step sh -c 'cat /opt/note 2>/dev/null || echo none of it elsewhere'"""
    assert lines(job(idle, script)) == ["kept", "x", "gone", "kept", "none of it elsewhere"]


def test_identity_and_mounts_are_each_steps_own(idle: Cluster) -> None:
    script = """
        $step --container-name=w --container-remap-root sh -c 'id -u; echo root > /opt/r; chmod 600 /opt/r'
        $step --container-name=w --container-mounts=/shared:/here \\
            sh -c 'id -u; cat /opt/r; echo me >> /opt/r; ls -d /here/.'
        $step --container-name=w --container-remap-root sh -c 'cat /opt/r; ls -A /here'
        $step --container-name=w --container-readonly sh -c 'echo x > /opt/x' 2>/dev/null || echo read-only
        $step --container-name=w sh -c 'echo x > /opt/x && echo writable'"""
    wanted = ["0", "61001", "root", "/here/.", "root", "me", "read-only", "writable"]
    assert lines(job(idle, script)) == wanted


def test_a_container_that_runs_is_entered(idle: Cluster) -> None:
    """The same namespaces; the working directory of who is in it does not matter."""
    script = """
        names='for ns in user mnt ipc uts net; do readlink /proc/self/ns/$ns; done | md5sum'
        stay='cd /opt; touch /dev/shm/up; while [ ! -e /dev/shm/down ]; do sleep 0.05; done'
        $step --container-name=w sh -c "$names; $stay" &
        until [ -n "$there" ]; do there=$($bare --container-name=w:exec sh -c 'ls /dev/shm/up' 2>/dev/null); done
        $bare --container-name=w sh -c "$names; pwd; ps -o args | grep -c '[w]hile'; touch /dev/shm/down"
        wait"""
    first, second, *rest = lines(job(idle, script))
    assert first == second
    assert rest == ["/", "1"]


RUNNING = """
    $step --container-name=w RUN sh -c 'echo on > /opt/on; while [ ! -e /opt/down ]; do sleep 0.05; done' &
    until $bare --container-name=w:exec true 2>/dev/null; do sleep 0.05; done
    BODY
    $bare --container-name=w:no_exec touch /opt/down; wait"""


def beside(cluster: Cluster, body: str, *options: str, run: str = "") -> Done:
    """A job in which a step runs in the container `w` meanwhile."""
    return job(cluster, RUNNING.replace("BODY", body).replace("RUN", run), *options)


def test_options_that_a_running_container_can_not_follow_are_named(idle: Cluster) -> None:
    body = """
        $bare --container-name=w --container-mounts=/shared:/here --container-remap-root \\
            sh -c 'id -u; [ -e /here ] || echo none'"""
    done = beside(idle, body)
    assert lines(done) == ["61001", "none"]
    assert said(done.stderr) == [
        "enclos: ignoring --container-mounts when attaching to a running container",
        "enclos: ignoring --container-remap-root when attaching to a running container",
    ]


def test_another_network_than_the_running_containers_is_refused(idle: Cluster) -> None:
    body = """
        $bare --container-name=w --container-network=host sh -c 'echo ran'
        echo $?
        $bare --container-name=w sh -c 'ls /sys/class/net; ip -o link | wc -l'"""
    done = beside(idle, body, run="--container-network=none")
    assert lines(done) == ["1", "lo", "1"]
    assert [row for row in said(done.stderr) if row.startswith(("slurmstepd", "hint"))] == [
        "slurmstepd-n1: error: enclos: --container-name=w: the container runs on network none, not on host on n1",
        "hint: leave --container-network away to enter it, or start another on the same files with NAME:no_exec",
    ]


def test_no_exec_starts_another_on_the_same_files(idle: Cluster) -> None:
    """Each sees what the other writes, and neither sees the other's /dev/shm."""
    body = """
        $bare --container-name=w:no_exec --container-remap-root --container-mounts=/shared:/here \\
            sh -c 'id -u; cat /opt/on; ls -d /here/.; ls -A /dev/shm; echo new > /opt/new'
        $bare --container-name=w cat /opt/new"""
    assert lines(beside(idle, body)) == ["0", "on", "/here/.", "new"]
    readonly = "$bare --container-name=w:no_exec sh -c 'echo y > /opt/y; cat /opt/y'"
    script = """
        $step --container-name=q true
        $bare --container-name=q --container-readonly sleep 4 &
        until $bare --container-name=q:exec true 2>/dev/null; do sleep 0.05; done
        """ + readonly.replace("=w", "=q")
    assert lines(job(idle, script)) == ["y"]


def test_a_step_without_a_name_is_entered_by_its_number(idle: Cluster) -> None:
    script = """
        stay='while [ ! -e /dev/shm/down ]; do sleep 0.05; done'
        $step sh -c "echo \\$SLURM_STEP_ID | tee /dev/shm/mine; $stay" > ~/step &
        until [ -s ~/step ]; do sleep 0.05; done; number=$(cat ~/step); rm ~/step
        $bare --container-name=$SLURM_JOB_ID.$number sh -c 'cat /dev/shm/mine; touch /dev/shm/down' > ~/told
        wait; [ $number = $(cat ~/told) ] && echo entered; rm ~/told"""
    assert lines(job(idle, script)) == ["entered"]


def test_what_there_is_not_and_what_there_is_already(idle: Cluster) -> None:
    script = """
        $bare --container-name=w true
        $step --container-name=w:exec true
        $step --container-name=w:create true && echo created
        $step --container-name=w:create true
        $bare --container-name=w:exec true
        $bare --container-name=w:no_exec echo started"""
    done = job(idle, script)
    assert lines(done) == ["created", "started"]
    head = "slurmstepd-n1: error: enclos: --container-name=w: "
    assert [row for row in said(done.stderr) if row.startswith(head)] == [
        f'{head}a container with name "w" does not exist, and --container-image is not set on n1',
        f'{head}"exec" flag was passed to --container-name but the container is not running on n1',
        f'{head}"create" flag was passed to --container-name but the container already exists on n1',
        f'{head}"exec" flag was passed to --container-name but the container is not running on n1',
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (":exec", "empty name"),
        ("a/b", "a name has no slash"),
        ("a:often", 'flag must be "auto", "create", "exec" or "no_exec"'),
        ("", "argument required"),
    ],
)
def test_srun_refuses_what_can_be_no_name(idle: Cluster, value: str, text: str) -> None:
    done = idle.run(["srun", f"--container-name={value}", "true"], "usera")
    assert done.returncode != 0
    assert said(done.stderr)[0] == f"srun: error: enclos: --container-name={value}: {text}"


def test_any_name_that_a_shell_can_say(idle: Cluster) -> None:
    script = """
        for name in 'two words' 'grün' '..' "a'b" '-x'; do
            $step "--container-name=$name" sh -c 'echo "$0" > /opt/me' "$name"
        done
        for name in 'two words' 'grün' '..' "a'b" '-x'; do $bare "--container-name=$name" cat /opt/me; done"""
    assert lines(job(idle, script)) == ["two words", "grün", "..", "a'b", "-x"]


def test_names_belong_to_one_job_and_one_user(idle: Cluster) -> None:
    script = "$step --container-name=w sh -c 'cat /opt/note 2>/dev/null || echo fresh; echo mine > /opt/note; sleep 1'"
    with idle.popen(["salloc", "-Q", "-w", "n1", "bash", "-c", f"step='srun -n1 {IMAGE}'\n{script}"], "usera") as first:
        for user in ("usera", "userb"):
            assert lines(job(idle, script, user=user)) == ["fresh"]
        assert first.communicate(timeout=30)[0] == "fresh\n"


def test_another_users_container_is_out_of_reach(idle: Cluster) -> None:
    """By the number of its step, and by where its files are."""
    script = f"""
        srun -n1 {IMAGE} --container-name=w sh -c 'echo secret > /opt/note; echo $SLURM_JOB_ID; sleep 30' & wait"""
    with idle.popen(["salloc", "-Q", "-w", "n1", "bash", "-c", script], "usera") as running:
        assert running.stdout is not None
        number = running.stdout.readline().strip()
        done = job(idle, f"$bare --container-name={number}.0 cat /opt/note", user="userb")
        assert (done.returncode, done.stdout) == (1, "")
        assert f'a container with name "{number}.0" does not exist' in done.stderr
        for look in ("ls /run/enclos/named", "cat /run/enclos/named/*/upper/opt/note"):
            done = idle.run(["bash", "-c", look], "userb", "n1")
            assert (done.returncode != 0, done.stdout) == (True, "")
        assert idle.run("cat /run/enclos/named/*/upper/opt/note", "root", "n1").stdout == "secret\n"
        running.terminate()


def test_steps_on_several_nodes_have_one_each(idle: Cluster) -> None:
    script = f"""
        srun {IMAGE} --container-name=w sh -c 'hostname > /opt/node'
        srun --container-name=w sh -c 'cat /opt/node; [ $(cat /opt/node) = $(hostname) ]'"""
    done = idle.run(["salloc", "-Q", "-N2", "-w", "n1,n2", "bash", "-c", script], "usera")
    assert sorted(lines(done)) == ["n1", "n2"]


def test_many_steps_at_once_make_one(idle: Cluster) -> None:
    """Eight, in the same moment: one creates it, the others enter; all write into the same files."""
    script = """
        for i in 1 2 3 4 5 6 7 8; do
            $step --container-name=w sh -c "echo $i >> /opt/list; readlink /proc/self/ns/mnt >> /opt/spaces; sleep 1" &
        done; wait
        $bare --container-name=w sh -c 'sort /opt/list | xargs; sort -u /opt/spaces | wc -l'"""
    assert lines(job(idle, script, "-O")) == ["1 2 3 4 5 6 7 8", "1"]


def test_mpi_runs_in_a_container_that_runs(idle: Cluster) -> None:
    """Slurm's directories of the later step are brought in."""
    script = f"""
        srun -n1 --overlap {IMAGE} --container-name=w --container-network=job sleep 60 & sleeper=$!
        until srun -n1 --overlap --container-name=w:exec true 2>/dev/null; do sleep 0.05; done
        srun -n4 --overlap --mpi=pmix --container-name=w ring; kill $sleeper; wait"""
    done = idle.run(["salloc", "-Q", "-n4", "-w", "n1", "bash", "-c", script], "usera")
    assert "4 ranks" in done.stdout or done.stdout.count("rank") >= 1, (done.stdout, done.stderr)


def test_nothing_is_left_when_the_job_has_ended(leftovers: Leftovers) -> None:
    script = """
        $step --container-name=a dd if=/dev/zero of=/big bs=1M count=50 2>/dev/null
        $step --container-name=b sh -c 'mkdir -p /x/y; chmod 0 /x/y /x'
        $step --container-name=c true"""
    done = job(leftovers.cluster, script)
    assert done.returncode == 0, done.stderr
    assert leftovers.rows() == []


@pytest.mark.parametrize("how", ["exit 3", "kill -9 $$"])
def test_an_entered_container_lives_until_its_last_step_ends(idle: Cluster, leftovers: Leftovers, how: str) -> None:
    """The step that made it ends first; the other goes on, undisturbed, and can be joined by a third."""
    script = f"""
        $step --container-name=w sh -c 'while [ ! -e /opt/two ]; do sleep 0.05; done; {how}' &
        until $bare --container-name=w:exec true 2>/dev/null; do sleep 0.05; done
        $bare --container-name=w sh -c 'touch /opt/two; while [ ! -e /opt/three ]; do sleep 0.05; done; echo second' &
        wait %1; echo first
        $bare --container-name=w:exec sh -c 'touch /opt/three; echo third'
        wait"""
    assert sorted(lines(job(idle, script))) == ["first", "second", "third"]
    assert leftovers.rows() == []


def test_limits(idle: Cluster) -> None:
    script = """
        $step --container-name=big \\
            sh -c 'dd if=/dev/zero of=/big bs=1M count=4096 2>/dev/null; stat -c %s /big; rm /big'
        for i in 1 2 3 4 5 6 7; do $step --container-name=$i true || echo $i; done
        $step --container-name=8 true
        $bare --container-name=3 echo three"""
    done = job(idle, script)
    size, last = lines(done)
    assert (int(size) <= 2 << 30, last) == (True, "three")
    head = "slurmstepd-n1: error: enclos: --container-name=8: "
    assert [row for row in said(done.stderr) if row.startswith(head)] == [
        f"{head}you have 8 named containers on this node already (1, 2, 3, 4, 5, 6, 7, big) on n1"
    ]


def test_an_image_that_has_changed_is_refused(idle: Cluster) -> None:
    script = """
        $bare --container-image=/shared/own --container-name=w sh -c 'echo x > /opt/x'
        mv /shared/own /shared/other; cp -a /shared/other /shared/own
        $bare --container-name=w cat /opt/x
        rm -r /shared/own; mv /shared/other /shared/own
        $bare --container-name=w cat /opt/x"""
    source = idle.layout.images / "openmpi"
    subprocess.run(["cp", "-a", "--", str(source), str(idle.layout.shared / "own")], check=True)
    subprocess.run(["chown", "-hR", "61001:61001", str(idle.layout.shared / "own")], check=True)
    (idle.layout.shared).chmod(0o1777)
    done = job(idle, script)
    assert lines(done) == ["x"]
    assert [row for row in said(done.stderr) if "enclos" in row] == [
        "slurmstepd-n1: error: enclos: --container-name=w: its image /shared/own has changed since the container was"
        " created on n1"
    ]


@pytest.mark.parametrize("later", ["", ":no_exec"])
def test_a_users_image_is_served_until_nobody_needs_it(idle: Cluster, leftovers: Leftovers, later: str) -> None:
    """By squashfuse, which the first step started; the second one is there when the first has ended."""
    own = idle.layout.shared / "own.sqsh"
    subprocess.run(["cp", "--", str(idle.layout.images / "openmpi.sqsh"), str(own)], check=True)
    subprocess.run(["chown", "61001:61001", str(own)], check=True)
    script = f"""
        srun -n1 --overlap --container-image=/shared/own.sqsh --container-name=w \\
            sh -c 'while [ ! -e /opt/two ]; do sleep 0.05; done' &
        until $bare --container-name=w:exec true 2>/dev/null; do sleep 0.05; done
        $bare --container-name=w{later} \\
            sh -c 'touch /opt/two; while [ ! -e /opt/go ]; do sleep 0.05; done; md5sum < /usr/bin/ring' &
        wait %1
        $bare --container-name=w:exec touch /opt/go; wait"""
    wanted = subprocess.run(["md5sum"], stdin=(idle.layout.images / "openmpi/usr/bin/ring").open("rb"), check=True,
                            capture_output=True, text=True).stdout  # fmt: skip
    done = job(idle, script)
    assert done.stdout.splitlines()[0] == wanted.strip(), done.stderr
    own.unlink()
    assert leftovers.rows() == []
