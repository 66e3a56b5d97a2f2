"""`enclos run`: the containers of a machine that has nothing of Slurm, with the options of srun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from boxes import BOX, fill_shared, make_box
from conftest import PATIENCE, Leftovers, Result, require_cgroup2
from enclos.runtime.cluster import cgroups
from enclos.runtime.cluster.cluster import Cluster, Running
from faults import processes, zygote
from test_exec import await_none, read_until

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
from layers import Entry, layer, write_layout

RUN = ["enclos", "run"]
PER_USER = 5
CONFIG = f"images:\n  idle_seconds: 0\nrun:\n  per_user: {PER_USER}\n"
WAIT = 20
WISH = b"option.image=/images/box.sqsh\0cwd=/\0"
# What a user's own client does: asks for a run, says what it is told to, and prints what it hears.
CLIENT = """
import os, socket, sys, time
user = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
user.connect("/run/enclos/user.sock")
user.send(b"version=1\\0verb=run\\0" + os.fsencode(sys.argv[1]).replace(b"~", b"\\0"))
data, fds, _, _ = socket.recv_fds(user, 1 << 17, 4)
print(data.replace(b"\\0", b" ").decode(), flush=True)
if not fds:
    sys.exit(1)
own = socket.socket(fileno=fds[0])
own.settimeout(30)
for step in sys.argv[2:]:
    if step == "sleep":
        time.sleep(1000)
    elif step == "program":
        print("sends", flush=True)
        socket.send_fds(own, [b"arg=sleep\\0arg=1000\\0"], [0, 1, 2])
    elif step == "hear":
        try:
            print(own.recv(1 << 17).replace(b"\\0", b" ").decode() or "gone", flush=True)
        except OSError as error:
            print(type(error).__name__, flush=True)
    else:
        own.send(os.fsencode(step).replace(b"~", b"\\0"))
"""


@pytest.fixture(scope="module")
def laptop(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A machine without Slurm, and without an address that others know."""
    made = make_cluster(1, config=CONFIG, with_slurm=False)
    make_box(made.layout.images)
    fill_shared(made.layout.shared)
    return made


@pytest.fixture
def clean(laptop: Cluster) -> Leftovers:
    """A count of what there is, with the agent running and its user namespaces for both users made."""
    laptop.start_agent("n1")
    for user in ("usera", "userb"):
        assert run(laptop, "true", user=user).returncode == 0
    return Leftovers(laptop)


def run(laptop: Cluster, *words: str, user: str = "usera", input: str | None = None, **env: str) -> Result:
    """A run in the box; options come first, then the command."""
    options = [word for word in words if word.startswith(("--container", "--no-container"))]
    command = [word for word in words if word not in options]
    image = [] if any(word.startswith("--container-name") for word in options) else [BOX]
    return laptop.run([*RUN, *options, *image, *command], user, "n1", input=input, timeout=60, env=env)


