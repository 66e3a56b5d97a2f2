"""The shim on a real cluster: what srun refuses, what reaches the agent, how each failure looks, how a task is left.

Requests are seen by a listener that takes the agent's place on its socket and answers what a test tells it; what a
task inside a container looks like is tested with the real agent. Each test ends with all nodes idle: no failure of a
container may drain a node.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import plain
from enclos.runtime import protocol
from enclos.runtime.cluster.cluster import Cluster
from enclos.runtime.options import OPTIONS

pytestmark = pytest.mark.releases

SOCKET = "/run/enclos/agent.sock"
BATCH = "4294967291"
IMAGE = "/images/shim"
SCRIPT = """\
#!/bin/bash
[ -n "$TRY_PROLOG" ] || exit 0
echo "print prolog $SLURM_PROCID $(readlink /proc/self/ns/mnt) $SLURM_SCRIPT_CONTEXT"
echo "export FROM_PROLOG=a b = c"
echo "unset TO_UNSET"
echo "noise"
exit ${PROLOG_STATUS:-0}
"""
BAD_PLUGIN = r"""
#include <slurm/spank.h>
SPANK_PLUGIN(earlier, 1)
int CALLBACK(spank_t spank, int count, char *words[])
{
	(void)spank; (void)count; (void)words;
	return STATUS;
}
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """A cluster of this module's own, because its plugstack.conf and its agents are played with."""
    made = make_cluster(2, slurm_conf_extra="TaskProlog=/etc/slurm/taskprolog")
    script = made.layout.slurm / "taskprolog"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    make_image(made.layout.images / "shim")
    yield made
    made.down()


def make_image(folder: Path) -> None:
    """A directory with busybox, and a name for each applet."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox-static")
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run", "home"):
        (folder / name).mkdir(parents=True)
    shutil.copy(busybox, folder / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")


@pytest.fixture(autouse=True)
def idle(cluster: Cluster) -> Iterator[None]:
    """After each test: agents up, plugstack.conf as it was, no job left, and all nodes idle."""
    plugstack = cluster.layout.slurm / "plugstack.conf"
    before = plugstack.read_text()
    yield
    plugstack.write_text(before)
    for node in cluster.nodes:
        cluster.start_agent(node)
    assert wait_for(lambda: not cluster.run("squeue -h").stdout), cluster.run("squeue").stdout
    assert wait_for(lambda: set(states(cluster)) == {"idle"}), cluster.run("sinfo -N -o '%N %T %E'").stdout


def states(cluster: Cluster) -> list[str]:
    return cluster.run("sinfo -h -N -o %T").stdout.split()


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> bool:
    """Wait until a condition holds; Slurm tells nobody when a node has become idle."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds


def srun(cluster: Cluster, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(["srun", *words], "usera", timeout=90, env=env)


def own_lines(text: str) -> list[str]:
    """The lines of the shim."""
    return [row for row in map(plain, text.splitlines()) if row.startswith(("enclos:", "hint:"))]


class Listener:
    """Takes the agent's place on the nodes: keeps every request, answers JOIN as told, everything else with ok."""

    def __init__(self, cluster: Cluster, answer: Sequence[tuple[str, str]] | None) -> None:
        self.requests: list[dict[str, list[str]]] = []
        self.answer = answer
        self.sockets: list[socket.socket] = []
        self.held: list[socket.socket] = []
        for node in cluster.nodes:
            cluster.stop_agent(node)
            path = cluster.path_on(node, SOCKET)
            path.unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listening.bind(str(path))
            listening.listen(64)
            self.sockets.append(listening)
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.held.append(connection)
        with suppress(OSError):
            while (message := protocol.receive(connection)) is not None:
                message.close()
                self.requests.append({key: list(values) for key, values in message.values.items()})
                verb = message.get("verb")
                if verb == "join" and self.answer is None:
                    continue
                if verb == "join" and not self.answer:
                    break
                if verb != "prepare":
                    reply = self.answer if verb == "join" and self.answer else [("status", "ok")]
                    protocol.send(connection, [("version", "1"), *reply])
        connection.close()

    def verbs(self) -> list[str]:
        return [request["verb"][0] for request in self.requests]

    def steps(self, verb: str = "join") -> list[dict[str, str]]:
        """The options of each request of a verb, with the step's number."""
        found = [request for request in self.requests if request["verb"] == [verb]]
        return [
            {
                key.removeprefix("option."): value[0]
                for key, value in request.items()
                if key.startswith("option.") or key == "step"
            }
            for request in found
        ]

    def close(self) -> None:
        for one in self.sockets:
            one.shutdown(socket.SHUT_RDWR)
        for one in [*self.sockets, *self.held]:
            one.close()


NOT_FOUND = [("status", "error"), ("text", "--container-image=/x: image not found on here"), ("hint", "look there")]


@contextmanager
def listening(cluster: Cluster, answer: Sequence[tuple[str, str]] | None = tuple(NOT_FOUND)) -> Iterator[Listener]:
    """A listener in place of the agents. `answer` to JOIN: a reply; empty: end the connection; None: silence."""
    listener = Listener(cluster, answer)
    try:
        yield listener
    finally:
        listener.close()


# -- in srun ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--container-image="], "--container-image=: argument required"),
        (["--container-network=job"], "--container-network=job: needs --container-image"),
        (["--container-writable"], "--container-writable: needs --container-image"),
        (
            ["--container-image=/x", "--container-network=blue"],
            "--container-network=blue: no such network (job, host or none)",
        ),
        (
            ["--container-image=/x", "--container-readonly", "--container-writable"],
            "both --container-readonly and --container-writable were specified",
        ),
        (
            ["--container-image=/x", "--container-remap-root", "--no-container-remap-root"],
            "both --container-remap-root and --no-container-remap-root were specified",
        ),
        (
            ["--container-image=/x", "--container-mounts=/a:b"],
            "--container-mounts=/a:b: mount target must be an absolute path",
        ),
        (
            ["--container-image=/x", "--container-mounts=/a:/b,"],
            "--container-mounts=/a:/b,: invalid format: mount without a source (expected SRC:DST[:FLAGS])",
        ),
        (
            ["--container-image=/x", "--container-mounts=:/b"],
            "--container-mounts=:/b: invalid format: mount without a source (expected SRC:DST[:FLAGS])",
        ),
        (
            ["--container-image=/x", "--container-mounts=/a:/b", "--container-mounts=/c:/d"],
            "--container-mounts: specified multiple times; separate several mounts by commas",
        ),
        (
            ["--container-image=/x", "--container-unshare=net,foo"],
            "--container-unshare=net,foo: unknown namespace (net, ipc or uts)",
        ),
    ],
)
@pytest.mark.parametrize("word", ["required", "optional"])
def test_srun_refuses_at_once(cluster: Cluster, word: str, options: list[str], line: str) -> None:
    set_plugstack(cluster, word)
    jobs = job_count(cluster)
    done = srun(cluster, *options, "true")
    assert own_lines(done.stderr) == [f"enclos: {line}"]
    assert done.returncode != 0
    assert job_count(cluster) == jobs, "a job was made all the same"


# One of each kind; tests/unit/test_early.py has all of them.
REFUSED = [
    ("image=docker://Debian:12", "neither a path (/…, ./…) nor a name in a registry (docker://REGISTRY/NAME:TAG)"),
    ("mounts=/a:/b:ro+rw", "invalid format: ro and rw exclude each other"),
    ("mounts=/a\\b:/c", "invalid format: a backslash goes before a comma, a colon or a backslash"),
    ("mounts=tmpfs:/t:size=lots", "unknown flag of a mount, or no value for it"),
    ("limit=memory=8Q", "expected a size such as 512M or 8G"),
    ("limit=cpuset=3-1", "expected processors such as 0-3,8"),
    ("limit=pids=1,pids=2", "given twice"),
    ("network=Blue net", "no such network (job, host or none)"),
    ("rdma=mlx5_*", "invalid format: expected auto, none, names of RDMA devices or how many (1 to 99)"),
    ("device=acme/fpga", "invalid format: expected VENDOR/CLASS=NAME, or VENDOR/CLASS=all"),
    ("unshare=pid", "pid is not possible: tasks are started by Slurm, and no process can join a pid namespace"),
    ("name=a:sometimes", 'flag must be "auto", "create", "exec" or "no_exec"'),
    ("save=/tmp/", "target is a directory"),
    ("cgroup=all", "expected readonly or delegate"),
    ("env=A=1", "invalid format: not a list of names of variables"),
]