def shell(laptop: Cluster, script: str, *options: str, **env: str) -> str:
    """What a script in a container prints; it has to succeed and to say nothing on standard error."""
    done = run(laptop, *options, "sh", "-ec", script, **env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@contextlib.contextmanager
def started(laptop: Cluster, script: str, *options: str, user: str = "usera") -> Iterator[Running]:
    """A run whose script has printed `up`."""
    words = [*RUN, *options, BOX, "sh", "-c", script]
    with laptop.popen(words, user, "n1", stdin=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        line = running.stdout.readline()
        assert line == "up\n", line + running.stderr.read()
        try:
            yield running
        finally:
            running.kill()


def ps(laptop: Cluster, user: str = "usera") -> list[str]:
    return [f"run.{one['step']}" for one in json.loads(laptop.run(["enclos", "ps", "--json"], user, "n1").stdout)]


# ---------------------------------------------------------------- a machine without Slurm


def test_the_agent_keeps_no_tunnels_without_slurm(laptop: Cluster) -> None:
    """Neither its table of nftables nor the devices that hold the port; and it asks nobody for jobs."""
    assert laptop.run(["nft", "list", "tables"], node="n1").stdout == ""
    assert "enclos" not in laptop.run(["ip", "-o", "link"], node="n1").stdout
    assert "no node of Slurm's" in laptop.agent_log("n1")


def test_check_finds_nothing_to_mend_for_lack_of_slurm(laptop: Cluster) -> None:
    found = json.loads(laptop.run(["enclos", "check", "--json"], node="n1").stdout)["findings"]
    rows = {row["subject"]: row for row in found}
    assert rows["slurm"]["status"] == "skipped"
    assert (rows["enclos run"]["status"], rows["enclos run"]["text"]) == ("ok", "users may start containers")
    assert not {"nft", "nftables", "underlay"} & rows.keys()
    assert [row for row in found if row["status"] == "mend"] == []


def test_a_node_of_slurms_refuses(cluster: Cluster, image: str) -> None:
    done = cluster.run([*RUN, image, "true"], "usera", "n1")
    assert done.returncode == 1
    text = r"enclos: run: this machine is a node of Slurm's \(.*slurmd\) on n1"
    assert re.fullmatch(text, done.stderr.splitlines()[0])


def test_the_site_decides(laptop: Cluster, cluster: Cluster, box: Path) -> None:
    """`never` where there is no Slurm, `always` where there is."""
    path = laptop.layout.node_etc("n1") / "enclos.yaml"
    try:
        path.write_text(f"{CONFIG}  allow: never\n")
        laptop.restart_agent("n1")
        done = run(laptop, "true")
        assert done.returncode == 1
        assert done.stderr.splitlines()[0] == "enclos: run: not allowed by the administrator on n1"
    finally:
        path.write_text(CONFIG)
        laptop.restart_agent("n1")
    path = cluster.layout.node_etc("n4") / "enclos.yaml"
    before = path.read_text()
    try:
        path.write_text(f"{before}\nrun:\n  allow: always\n")
        cluster.restart_agent("n4")
        done = cluster.run([*RUN, "--container-network=job", BOX, "ls", "/sys/class/net"], "usera", "n4")
        assert sorted(done.stdout.split()) == ["enclos0", "lo"], done.stderr
        assert cluster.run(["srun", "-w", "n4", f"--container-image={BOX}", "true"], "usera").returncode == 0
    finally:
        path.write_text(before)
        cluster.restart_agent("n4")


def test_the_first_job_ends_that(laptop: Cluster) -> None:
    """Where Slurm was not to be seen when the agent started, its prolog shows it."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect('/run/enclos/agent.sock'); s.send(b'version=1\\0' + sys.argv[1].encode().replace(b'~', b'\\0')); "
        "print(s.recv(4096))"
    )
    try:
        told = laptop.run([sys.executable, "-c", code, "verb=job~job=7~uid=61001~nodelist=n1~"], node="n1")
        assert "status=ok" in told.stdout, told.stderr
        assert "this machine is a node of Slurm's (a job's prolog) on n1" in run(laptop, "true").stderr
    finally:
        laptop.run([sys.executable, "-c", code, "verb=end~job=7~"], node="n1")
        laptop.restart_agent("n1")
    assert run(laptop, "true").returncode == 0


# ---------------------------------------------------------------- the program


LOOK = "grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; pwd"


def test_it_is_what_a_step_is(laptop: Cluster, cluster: Cluster, box: Path) -> None:
    """The same image, by srun and by run: ids, groups, rights, directory, variables of the image."""
    script = f'{LOOK}; echo "$FROM_IMAGE $QUOTED $BOTH $HOME"; cat /etc/hostname; mount | cut -d" " -f1,3,5 | sort'
    words = ["srun", "-w", "n1", f"--container-image={BOX}", "sh", "-ec", script]
    step = cluster.run(words, "usera", env={"BOTH": "job"})
    assert shell(laptop, script, BOTH="job") == step.stdout, step.stderr


@pytest.mark.parametrize(
    ("command", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("true", 0)]
)
def test_the_exit_status_is_the_commands(laptop: Cluster, command: str, status: int) -> None:
    assert run(laptop, "sh", "-c", command).returncode == status


@pytest.mark.parametrize(("command", "text", "status"), [
    ("nothere", "enclos: nothere: command not found in the container", 127),
    ("/etc", "enclos: /etc: cannot be run in the container (permission denied)", 126),
    ("", "enclos: command not found in the container", 127),
])  # fmt: skip
def test_a_command_that_does_not_run(laptop: Cluster, command: str, text: str, status: int) -> None:
    done = run(laptop, command)
    assert (done.returncode, done.stderr.splitlines()[0]) == (status, text)


def test_a_variable_without_a_name_is_left_out(laptop: Cluster) -> None:
    done = laptop.run(["env", "=x", "A==b", *RUN, BOX, "env"], "usera", "n1")
    assert (done.returncode, done.stderr) == (0, "")
    rows = done.stdout.splitlines()
    assert "A==b" in rows and not any(row.startswith("=") for row in rows)


def test_a_directory_that_was_removed(laptop: Cluster) -> None:
    script = f"mkdir /tmp/gone; cd /tmp/gone; rmdir /tmp/gone; exec enclos run {BOX} pwd"
    done = laptop.run(["sh", "-c", script], "usera", "n1")
    assert done.returncode == 1
    assert done.stderr.startswith("enclos: run: the directory that you are in cannot be named (no such file")
    assert len(done.stderr.splitlines()) == 2


def test_input_and_output_are_the_commands(laptop: Cluster) -> None:
    script = f"head -c 3000000 /dev/zero | enclos run {BOX} sh -c 'cat; echo err >&2' | wc -c"
    done = laptop.run(["sh", "-c", script], "usera", "n1")
    assert (done.stdout.strip(), done.stderr) == ("3000000", "err\n")


def test_no_descriptor_is_inherited(laptop: Cluster) -> None:
    """The fourth is that of the directory which ls reads."""
    assert run(laptop, "ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]


def test_it_is_like_a_child_of_the_command(laptop: Cluster) -> None:
    """Resource limits, priority, processors, umask, preference of the OOM killer: the command's, not the agent's."""
    nice = "cut -f19 -d\\  /proc/self/stat"
    look = f"ulimit -n; ulimit -Hn; ulimit -c; {nice}; umask; grep Cpus_allowed_list /proc/self/status; "
    look += "cat /proc/self/oom_score_adj"
    change = "ulimit -Sn 321; ulimit -Hn 654; ulimit -c 0; umask 027; echo 150 > /proc/self/oom_score_adj"
    script = f"{change}; exec nice -n 5 taskset -c 0 sh -c '{look}; exec enclos run {BOX} sh -c \"{look}\"'"
    done = laptop.run(["sh", "-c", script], "usera", "n1")
    rows = done.stdout.splitlines()
    assert len(rows) == 14, done.stderr
    assert rows[:7] == rows[7:]
    assert rows[:2] == ["321", "654"]


def test_audit_knows_whose_login_it_is(laptop: Cluster) -> None:
    if not Path("/proc/self/loginuid").exists():
        pytest.skip("this kernel has no audit")
    become = "setpriv --reuid=61001 --regid=61001 --init-groups"
    script = f"echo 61001 >/proc/self/loginuid; exec {become} enclos run {BOX} cat /proc/self/loginuid"
    assert laptop.run(["sh", "-c", script], "root", "n1").stdout == "61001"


def test_it_is_in_the_cgroups_of_the_command(laptop: Cluster) -> None:
    """Of every hierarchy; what the command is held to holds its program."""
    parents = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/unified")]
    made = [parent / f"enclos-test-{os.getpid()}" for parent in parents if os.access(parent / "cgroup.procs", os.W_OK)]
    if not made:
        pytest.skip("needs hierarchies of cgroup v1 that can be written")
    for directory in made:
        directory.mkdir()
    try:
        places = " ".join(f"{directory}/cgroup.procs" for directory in made)
        words = [*RUN, BOX, "sh", "-c", "cat /proc/self/cgroup; echo up; exec sleep 1000"]
        inner, environment = laptop.command(words, "usera", "n1")
        script = f'for place in {places}; do echo $$ > $place; done; exec "$@"'
        with subprocess.Popen(["sh", "-c", script, "sh", *inner], env=environment, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            while running.stdout.readline().strip() != b"up":
                assert running.poll() is None
            inside = {directory: (directory / "cgroup.procs").read_text().split() for directory in made}
            name = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pids in inside.values() for pid in pids}
            (client,) = [pid for pid in name if name[pid] == "enclos"]
            os.kill(int(client), signal.SIGKILL)
        for directory, pids in inside.items():
            names = {name[pid] for pid in pids}
            assert {"enclos", "enclos-run"} <= names and names & {"sh", "sleep", "exe"}, directory  # busybox
    finally:
        for directory in made:
            until(lambda: not (directory / "cgroup.procs").read_text())  # noqa: B023
            directory.rmdir()


@pytest.mark.vm_new
def test_it_sees_the_cgroup_of_the_command(laptop: Cluster) -> None:
    """As a step sees its own: Java and others look there for what they may have. It cannot be changed there."""
    require_cgroup2()
    login = cgroups.place(laptop.name, "n1") / "login"
    login.mkdir()
    try:
        (login / "cgroup.max.depth").write_text("7")
        look = "cd /sys/fs/cgroup; cat cgroup.max.depth; ls -d ../cgroup; touch own || echo 8 > cgroup.max.depth"
        inner, environment = laptop.command([*RUN, BOX, "sh", "-c", look], "usera", "n1")
        words = ["sh", "-c", f'echo $$ > {login}/cgroup.procs; exec "$@"', "sh", *inner]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=200)
        assert (done.stdout.split(), done.returncode) == (["7", "../cgroup"], 1), done.stderr
        assert done.stderr.count("Read-only file system") == 2
    finally:
        until(lambda: not (login / "cgroup.procs").read_text())
        login.rmdir()


@pytest.mark.vm_new
def test_container_limits(laptop: Cluster) -> None:
    """Without Slurm they are set on a cgroup of the run's own, which ends with it."""
    require_cgroup2()
    root = Path("/sys/fs/cgroup")
    look = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max"
    limit = "--container-limit=memory=64M,swap=0,cpu=0.5,pids=50"
    words = [*RUN, limit, BOX, "sh", "-c"]
    seen = laptop.run([*words, look], "usera", "n1", timeout=200)
    assert seen.stdout.split() == [str(64 << 20), "0", "50000", "100000", "50"], seen.stderr
    own = re.compile(r"/enclos/[^/]+$")
    killed = laptop.run([*words, "cat /dev/zero | tail"], "usera", "n1", timeout=200)
    assert killed.returncode == 1 and "the program was ended" in killed.stderr
    deadline = time.monotonic() + WAIT
    while left := [path for path in root.rglob("*") if path.is_dir() and own.search(str(path))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_limits_that_leave_no_room_are_said(laptop: Cluster) -> None:
    """The program cannot be forked: not a run that ends without a word."""
    script = f"ulimit -u 1; exec enclos run {BOX} true"
    done = laptop.run(["bash", "-c", script], "usera", "n1")
    assert done.returncode == 126
    assert done.stderr.startswith("enclos: true: cannot be run in the container (resource temporarily unavailable)")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptors_that_are_closed(laptop: Cluster, closed: str) -> None:
    script = f"enclos run {BOX} sh -c 'ls -l /proc/self/fd; exit 5' {closed}; echo $?"
    done = laptop.run(["sh", "-c", script], "usera", "n1")
    assert done.stdout.splitlines()[-1] == "5", done.stderr
    assert "Traceback" not in done.stderr
    assert "socket:" not in done.stdout


def test_a_session_keyring_of_its_own(laptop: Cluster) -> None:
    """Not the agent's: who has a keyring has the keys in it."""
    code = "import ctypes; print(ctypes.CDLL(None).syscall(250, 0, -3, 0))"
    mounts = ",".join(path for path in ("/usr", "/lib", "/lib64") if Path(path).exists())
    words = [*RUN, f"--container-mounts={mounts}", BOX, "/usr/bin/python3", "-c", code]
    own = laptop.run(["/usr/bin/python3", "-c", code], "usera", "n1")
    if os.uname().machine != "x86_64" or int(own.stdout) < 0:
        pytest.skip("the number of keyctl is another here, or it is forbidden")
    found = [laptop.run(words, "usera", "n1") for _ in range(2)]
    assert len({done.stdout for done in (own, *found)}) == 3, found[0].stderr


def until(true: Callable[[], bool], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_it(laptop: Cluster, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 5' {number.name[3:]}; echo up; while :; do sleep 0.1; done"
    with started(laptop, script) as running:
        running.send_signal(number)
        assert running.communicate(timeout=WAIT)[0] == "got\n"
        assert running.returncode == 5


def test_a_terminal_of_its_own(laptop: Cluster) -> None:
    ours, theirs = os.openpty()
    script = "trap 'stty size' WINCH; trap 'exit 3' INT; tty; stty size; while :; do sleep 0.1; done"
    words = [*RUN, BOX, "sh", "-c", script]
    with (
        os.fdopen(ours, "r+b", buffering=0) as terminal,
        laptop.popen(words, "usera", "n1", stdin=theirs, stdout=theirs, stderr=theirs) as running,
    ):
        shown = read_until(terminal, b"/dev/pts/")
        assert os.ttyname(theirs) not in shown.split()
        terminal.write(b"\x03")
        assert running.wait(WAIT) == 3
    os.close(theirs)


def test_without_a_command_it_is_a_shell(laptop: Cluster) -> None:
    done = run(laptop, input="echo is $0\n")
    assert done.stdout == "is sh\n", done.stderr


def test_without_a_command_it_is_the_images(laptop: Cluster) -> None:
    """Of an image with an entrypoint it would only be arguments."""
    for name, config, said in (
        ("cmd", {"Cmd": ["echo", "of the image"]}, "of the image\n"),
        ("both", {"Cmd": ["echo", "of the image"], "Entrypoint": ["sh", "-c"]}, "is sh\n"),
    ):
        done = laptop.run([*RUN, layout(laptop, name, config)], "usera", "n1", input="echo is $0\n")
        assert done.stdout == said, done.stderr


def layout(laptop: Cluster, name: str, config: dict[str, list[str]]) -> str:
    """An image as from a registry, with busybox in it; its reference."""
    folder = laptop.layout.shared / f"layout-{name}"
    if not folder.exists():
        busybox = Path("/bin/busybox").read_bytes()
        programs = [Entry(f"bin/{applet}", "link", target="bin/busybox") for applet in ("sh", "cat", "echo", "env")]
        files = [Entry("bin", "dir", mode=0o755), Entry("bin/busybox", data=busybox, mode=0o755), *programs]
        write_layout(folder, [layer(files)], config={"Env": ["PATH=/bin"], **config})
    return f"oci:/shared/layout-{name}:t"


# ---------------------------------------------------------------- options


def test_mounts_and_directories(laptop: Cluster) -> None:
    options = ["--container-mounts=/shared/data:/in:ro,tmpfs:/fast", "--container-workdir=/in"]
    script = "pwd; touch /fast/x; touch /in/x 2>/dev/null || echo read-only"
    assert shell(laptop, script, *options) == "/in\nread-only\n"
    done = laptop.run([*RUN, "--container-mounts=.:/here", BOX, "ls", "/here"], "usera", "n1", cwd="/shared/data/..")
    assert "for-all" in done.stdout.split(), done.stderr
    done = laptop.run([*RUN, "./box.sqsh", "cat", "/opt/file"], "usera", "n1", cwd="/images")
    assert done.stdout == "of the image\n", done.stderr
    assert shell(laptop, 'ls -d "$HOME"/.profile', "--container-mount-home") == "/home/usera/.profile\n"


@pytest.mark.parametrize(("options", "out"), [
    ((), "61001 written\n"),
    (("--container-readonly",), "61001 refused\n"),
    (("--container-remap-root",), "0 written\n"),
])  # fmt: skip
def test_flags(laptop: Cluster, options: Sequence[str], out: str) -> None:
    script = "echo $(id -u) $(touch /x 2>/dev/null && echo written || echo refused)"
    assert shell(laptop, script, *options) == out


def test_root_inside_may_seem_to_change_owners(laptop: Cluster) -> None:
    assert shell(laptop, "touch /x; chown 7:7 /x && echo done", "--container-remap-root") == "done\n"


@pytest.mark.parametrize(("network", "interfaces"), [("none", ["lo"]), ("job", ["enclos0", "lo"])])
def test_networks(laptop: Cluster, network: str, interfaces: list[str]) -> None:
    """`job` is the run's own: an interface with addresses, to which the machine's name leads."""
    option = f"--container-network={network}"
    assert sorted(shell(laptop, "ls /sys/class/net", option).split()) == interfaces
    if network == "job":
        script = "ip -4 -o addr show enclos0; grep n1 /etc/hosts; echo answers | nc -l -p 80 & "
        script += "sleep 0.3; nc n1 80 </dev/null"
        out = shell(laptop, script, option)
        assert "inet 10.77.0.1/16" in out and "10.77.0.1 n1" in out and out.endswith("answers\n")


def test_two_runs_do_not_share_a_network(laptop: Cluster) -> None:
    with started(laptop, "echo up; exec nc -l -p 4000", "--container-network=job"):
        done = run(laptop, "--container-network=job", "nc", "-w", "1", "10.77.0.1", "4000")
    assert done.returncode != 0


def test_variables_count_less_than_options(laptop: Cluster) -> None:
    env = {"ENCLOS_CONTAINER_WORKDIR": "/opt", "PYXIS_CONTAINER_WORKDIR": "/srv", "PYXIS_CONTAINER_REMAP_ROOT": "yes"}
    assert shell(laptop, "pwd; id -u", **env) == "/opt\n0\n"
    options = ["--container-workdir=/bin", "--no-container-remap-root"]
    assert shell(laptop, "pwd; id -u", *options, **env) == "/bin\n61001\n"


def test_a_profile(laptop: Cluster) -> None:
    """It counts less than the command line, more than variables; its variables are the program's."""
    folder = laptop.layout.shared / "profiles"
    folder.mkdir(exist_ok=True)
    (folder / "p.toml").write_text(
        'image = "/images/box.sqsh"\nworkdir = "/opt"\nremap_root = true\n[env]\nBOTH = "profile"\n'
    )
    words = [*RUN, "--container-profile=p", "--no-container-remap-root", "sh", "-c", "pwd; id -u; echo $BOTH"]
    env = {"ENCLOS_PROFILE_PATH": "/shared/profiles", "ENCLOS_CONTAINER_WORKDIR": "/srv"}
    done = laptop.run(words, "usera", "n1", env=env)
    assert done.stdout == "/opt\n61001\nprofile\n", done.stderr


def test_no_variable_is_added(laptop: Cluster) -> None:
    """Python has one of its own where the locale is C."""
    done = laptop.run(["env", "-i", "MINE=1", f"{laptop.programs}/enclos", *RUN[1:], BOX, "env"], "usera", "n1")
    names = {row.partition("=")[0] for row in done.stdout.splitlines()}
    assert "MINE" in names, done.stderr
    assert names - {"MINE", "FROM_IMAGE", "QUOTED", "BOTH"} == set()


def test_container_env(laptop: Cluster) -> None:
    assert shell(laptop, "echo $BOTH", BOTH="mine") == "image\n"
    assert shell(laptop, "echo $BOTH", "--container-env=BOTH", BOTH="mine") == "mine\n"


def test_named_containers_are_kept_until_they_are_removed(laptop: Cluster) -> None:
    """No job ends them, nor a new agent."""
    made = [f"--container-image={BOX}", "--container-name=work"]
    assert run(laptop, *made, "touch", "/kept").returncode == 0
    laptop.restart_agent("n1")
    assert run(laptop, "--container-name=work", "ls", "/kept").stdout == "/kept\n"
    other = run(laptop, "--container-name=work", "ls", "/kept", user="userb")
    assert 'a container with name "work" does not exist' in other.stderr
    assert laptop.run(["enclos", "rm", "work"], "usera", "n1").returncode == 0
    assert run(laptop, "--container-name=work", "ls", "/kept").returncode == 1


def test_a_run_enters_a_named_container_that_runs(laptop: Cluster) -> None:
    made = [f"--container-image={BOX}", "--container-name=both"]
    words = [*RUN, *made, "sh", "-c", "echo up; read line; ls /from-other"]
    with laptop.popen(words, "usera", "n1", stdin=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == "up\n"
        assert run(laptop, "--container-name=both:exec", "touch", "/from-other").returncode == 0
        assert first.communicate("\n", timeout=WAIT)[0] == "/from-other\n"
    laptop.run(["enclos", "rm", "both"], "usera", "n1")


def test_save(laptop: Cluster) -> None:
    target = laptop.layout.shared / "data/saved.sqsh"
    done = run(laptop, "--container-save=/shared/data/saved.sqsh", "sh", "-c", "touch /new; exit 4")
    assert (done.returncode, done.stderr) == (4, "enclos: saved the container to /shared/data/saved.sqsh\n")
    assert laptop.run([*RUN, "/shared/data/saved.sqsh", "ls", "/new"], "usera", "n1").stdout == "/new\n"
    target.unlink()
    done = run(laptop, "--container-save=/shared/data/saved.sqsh", "sh", "-c", "kill -9 $$")
    assert (done.returncode, done.stderr, target.exists()) == (137, "", False)
    done = run(laptop, "--container-save=/etc/no.sqsh", "true")
    assert done.returncode == 1 and "--container-save=/etc/no.sqsh" in done.stderr


def test_an_agent_that_ends_before_the_container_is_saved(laptop: Cluster) -> None:
    words = [*RUN, "--container-save=/shared/data/lost.sqsh", BOX, "sh", "-c", "echo up; read line"]
    with laptop.popen(words, "usera", "n1", stdin=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        laptop.restart_agent("n1")
        _, err = running.communicate("\n", timeout=WAIT)
    assert running.returncode == 1
    assert err.startswith("enclos: --container-save: the agent ended before the container was saved on n1")
    assert not (laptop.layout.shared / "data/lost.sqsh").exists()


LOG = "--container-entrypoint-log"
RC = """\
#!/bin/sh
echo "from the entrypoint"
export FROM_ENTRYPOINT="two words" BOTH=changed
unset TO_UNSET
[ -z "$STATUS" ] || exit "$STATUS"
[ -z "$LEAVE" ] || exit 0
exec "$@"
"""


@pytest.fixture(scope="module")
def entrypoint(laptop: Cluster) -> str:
    root = laptop.layout.images / "entrypoint"
    shutil.copytree(laptop.layout.images / "box", root, symlinks=True)
    (root / "etc/rc").write_text(RC)
    (root / "etc/rc").chmod(0o755)
    return "/images/entrypoint"


def test_the_entrypoint_runs_before_the_program(laptop: Cluster, entrypoint: str) -> None:
    words = ["sh", "-c", 'echo "$FROM_ENTRYPOINT|$BOTH|${TO_UNSET-unset}|$#" >&1', "sh", "a b"]
    env = {"TO_UNSET": "1"}
    for options, out, err in (
        ((), "|image|1|1\n", ""),
        (("--container-entrypoint",), "two words|changed|unset|1\n", ""),
        (("--container-entrypoint", LOG), "two words|changed|unset|1\n", "from the entrypoint\n"),
    ):
        done = laptop.run([*RUN, *options, entrypoint, *words], "usera", "n1", env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_an_entrypoint_that_fails_is_told(laptop: Cluster, entrypoint: str) -> None:
    words = [*RUN, "--container-entrypoint", entrypoint, "echo", "not run"]
    done = laptop.run(words, "usera", "n1", env={"STATUS": "3"})
    assert (done.returncode, done.stdout) == (3, "")
    said = ["from the entrypoint", "enclos: --container-entrypoint: the image's entrypoint failed with status 3 on n1"]
    assert done.stderr.splitlines()[:2] == said
    done = laptop.run(words, "usera", "n1", env={"LEAVE": "1"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "did not execute its arguments on n1" in done.stderr


@pytest.mark.parametrize(("words", "text"), [
    ([], "enclos: run: an image is required"),
    (["--container-readonly"], "enclos: run: an image is required"),
    (["--container-bogus", BOX], "enclos: run: unrecognized arguments: --container-bogus"),
    (["--pty", BOX, "sh"], "enclos: run: unrecognized arguments: --pty"),
    (["--container-mounts"], "enclos: run: argument --container-mounts: expected one argument"),
    (["--container-mounts=a:b", BOX], "enclos: run: --container-mounts=a:b: mount source must be"),
    (["--container-network=blue", BOX], "enclos: run: --container-network=blue: no such network"),
    (["--container-image=a", "--container-image=b", "true"], "enclos: --container-image: specified multiple times"),
    (["--container-writable", "--container-readonly", BOX],
     "enclos: run: both --container-writable and --container-readonly were specified"),
    (["--container-remap-root", "--no-container-remap-root", BOX],
     "enclos: run: both --container-remap-root and --no-container-remap-root were specified"),
    (["--container-profile=none", "true"], "enclos: --container-profile=none: profile not found (searched"),
    (["--container-slurm", BOX], "enclos: --container-slurm: it means nothing without Slurm on n1"),
    (["--container-rdma=auto", "--container-network=job", BOX],
     "enclos: --container-rdma with --container-network=job: it means nothing without Slurm on n1"),
    (["/images/none.sqsh"], "enclos: --container-image=/images/none.sqsh: image not found on n1"),
    (["", "true"], "enclos: run: --container-image=: argument required"),
    (["--container-mounts=/none:/x", BOX], "enclos: --container-mounts=/none:/x: source path does not exist on n1"),
    (["--container-workdir=/none", BOX, "true"], "enclos: --container-workdir=/none: couldn't chdir"),
    (["--container-device=acme.com/fpga=0", BOX], "enclos: --container-device=acme.com/fpga=0: no such device"),
    (["--container-name=none", "true"], 'enclos: --container-name=none: a container with name "none" does not exist'),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(laptop: Cluster, words: list[str], text: str) -> None:
    done = laptop.run([*RUN, *words], "usera", "n1")
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith(text), done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("pair", ["ENCLOS_CONTAINER_READONLY=maybe", "PYXIS_CONTAINER_NETWORK=blue"])
def test_a_wrong_variable_is_said(laptop: Cluster, pair: str) -> None:
    done = laptop.run(["env", pair, *RUN, BOX, "true"], "usera", "n1")
    if pair.startswith("PYXIS_CONTAINER_NETWORK"):
        assert done.returncode == 0, "pyxis has no such option"
    else:
        assert done.stderr.startswith(f"enclos: run: {pair}: neither yes nor no")


def test_roots_runs_are_refused(laptop: Cluster) -> None:
    done = laptop.run([*RUN, BOX, "true"], "root", "n1")
    assert (done.returncode, "steps of root are refused" in done.stderr) == (1, True)


def test_devices_of_cdi_files(laptop: Cluster) -> None:
    """Those that the site allows; there is no grant without Slurm."""
    device = {"name": "0", "containerEdits": {"env": ["FPGA=given"]}}
    text = json.dumps({"cdiVersion": "0.6.0", "kind": "acme.com/fpga", "devices": [device]})
    folder = laptop.path_on("n1", "/etc/cdi")
    folder.mkdir(exist_ok=True)
    (folder / "acme.json").write_text(text)
    path = laptop.layout.node_etc("n1") / "enclos.yaml"
    try:
        done = run(laptop, "--container-device=acme.com/fpga=0", "true")
        assert "--container-device=acme.com/fpga=0" in done.stderr and done.returncode == 1
        path.write_text(CONFIG + 'devices:\n  allow: ["acme.com/*=*"]\n')
        laptop.restart_agent("n1")
        assert shell(laptop, "echo $FPGA", "--container-device=acme.com/fpga=0") == "given\n"
    finally:
        path.write_text(CONFIG)
        laptop.restart_agent("n1")
        shutil.rmtree(folder)


# ---------------------------------------------------------------- beside it


def test_it_is_seen_and_entered(laptop: Cluster) -> None:
    """By its user, under the name run.N; by nobody else but root, who enters as the user."""
    with started(laptop, "echo up; exec sleep 1000"):
        listed = laptop.run(["enclos", "ps"], "usera", "n1").stdout.splitlines()[1].split()
        name = listed[0]
        assert re.fullmatch(r"run\.[0-9]+", name)
        assert listed[1:3] == ["usera", "running"]
        for words in ([name], ["run"]):
            done = laptop.run(["enclos", "exec", *words, "id", "-u"], "usera", "n1")
            assert done.stdout == "61001\n", done.stderr
        assert laptop.run(["enclos", "exec", name, "id", "-u"], "root", "n1").stdout == "61001\n"
        assert laptop.run(["enclos", "top", "--interval", "0.05"], "usera", "n1").stdout.count("\n") == 2
        for words in ([name], ["run"], ["run.99"]):
            done = laptop.run(["enclos", "exec", *words, "true"], "userb", "n1")
            assert f"enclos: {words[0]}: you have no container of this name here" in done.stderr
        assert len(laptop.run(["enclos", "ps"], "userb", "n1").stdout.splitlines()) == 1
        entered = run(laptop, f"--container-name={name}:exec", "true", user="userb")
        assert entered.returncode == 1
        assert run(laptop, f"--container-name={name}:exec", "true").returncode == 0


def test_exec_is_in_the_place_of_its_run(laptop: Cluster) -> None:
    """Limits are the run's, whatever the shell of `exec` has."""
    look = "ulimit -n; grep NoNewPrivs /proc/self/status"
    words = ["sh", "-c", f"ulimit -Sn 321; exec enclos run {BOX} sh -c 'echo up; exec sleep 1000'"]
    with laptop.popen(words, "usera", "n1") as running:
        assert running.stdout is not None and running.stdout.readline() == "up\n"
        done = laptop.run(["enclos", "exec", "run", "sh", "-c", look], "usera", "n1")
        assert done.stdout == "321\nNoNewPrivs:\t1\n", done.stderr
        running.kill()


def test_two_users_at_once(laptop: Cluster, clean: Leftovers) -> None:
    words = [*RUN, BOX, "sh", "-c", "echo $(id -un) $(cat /etc/passwd | grep -c user); cat"]
    users = ["usera", "userb"] * 4
    running = [laptop.popen(words, user, "n1", stdin=subprocess.PIPE) for user in users]
    out = [one.communicate("text\n", timeout=60) for one in running]
    assert [text for text, _ in out] == [f"{user} 1\ntext\n" for user in users], out
    assert clean.rows() == []


def test_a_users_number_is_bounded(laptop: Cluster, clean: Leftovers) -> None:
    """Others are not concerned, and who has ended some may have others."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(started(laptop, "echo up; exec sleep 1000")) for _ in range(PER_USER)]
        done = run(laptop, "true")
        many = f"you have {PER_USER} containers of 'enclos run' on this machine"
        text = f"enclos: run: {many}, more are not allowed on n1"
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, text)
        assert run(laptop, "true", user="userb").returncode == 0
        laptop.restart_agent("n1")
        assert run(laptop, "true").stderr.splitlines()[0] == text
        held[0].kill()
        until(lambda: run(laptop, "true").returncode == 0)
    # A new agent makes what it keeps for each user anew.
    assert run(laptop, "true", user="userb").returncode == 0
    assert clean.rows(exact=False) == []


# ---------------------------------------------------------------- the end


def test_nothing_outlives_its_program(laptop: Cluster, clean: Leftovers) -> None:
    assert run(laptop, "sh", "-c", "setsid sleep 4331 & sleep 0.2; exit 6").returncode == 6
    await_none("4331")
    assert clean.rows() == []


def test_it_ends_with_its_command(laptop: Cluster, clean: Leftovers) -> None:
    """Also a program that ignores a hang-up, and what it has put aside."""
    with started(laptop, "trap '' HUP; setsid sleep 4332 & echo up; sleep 4332") as running:
        running.kill()
    await_none("4332")
    assert clean.rows() == []


@pytest.mark.parametrize("steps", [
    [],
    [WISH.decode().replace("\0", "~")],
    [WISH.decode().replace("\0", "~"), "hear"],
    [WISH.decode().replace("\0", "~"), "hear", "program"],
    [WISH.decode().replace("\0", "~"), "hear", "program", "signal=15~"],
])  # fmt: skip
def test_a_command_that_dies_at_any_moment_leaves_nothing(laptop: Cluster, clean: Leftovers, steps: list[str]) -> None:
    with laptop.popen([sys.executable, "-c", CLIENT, "", *steps, "sleep"], "usera", "n1") as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("version=1 status=ok step=run.")
        for step in steps:
            if step in ("hear", "program"):
                running.stdout.readline()
        time.sleep(0.1)
        running.kill()
    assert clean.rows() == []


def test_a_command_that_only_closes_leaves_nothing(laptop: Cluster, clean: Leftovers) -> None:
    """Its process lives on; the connection tells."""
    script = CLIENT.replace("time.sleep(1000)", "own.close(), time.sleep(1000)")
    steps = [WISH.decode().replace("\0", "~"), "hear", "program", "sleep"]
    with laptop.popen([sys.executable, "-c", script, "", *steps], "usera", "n1") as running:
        assert running.stdout is not None
        for _ in range(3):
            running.stdout.readline()
        until(lambda: ps(laptop) == [])
        running.kill()
    assert clean.rows() == []


def test_who_waits_for_an_image_can_be_interrupted(laptop: Cluster, clean: Leftovers) -> None:
    """A registry that does not answer: Ctrl-C ends the command at once, and the import with it."""
    laptop.path_on("n1", "/etc/containers/registries.conf.d").mkdir(parents=True, exist_ok=True)
    listener = (
        "import socket, time; listener = socket.create_server(('127.0.0.1', 5999)); print('up', flush=True)\n"
        "held = listener.accept(); time.sleep(1000)"
    )
    with laptop.popen([sys.executable, "-c", listener], "usera", "n1") as registry:
        assert registry.stdout is not None and registry.stdout.readline() == "up\n"
        try:
            with laptop.popen([*RUN, "docker://127.0.0.1:5999/never:1", "true"], "usera", "n1") as running:
                until(lambda: processes(laptop, "n1", "enclos-run") != [])
                time.sleep(0.5)
                running.send_signal(signal.SIGINT)
                running.communicate(timeout=5)
                assert running.returncode in (130, -signal.SIGINT)
        finally:
            registry.kill()
    assert clean.rows(30) == []


def test_a_new_agent(laptop: Cluster, clean: Leftovers) -> None:
    """The program goes on, is seen and entered, and its end is told; runs that come get other numbers."""
    script = "echo up; read line; echo $line; exit 9"
    with started(laptop, script, "--container-network=job") as running:
        before = laptop.run(["enclos", "ps"], "usera", "n1").stdout.splitlines()[1].split()[0]
        laptop.restart_agent("n1", signal.SIGKILL)
        with started(laptop, "echo up; exec sleep 1000"):
            names = {row.split()[0] for row in laptop.run(["enclos", "ps"], "usera", "n1").stdout.splitlines()[1:]}
            assert before in names and len(names) == 2
        done = laptop.run(["enclos", "exec", before, "ls", "/sys/class/net"], "usera", "n1")
        assert "enclos0" in done.stdout, done.stderr
        assert running.communicate("still here\n", timeout=WAIT)[0] == "still here\n"
        assert running.returncode == 9
    for user in ("usera", "userb"):
        run(laptop, "true", user=user)
    assert clean.rows(exact=False) == []


def test_an_agent_that_dies_while_the_container_is_made(laptop: Cluster, clean: Leftovers) -> None:
    pid = zygote(laptop, "n1")
    os.kill(pid, signal.SIGSTOP)
    try:
        with laptop.popen([*RUN, BOX, "true"], "usera", "n1") as running:
            time.sleep(0.3)
            laptop.stop_agent("n1", signal.SIGKILL)
            out, err = running.communicate(timeout=WAIT)
        assert (running.returncode, out) == (1, "")
        assert err.startswith("enclos: ") and len(err.splitlines()) == 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        laptop.start_agent("n1")
    for user in ("usera", "userb"):
        run(laptop, "true", user=user)
    assert clean.rows(exact=False) == []


def test_without_an_agent_it_says_what_to_do(laptop: Cluster) -> None:
    laptop.stop_agent("n1")
    try:
        done = run(laptop, "true")
    finally:
        laptop.start_agent("n1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("enclos: agent is not running (/run/enclos/user.sock: ")
    assert done.stderr.splitlines()[1] == "hint: administrator: systemctl status enclosd"


# ---------------------------------------------------------------- attacks


def client(laptop: Cluster, *steps: str, extra: str = "") -> list[str]:
    """What a client of the user's own hears."""
    done = laptop.run([sys.executable, "-c", CLIENT, extra, *steps], "usera", "n1")
    return done.stdout.splitlines()


@pytest.mark.parametrize("forged", [
    "uid=0~", "gid=0~", "groups=0~", "job=7~", "step=1~", "stepd=1~", "verb=end~", "version=9~", "tasks=9~", "fds=net~",
    "spool=/etc~", "task=5~", "x", "~~", "",
])  # fmt: skip
def test_what_is_not_the_users_to_say_ends_the_run(laptop: Cluster, clean: Leftovers, forged: str) -> None:
    heard = client(laptop, "option.image=/images/box.sqsh~cwd=/~" + forged if forged else "x", "hear")
    assert heard[1:] == ["gone"]
    assert clean.rows() == []


def test_ids_are_the_kernels_word(laptop: Cluster) -> None:
    """What is said of them at the users' socket is not heard."""
    heard = client(laptop, WISH.decode().replace("\0", "~"), "hear", extra="uid=0~gid=0~pid=1~groups=0~")
    assert heard[0].startswith("version=1 status=ok step=run.")
    last = [line for line in laptop.agent_log("n1").splitlines() if "step=run." in line and " uid=" in line][-1]
    assert " uid=61001 " in last


def test_nobody_asks_in_the_place_of_a_process_that_has_ended(laptop: Cluster, clean: Leftovers) -> None:
    """Its pid may be another's by now, with other limits and cgroups."""
    script = (
        "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect('/run/enclos/user.sock'); ready, go = os.pipe()\n"
        "if os.fork(): os._exit(0)\n"
        "while os.getppid() != 1: pass\n"
        "s.send(b'version=1\\0verb=run\\0'); data, fds, _, _ = socket.recv_fds(s, 4096, 1); print(data, fds)"
    )
    done = laptop.run([sys.executable, "-c", script], "usera", "n1")
    assert done.stdout.strip().endswith("[]"), done.stderr
    assert "status=ok" not in done.stdout
    assert clean.rows() == []


def test_only_the_agents_own_process_stands_for_slurmstepd(laptop: Cluster) -> None:
    """Also where root asks: another process cannot be a run's."""
    code = (
        "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect('/run/enclos/agent.sock'); s.send(b'version=1\\0verb=join\\0job=0\\0step=1\\0uid=61001\\0"
        "gid=61001\\0tasks=1\\0task=0\\0option.image=/images/box.sqsh\\0stepd=%d\\0' % os.getpid()); "
        "print(s.recv(1 << 17).replace(b'\\0', b' ').decode())"
    )
    done = laptop.run([sys.executable, "-c", code], "root", "n1")
    assert "status=error" in done.stdout and "fds=" not in done.stdout, done.stderr
    assert laptop.run([sys.executable, "-c", code], "usera", "n1").returncode != 0
    assert ps(laptop, "root") == []


@pytest.mark.parametrize(("prefix", "why"), [
    (["unshare", "-r"], "it is in another user namespace"),
    (["unshare", "-rm"], "it is in another user namespace"),
    (["unshare", "-rpf"], "it is in another user namespace"),
])  # fmt: skip
def test_nobody_leaves_a_sandbox_by_it(laptop: Cluster, prefix: list[str], why: str) -> None:
    done = laptop.run([*prefix, *RUN, BOX, "true"], "usera", "n1")
    text = f"enclos: run: it cannot be used from inside a container or sandbox ({why}) on n1"
    assert done.stderr.splitlines()[0] == text


def test_nobody_leaves_a_network_namespace_by_it(laptop: Cluster) -> None:
    """One that root made for a program that shall have no network (PrivateNetwork= of systemd)."""
    become = ["setpriv", "--reuid=61001", "--regid=61001", "--init-groups"]
    done = laptop.run(["unshare", "-n", *become, *RUN, BOX, "ls", "/sys/class/net"], "root", "n1")
    assert "it is in another network namespace" in done.stderr.splitlines()[0]
    assert done.stdout == ""


def test_nobody_leaves_his_system_call_filter_by_it(laptop: Cluster) -> None:
    """A filter that allows everything is one."""
    script = (
        "import ctypes, os, struct, sys; c = ctypes.CDLL(None, use_errno=True)\n"
        "code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
        "prog = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(code)))\n"
        "assert c.prctl(38, 1, 0, 0, 0) == 0 and c.prctl(22, 2, prog, 0, 0) == 0\n"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = laptop.run([sys.executable, "-c", script, *RUN, BOX, "true"], "usera", "n1")
    assert "its system calls are filtered" in done.stderr, done.stderr


def test_paths_are_those_of_a_mount_namespace_that_root_made(laptop: Cluster, clean: Leftovers) -> None:
    """A private /tmp, as pam_namespace gives it: the command's is meant."""
    become = "setpriv --reuid=61001 --regid=61001 --init-groups"
    command = f"enclos run --container-mounts=/tmp/private:/in {BOX} cat /in/file"
    script = f"mount -t tmpfs tmpfs /tmp; mkdir /tmp/private; echo private >/tmp/private/file; exec {become} {command}"
    done = laptop.run(["unshare", "-m", "sh", "-c", script], "root", "n1")
    assert done.stdout == "private\n", done.stderr
    assert clean.rows() == []


def test_nobody_leaves_another_root_directory_by_it(laptop: Cluster) -> None:
    script = (
        "mount -t tmpfs tmpfs /tmp; for d in /*; do if [ -L $d ]; then cp -P $d /tmp; "
        "elif [ -d $d ] && [ $d != /tmp ]; then mkdir /tmp$d; mount --rbind $d /tmp$d; fi; done; "
        f"exec chroot --userspec=61001:61001 /tmp enclos run {BOX} true"
    )
    done = laptop.run(["unshare", "-m", "sh", "-c", script], "root", "n1")
    assert "it has another root directory" in done.stderr, done.stderr


def test_what_stands_for_slurmstepd_can_not_be_looked_into(laptop: Cluster) -> None:
    """Neither while it is root's nor when it is the user's; in the container's /proc it is not to be seen at all."""
    with started(laptop, "echo up; exec sleep 1000"):
        # The one that says nothing has some seconds.
        with laptop.popen([sys.executable, "-c", CLIENT, "", "sleep"], "usera", "n1") as silent:
            assert silent.stdout is not None and silent.stdout.readline()
            names = "for d in /proc/[0-9]*; do [ $(cat $d/comm) = enclos-run ] && echo ${d#/proc/}; done"
            pids = laptop.run(["sh", "-c", names], "usera", "n1").stdout.split()
            assert len(pids) == 2
            look = f"for p in {' '.join(pids)}; do for f in mem environ exe fd/0; do cat /proc/$p/$f; done; done"
            outside = laptop.run(["sh", "-c", look], "usera", "n1")
            assert outside.stderr.count("ermission denied") == 8, outside.stderr
            silent.kill()
        inside = laptop.run(["enclos", "exec", "run", "sh", "-c", names], "usera", "n1")
        assert inside.stdout == ""


def test_a_stopped_process_holds_up_nobody(laptop: Cluster, clean: Leftovers) -> None:
    """Its user may stop what is his; another's runs go on, and SIGKILL ends it."""
    with started(laptop, "echo up; exec sleep 4333") as running:
        (pid,) = processes(laptop, "n1", "enclos-run")
        stopped = laptop.run(["sh", "-c", "kill -STOP $(pidof -x enclos-run || pgrep -x enclos-run)"], "usera", "n1")
        assert stopped.returncode == 0, stopped.stderr
        assert run(laptop, "true", user="userb").returncode == 0
        os.kill(pid, signal.SIGKILL)
        _, err = running.communicate(timeout=WAIT)
        assert running.returncode == 1
        assert "the program was ended" in err
    await_none("4333")
    assert clean.rows() == []


def test_a_descriptor_that_takes_ages_to_close_stops_nobody(laptop: Cluster, clean: Leftovers) -> None:
    """Sent to the process that is root's still, where the kernel drops it."""
    script = CLIENT + """
import array, struct
listener = socket.create_server(("127.0.0.1", 0))
slow = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
slow.setblocking(False)
try:
    while True:
        slow.send(bytes(65536))
except BlockingIOError:
    pass
socket.send_fds(own, [b"option.image=/images/box.sqsh\\0cwd=/\\0"], [slow.fileno()])
# Whoever gives it up last waits: this process, or the other.
print("sent", flush=True)
slow.close()
time.sleep(1000)
"""
    with laptop.popen([sys.executable, "-c", script, ""], "usera", "n1") as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert running.stdout.readline() == "sent\n"
        begin = time.monotonic()
        assert run(laptop, "true", user="userb").returncode == 0
        assert run(laptop, "true").returncode == 0
        assert time.monotonic() - begin < 5 * PATIENCE
        running.kill()
    assert clean.rows() == []