@pytest.mark.parametrize("command", ["srun", "sbatch", "salloc"])
def test_each_command_refuses_bad_values_at_once(cluster: Cluster, command: str) -> None:
    jobs = job_count(cluster)
    for option, words in REFUSED:
        image = [] if option.startswith("image") else ["--container-image=/x"]
        rest = ["--wrap=true"] if command == "sbatch" else ["true"]
        done = cluster.run([command, *image, f"--container-{option}", *rest], "usera")
        assert own_lines(done.stderr) == [f"enclos: --container-{option}: {words}"], option
        assert done.returncode != 0, option
    options = ["--container-image=/x", "--container-unshare=ipc,net", "--container-network=job"]
    done = cluster.run([command, *options, *rest], "usera")
    line = "enclos: --container-unshare=net: cannot be combined with --container-network=job"
    assert own_lines(done.stderr) == [line]
    done = cluster.run([command, "--container-profile=absent", *rest], "usera")
    assert [line.split(" (")[0] for line in own_lines(done.stderr)][:1] == [
        "enclos: --container-profile=absent: profile not found"
    ]
    assert done.returncode != 0
    assert job_count(cluster) == jobs, "a job was made all the same"


def test_bad_variable_is_named(cluster: Cluster) -> None:
    done = srun(cluster, "--container-image=/x", "true", ENCLOS_CONTAINER_NETWORK="blue")
    assert own_lines(done.stderr) == ["enclos: ENCLOS_CONTAINER_NETWORK=blue: no such network (job, host or none)"]
    assert done.returncode != 0
    done = srun(cluster, "--container-image=/x", "true", ENCLOS_CONTAINER_READONLY="perhaps")
    assert own_lines(done.stderr) == ["enclos: ENCLOS_CONTAINER_READONLY=perhaps: neither yes nor no"]


@pytest.mark.parametrize("command", ["srun", "sbatch", "salloc"])
def test_help_lists_the_options(cluster: Cluster, command: str) -> None:
    text = cluster.run([command, "--help"]).stdout
    header = Path(__file__).resolve().parents[2] / "spank/options.gen.h"
    names = re.findall(r'^\t\t"([a-z-]+)", ', header.read_text(), re.MULTILINE)
    assert len(names) >= 10
    assert [name for name in names if f"--{name}" not in text] == []


def set_plugstack(cluster: Cluster, word: str) -> None:
    path = cluster.layout.slurm / "plugstack.conf"
    path.write_text(re.sub(r"^(required|optional)", word, path.read_text()))


def job_count(cluster: Cluster) -> str:
    """Slurm's next job id."""
    return next(row for row in cluster.run("scontrol show config").stdout.splitlines() if "NEXT_JOB_ID" in row)


# -- what reaches the agent -------------------------------------------------------------------------------


def test_step_without_options_asks_for_nothing(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        assert srun(cluster, "-w", "n1", "true").returncode == 0
        assert wait_for(lambda: len(listener.requests) >= 2)
    assert listener.verbs() == ["job", "end"]


def test_job_has_the_facts_of_slurmctld(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        forged = {"SLURM_JOB_ACCOUNT": "root", "SLURM_NODELIST": "n9", "SLURM_JOB_NODELIST": "n9"}
        srun(cluster, "-N2", "--account=beta", "true", **forged)
        assert wait_for(lambda: len(listener.requests) >= 4)
    jobs = [request for request in listener.requests if request["verb"] == ["job"]]
    assert [request["nodelist"] for request in jobs] == [["n[1-2]"], ["n[1-2]"]]
    assert [request["account"] for request in jobs] == [["alpha"], ["alpha"]]
    assert [request["uid"] for request in jobs] == [["61001"], ["61001"]]


def test_prepare_and_join_carry_the_request(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        srun(
            cluster,
            "-wn1",
            "-n2",
            "--chdir=/shared",
            "--container-image=/x",
            "--container-mounts=/a:/b:ro,/c:/d",
            "--container-workdir=/w",
            "--container-env=ONE,TWO",
            "--container-network=none",
            "--no-container-mount-home",
            "true",
            NCCL_SOCKET_IFNAME="eth0",
            SLURM_JOB_UID="0",
            NVIDIA_VISIBLE_DEVICES="0",
            SLURM_STEP_GPUS="0,1",
        )
    prepare = next(request for request in listener.requests if request["verb"] == ["prepare"])
    joins = [request for request in listener.requests if request["verb"] == ["join"]]
    wanted = {
        "version": ["1"],
        "oldest": ["1"],
        "step": ["0"],
        "uid": ["61001"],
        "gid": ["61001"],
        "tasks": ["2"],
        "spool": ["/run/slurmd"],
        "tmpfs": ["/tmp"],
        "home": ["/home/usera"],
        "option.image": ["/x"],
        "option.mounts": ["/a:/b:ro,/c:/d"],
        "option.workdir": ["/w"],
        "option.env": ["ONE,TWO"],
        "option.network": ["none"],
        "option.mount-home": ["0"],
        "env.NCCL_SOCKET_IFNAME": ["eth0"],
        "env.NVIDIA_VISIBLE_DEVICES": ["0"],
        "gpus": [""],
    }
    if cluster.release == "22.05":  # Later, slurmd hands slurmstepd the settings, and no path of a file.
        wanted["conf"] = ["/etc/slurm/slurm.conf"]
    assert {key: prepare[key] for key in wanted} == wanted
    groups = cluster.run("id -G", "usera").stdout.split()
    assert sorted(prepare["groups"][0].split(",")) == sorted(groups)
    same = set(prepare) - {"verb", "cwd"}
    assert all({key: join[key] for key in same} == {key: prepare[key] for key in same} for join in joins)
    assert sorted(join["task"][0] for join in joins) == ["0", "1"]
    assert [join["cwd"] for join in joins] == [["/shared"], ["/shared"]]


def test_steps_inherit_and_override(cluster: Cluster) -> None:
    """Options of the allocation reach its steps; a step's own count more, also in the other form of a flag."""
    script = "srun true; srun --container-image=/own --no-container-remap-root --container-writable true"
    with listening(cluster) as listener:
        options = "-wn1 --container-image=/alloc --container-remap-root --container-readonly"
        cluster.run(f"salloc {options} bash -c '{script}'", "usera")
    assert listener.steps() == [
        {"step": "0", "image": "/alloc", "remap-root": "1", "readonly": "1"},
        {"step": "1", "image": "/own", "remap-root": "0", "writable": "1"},
    ]


def test_variables_count_less_than_options(cluster: Cluster) -> None:
    variables = {
        "PYXIS_CONTAINER_IMAGE": "/pyxis",
        "ENCLOS_CONTAINER_WORKDIR": "/ours",
        "PYXIS_CONTAINER_WORKDIR": "/pyxis",
        "ENCLOS_CONTAINER_REMAP_ROOT": "no",
        "ENCLOS_CONTAINER_READONLY": "1",
    }
    with listening(cluster) as listener:
        srun(cluster, "-wn1", "true", **variables)
        srun(cluster, "-wn1", "--export=NONE", "--container-image=/own", "--container-writable", "true", **variables)
    first = {"step": "0", "image": "/pyxis", "workdir": "/ours", "remap-root": "0", "readonly": "1"}
    second = {"step": "0", "image": "/own", "workdir": "/ours", "remap-root": "0", "writable": "1"}
    assert listener.steps() == [first, second]


@pytest.mark.parametrize("prefix", ["ENCLOS", "PYXIS"])
def test_each_option_has_its_variables(cluster: Cluster, prefix: str) -> None:
    """Each row's variable reaches the agent as the option does, and the option itself counts more."""
    values = {"mounts": "/v:/v", "env": "V", "unshare": "ipc", "network": "none", "device": "acme.com/v=v", "name": "v"}
    # readonly is the other form of writable; a profile is read by srun (test_option_profile.py).
    apart = ("readonly", "profile")
    rows = [row for row in OPTIONS if (row.env if prefix == "ENCLOS" else row.pyxis_env) and row.key not in apart]
    values = {row.key: values.get(row.key, "/v") if row.arginfo else "1" for row in rows}
    values |= {"limit": "pids=7", "rdma": "auto", "cgroup": "delegate"}
    variables = {f"{prefix}_CONTAINER_{row.key.upper().replace('-', '_')}": values[row.key] for row in rows}
    own = {"mounts": "/o:/o", "env": "O", "unshare": "uts", "network": "host", "device": "acme.com/o=o", "name": "o"}
    own = {row.key: own.get(row.key, "/o") for row in rows} | {"limit": "pids=6", "rdma": "2", "cgroup": "readonly"}
    words = [f"--{row.name}={own[row.key]}" for row in rows if row.arginfo]
    words += [f"--no-{row.name}" for row in rows if any(other.name == f"no-{row.name}" for other in OPTIONS)]
    with listening(cluster) as listener:
        srun(cluster, "-wn1", "true", **variables)
        srun(cluster, "-wn1", *words, "--container-readonly", "true", **variables)
    flags = {row.key: "1" for row in rows if not row.arginfo}
    texts = {row.key: values[row.key] for row in rows if row.arginfo}
    assert listener.steps()[0] == {"step": "0", **texts, **flags}
    negated = {row.key: "0" for row in rows if f"--no-{row.name}" in words}
    wanted = {"step": "0", "readonly": "1", **{row.key: own[row.key] for row in rows if row.arginfo}}
    wanted |= {key: value for key, value in {**flags, **negated}.items() if key != "writable"}
    assert listener.steps()[1] == wanted


def test_batch_script_is_put_into_the_container(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        done = cluster.run("sbatch -W -wn1 -o /shared/batch.out --container-image=/x --wrap=id", "usera")
    assert done.returncode != 0
    assert listener.steps() == [{"step": BATCH, "image": "/x"}]
    text = (cluster.layout.shared / "batch.out").read_text()
    assert own_lines(text) == ["enclos: --container-image=/x: image not found on here", "hint: look there"]


def test_variable_does_not_move_the_batch_script(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        job = "sbatch -W -wn1 -o /shared/out.%j --wrap='srun true; true'"
        assert cluster.run(job, "usera", env={"ENCLOS_CONTAINER_IMAGE": "/x"}).returncode == 0
    assert listener.steps() == [{"step": "0", "image": "/x"}]


def test_slurms_own_container_option(cluster: Cluster) -> None:
    with listening(cluster) as listener:
        srun(cluster, "-wn1", "--container=/own", "--container-network=none", "true")
    assert listener.steps() == [{"step": "0", "image": "/own", "network": "none"}]


def test_slurms_container_with_oci_conf_is_slurms(cluster: Cluster) -> None:
    conf = cluster.layout.slurm / "oci.conf"
    conf.write_text("RunTimeRun=/bin/false\n")
    try:
        with listening(cluster) as listener:
            srun(cluster, "-wn1", "--container=/own", "true")
    finally:
        conf.unlink()
    assert listener.steps() == []


# -- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["required", "optional"])
def test_no_agent(cluster: Cluster, word: str) -> None:
    set_plugstack(cluster, word)
    for node in cluster.nodes:
        cluster.stop_agent(node)
    done = srun(cluster, "-wn1", "-n4", "--container-image=/x", "id")
    lines = own_lines(done.stderr)
    assert len(lines) == 2
    assert re.fullmatch(
        rf"enclos: agent is not running \({SOCKET}: (no such file|connection refused)\) on n1", lines[0]
    )
    assert lines[1] == "hint: administrator: systemctl status enclosd"
    assert done.returncode == 1
    assert done.stdout == ""


@pytest.mark.parametrize("word", ["required", "optional"])
def test_refusal_is_shown_once_per_node(cluster: Cluster, word: str) -> None:
    set_plugstack(cluster, word)
    with listening(cluster):
        done = srun(cluster, "-N2", "-n6", "--container-image=/x", "id")
    assert own_lines(done.stderr) == ["enclos: --container-image=/x: image not found on here", "hint: look there"] * 2
    assert done.returncode == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([], "the agent ended while the container was being made on n1"),
        ([("version", "1"), ("fds", "net")], "cannot use the agent's answer (Bad message) on n1"),
        ([("status", "ok")], "the agent's answer has no namespaces on n1"),
    ],
)
def test_unusable_answer(cluster: Cluster, answer: list[tuple[str, str]], text: str) -> None:
    with listening(cluster, answer):
        done = srun(cluster, "-wn1", "-n3", "--container-image=/x", "id")
    hints = [] if answer else ["hint: run the step again; administrator: journalctl -u enclosd"]
    assert own_lines(done.stderr) == [f"enclos: --container-image=/x: {text}", *hints]
    assert done.returncode == 1
    assert done.stdout == ""


def test_progress_is_shown_by_the_first_task(cluster: Cluster) -> None:
    words = ["srun", "-wn1", "-n2", "--container-image=/x", "id"]
    answer = [("status", "progress"), ("text", "importing 10 %")]
    with listening(cluster, answer), cluster.popen(words, "usera") as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "enclos: importing 10 %\n"
        cluster.run("scancel -u usera")
        rest = running.stderr.read()
    assert "importing" not in rest


def test_scancel_ends_a_task_that_waits(cluster: Cluster) -> None:
    """Also under proctrack/linuxproc, which signals nothing that is called slurmstepd."""
    with listening(cluster, None) as listener:
        with cluster.popen(["srun", "-wn1", "-n2", "--container-image=/x", "id"], "usera") as running:
            assert wait_for(lambda: listener.verbs().count("join") == 2)
            began = time.monotonic()
            cluster.run("scancel -u usera")
            running.communicate(timeout=30)
        assert time.monotonic() - began < 4, "it took SIGKILL after KillWait"
        assert running.returncode != 0


@pytest.mark.parametrize("callback", ["init_post_opt", "user_init", "task_init_privileged", "task_init"])
@pytest.mark.parametrize("status", [1, -1])
def test_earlier_plugin_that_fails_lets_nothing_run_outside(
    cluster: Cluster, tmp_path: Path, callback: str, status: int
) -> None:
    """Slurm leaves later plugins out after a required one failed, and takes a positive number for success."""
    source = tmp_path / "earlier.c"
    source.write_text(BAD_PLUGIN.replace("CALLBACK", f"slurm_spank_{callback}").replace("STATUS", str(status)))
    plugin = cluster.layout.slurm / f"earlier_{callback}_{status}.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", plugin, source], check=True)
    plugstack = cluster.layout.slurm / "plugstack.conf"
    with listening(cluster):
        plugstack.write_text(f"required {plugin}\n{plugstack.read_text()}")
        done = srun(cluster, "-wn1", "--container-image=/x", "echo", "outside")
    assert done.stdout == ""
    cluster.run("scontrol update nodename=n1 state=resume")


# -- inside, with the real agent --------------------------------------------------------------------------


def inside(cluster: Cluster, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return srun(cluster, "-wn1", f"--container-image={IMAGE}", *words, **env)


def test_task_keeps_nothing_of_slurmstepd(cluster: Cluster) -> None:
    done = inside(cluster, "grep", "-E", "Cap|NoNew", "/proc/self/status")
    fields = dict(row.split(":\t") for row in done.stdout.splitlines())
    none = "0" * 16
    assert fields == {
        "CapInh": none,
        "CapPrm": none,
        "CapEff": none,
        "CapBnd": none,
        "CapAmb": none,
        "NoNewPrivs": "1",
    }


def test_descriptors_are_the_three_standard_ones(cluster: Cluster) -> None:
    bare = srun(cluster, "-wn1", "/bin/busybox", "ls", "/proc/self/fd").stdout.split()
    assert inside(cluster, "ls", "/proc/self/fd").stdout.split() == bare


def test_every_namespace_is_new_but_pid_and_time(cluster: Cluster) -> None:
    script = "for ns in cgroup ipc mnt net pid time user uts; do readlink /proc/self/ns/$ns; done"
    outside = set(srun(cluster, "-wn1", "sh", "-c", script).stdout.split())
    host = set(inside(cluster, "sh", "-c", script).stdout.split())
    assert {row.partition(":")[0] for row in host & outside} == {"net", "pid", "time"}
    own = set(inside(cluster, "--container-network=none", "sh", "-c", script).stdout.split())
    assert {row.partition(":")[0] for row in own & outside} == {"pid", "time"}


def test_tasks_share_all_but_the_cgroup_namespace(cluster: Cluster) -> None:
    script = "for ns in mnt user ipc uts cgroup; do readlink /proc/self/ns/$ns; done; sleep 1"
    rows = inside(cluster, "-n3", "sh", "-c", script).stdout.split()
    counts = {kind: len({row for row in rows if row.startswith(f"{kind}:")}) for kind in ("mnt", "user", "ipc", "uts")}
    assert counts == {"mnt": 1, "user": 1, "ipc": 1, "uts": 1}
    assert len({row for row in rows if row.startswith("cgroup:")}) == 3


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -TERM $$", 143), ("true", 0)])
def test_exit_status_is_the_programs(cluster: Cluster, script: str, status: int) -> None:
    assert inside(cluster, "sh", "-c", script).returncode == status


def test_standard_input_reaches_the_task(cluster: Cluster) -> None:
    words = ["srun", "-wn1", f"--container-image={IMAGE}", "cat"]
    assert cluster.run(words, "usera", input="one\ntwo\n").stdout == "one\ntwo\n"


def test_terminal(cluster: Cluster) -> None:
    command = f"srun -wn1 --container-image={IMAGE} --pty sh -c 'test -t 0 && echo terminal'"
    done = cluster.run(["script", "-qec", command, "/dev/null"], "usera")
    assert "terminal" in done.stdout


def test_working_directory_is_never_the_hosts(cluster: Cluster) -> None:
    assert inside(cluster, "--chdir=/shared", "pwd").stdout == "/\n"
    assert inside(cluster, "--container-workdir=/tmp", "pwd").stdout == "/tmp\n"


def test_missing_working_directory(cluster: Cluster) -> None:
    done = inside(cluster, "--container-workdir=/nowhere", "true")
    assert done.returncode == 1
    assert own_lines(done.stderr)[0].startswith("enclos: --container-workdir=/nowhere: ")
    assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize("command", ["nothere", "/bin/nothere", "./nothere"])
def test_missing_command(cluster: Cluster, command: str) -> None:
    done = inside(cluster, "-n2", command)
    assert own_lines(done.stderr) == [f"enclos: {command}: command not found in the container on n1"]
    assert done.returncode == 127
    assert "execve" not in done.stderr


def test_command_is_looked_up_inside(cluster: Cluster) -> None:
    """Along the PATH of the job, in the root file system of the image."""
    folder = cluster.layout.images / "shim/opt/only"
    folder.mkdir(parents=True)
    command = folder / "only-inside"
    command.write_text("#!/bin/sh\necho found\n")
    command.chmod(0o755)
    assert inside(cluster, "only-inside", PATH="/opt/only:/usr/bin:/bin").stdout == "found\n"


# -- TaskProlog -------------------------------------------------------------------------------------------


def test_task_prolog_runs_once_per_task_and_outside(cluster: Cluster) -> None:
    host = srun(cluster, "-wn1", "readlink", "/proc/self/ns/mnt").stdout.strip()
    script = 'echo "P=$FROM_PROLOG U=$TO_UNSET C=$SLURM_SCRIPT_CONTEXT"'
    done = inside(cluster, "-n2", "sh", "-c", script, TRY_PROLOG="1", TO_UNSET="still here")
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            f"prolog 0 {host} prolog_task",
            f"prolog 1 {host} prolog_task",
            "P=a b = c U= C=prolog_task",
            "P=a b = c U= C=prolog_task",
        ]
    )


def test_task_prolog_that_fails_ends_the_task(cluster: Cluster) -> None:
    variables = {"TRY_PROLOG": "1", "PROLOG_STATUS": "5"}
    done = inside(cluster, "echo", "ran", **variables)
    assert own_lines(done.stderr) == ["enclos: TaskProlog /etc/slurm/taskprolog: failed with status 5 on n1"]
    assert done.returncode == 5 == srun(cluster, "-wn1", "true", **variables).returncode
    assert "ran" not in done.stdout
