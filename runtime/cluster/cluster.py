"""A trial cluster as one object: bring it up, run commands on it, take it down.

The order of events is `Cluster.up`; what each step does is in nodes.py, daemons.py, slurm.py and users.py. Runs as
root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from enclos.runtime.cluster import cgroups, daemons, nodes, releases, slurm, users
from enclos.runtime.cluster.layout import (
    DEFAULT_NAME,
    SUBMIT,
    Layout,
    Record,
    base,
    node_names,
    programs_path,
    shim_path,
)
from enclos.runtime.cluster.processes import Process, pids_in

# As Debian leaves it on a machine that is in nobody's DNS: its name leads to no address of an interface.
LAPTOP_HOSTS = "127.0.0.1 localhost\n127.0.1.1 n1\n::1 localhost\n"


class ClusterError(RuntimeError):
    """What a person gets to read: the cluster cannot be made or used, and why."""


class Running(subprocess.Popen[str]):
    """A command on a machine of the cluster. Signals go to the command, not to the nsenter that waits for it.

    As a context it waits for the command's end; an exception ends the command first, which might never end by itself.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
            # Where it had not begun yet, only nsenter was there.
            super().send_signal(signal.SIGKILL)
        super().__exit__(kind, error, trace)

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command itself; one that is gone is fine."""
        command = self.command()
        if command is not None:
            command.send(sig)

    def command(self) -> Process | None:
        """The command's process, as the caller's pid namespace sees it; None before it starts and after its end."""
        if self.poll() is not None:
            return None
        with suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return Process.of_pid(int(children[0])) if children else None
        return None


@dataclass(slots=True)
class Cluster:
    """A cluster that is up. Pids it takes and gives are those of the caller's pid namespace.

    Inside, each machine has a pid namespace of its own: a pid that a command on a node prints is not a pid here.
    `host_pid` translates.
    """

    layout: Layout
    record: Record

    # -- life ---------------------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        nodes_count: int = 2,
        cpus: int = 8,
        *,
        slurm_conf_extra: str = "",
        plugstack: str = "required",
        config: str = "",
        release: str = "",
        cgroup_conf_extra: str = "",
        gpu_files: str = "",
        slurm_files: Mapping[str, str] | None = None,
        with_slurm: bool = True,
    ) -> Cluster:
        """Bring a cluster up, or mend one of that name that is up.

        Args:
            name: of the cluster; others of another name are not touched.
            nodes_count: how many nodes.
            cpus: what each node tells Slurm it has.
            slurm_conf_extra: rows for slurm.conf; they replace ours of the same name.
            plugstack: `required` or `optional`, the word in plugstack.conf.
            config: text of enclos.yaml, the same on each node.
            slurm_files: texts of files beside slurm.conf, by name; they replace ours, such as cgroup.conf.
            release: of Slurm, as `24.11`; "" for the machine's own. The first cluster of another one makes its root,
                which takes a minute.
            cgroup_conf_extra: rows for cgroup.conf, which constrains nothing otherwise.
            gpu_files: device files that Slurm takes for GPUs, as `/dev/x[0-3]`.
            with_slurm: without it the machines run nothing but agents, and have neither programs nor files of Slurm.

        Raises:
            ClusterError: not root, a tool is missing, or something did not start.
        """
        try:
            root = releases.find(release)
        except releases.ReleaseError as error:
            raise ClusterError(str(error)) from error
        _check_host(name, own=root is None)
        layout = Layout(name)
        with _locked():
            found = cls._find(layout)
            if found is not None and found.is_whole():
                if release and found.release != release:
                    raise ClusterError(f"cluster {name} is up with Slurm {found.release}; take it down first")
                found.mend()
                return found
            _remove(layout)
            record = Record(nodes=nodes_count, cpus=cpus, plugstack=plugstack, slurm=root.slurm if root else "")
            record.with_slurm = with_slurm
            settings = slurm.SlurmSettings(
                nodes_count,
                cpus,
                slurm_conf_extra,
                record.slurm or releases.own_slurm(),
                cgroups.available(),
                cgroup_conf_extra,
                gpu_files,
            )
            try:
                _write_files(layout, record, settings, config, root.path if root else Path("/"))
                for file, text in (slurm_files or {}).items():
                    (layout.slurm / file).touch(0o600 if file.endswith(".key") else 0o644)
                    (layout.slurm / file).write_text(text)
                return cls._make(layout, record, root)
            except (RuntimeError, OSError) as error:
                _remove(layout)
                raise ClusterError(str(error)) from error

    @classmethod
    def _make(cls, layout: Layout, record: Record, root: releases.Root | None) -> Cluster:
        names = node_names(record.nodes)
        system = root.path if root else None
        control = nodes.start_control(layout, system, with_slurm=record.with_slurm)
        record.machines[SUBMIT] = control
        record.save(layout)
        if root is not None:
            nodes.run_script(control, releases.build_script(root), f"build for Slurm {root.slurm}")
        started = nodes.start_nodes(layout, control, names, system, with_slurm=record.with_slurm)
        record.machines.update(zip(names, started, strict=True))
        record.save(layout)
        nodes.connect(control, started, names)
        cluster = cls(layout, record)
        cluster.mend()
        if record.with_slurm:
            cluster._await_nodes()
        return cluster

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> Cluster:
        """The cluster of that name that is up already; ClusterError when there is none."""
        found = cls._find(Layout(name))
        if found is None or not found.is_whole():
            raise ClusterError(f"no cluster {name} is up; `enclos-cluster up --name {name}` makes one")
        return found

    @classmethod
    def _find(cls, layout: Layout) -> Cluster | None:
        record = Record.load(layout)
        return cls(layout, record) if record is not None else None

    def is_whole(self) -> bool:
        """True while the submit host and all nodes exist; daemons are another matter."""
        wanted = [SUBMIT, *self.nodes]
        return all(name in self.record.machines and self.record.machines[name].is_alive() for name in wanted)

    def mend(self) -> None:
        """Start the daemons that do not run, in the order in which they need each other."""
        control = self.record.machines[SUBMIT]
        if self.record.with_slurm and not self.runs("munged"):
            munged = self.keep("munged", daemons.start_munged(self.layout, control))
            socket = self.layout.munge / "socket"
            log = self.layout.log(SUBMIT, "munged")
            daemons.await_ready(lambda: daemons.accepts(socket), munged, log, "munged")
        if self.record.with_slurm and not self.runs("slurmctld"):
            self.keep("slurmctld", daemons.start_slurmctld(self.layout, control))
        for node in self.nodes:
            if not self.runs(f"{node}.enclosd"):
                self._start_agent(node)
        # The agent has to hold the VXLAN port before a user's process can run on the node.
        for node in self.nodes:
            self._await_agent(node)
        for node in self.nodes:
            if self.record.with_slurm and not self.runs(f"{node}.slurmd"):
                self.keep(f"{node}.slurmd", daemons.start_slurmd(self.layout, node, self.record.machines[node]))

    def down(self) -> None:
        """Take the cluster down; what it left is gone when this returns."""
        Cluster.remove(self.name)

    @staticmethod
    def remove(name: str) -> None:
        """Take a cluster of that name down, in whatever state it is; none is fine."""
        with _locked():
            _remove(Layout(name))

    def _await_nodes(self) -> None:
        """Wait until slurmctld has heard from all nodes.

        A job submitted earlier would wait for slurmctld's next round of scheduling, which is seconds away.
        """
        slurmctld = self._daemon("slurmctld")
        log = self.layout.log(SUBMIT, "slurmctld")
        daemons.await_ready(self._are_idle, slurmctld, log, "a node")

    def _are_idle(self) -> bool:
        """Whether all nodes can take jobs; DaemonFailed when one's slurmd has ended, which slurmctld never hears of."""
        for node in self.nodes:
            if not self.runs(f"{node}.slurmd"):
                tail = daemons.log_tail(self.layout.log(node, "slurmd"))
                raise daemons.DaemonFailed(f"slurmd on {node} ended while starting: {tail}")
        return self._states() == ["idle"] * self.record.nodes

    def _states(self) -> list[str]:
        return self.run(["sinfo", "-h", "-N", "-o", "%T"], timeout=20).stdout.split()

    def await_idle(self, timeout: float = 30) -> None:
        """Wait until no job runs or completes.

        Slurm starts nothing on a node where a job is completing: a step right after another on all nodes is told to
        wait ("queued and waiting for resources").

        Raises:
            TimeoutError: a job is still there.
        """
        deadline = time.monotonic() + timeout
        while left := self.run(["squeue", "-h", "-o", "%A %t"], timeout=20).stdout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs still there after {timeout:g} s: {left.strip()}")
            time.sleep(0.02)

    # -- daemons ------------------------------------------------------------------------------------------

    def keep(self, key: str, process: Process) -> Process:
        """Record a daemon that was started."""
        self.record.daemons[key] = process
        self.record.save(self.layout)
        return process

    def runs(self, key: str) -> bool:
        """Whether a daemon that was recorded is alive."""
        process = self.record.daemons.get(key)
        return process is not None and process.is_alive()

    def _start_agent(self, node: str) -> None:
        agent = daemons.start_agent(self.layout, node, self.record.machines[node], self.record.slurm)
        if agent is not None:
            self.keep(f"{node}.enclosd", agent)

    def _await_agent(self, node: str) -> None:
        agent = self.record.daemons.get(f"{node}.enclosd")
        if agent is not None:
            socket = self.path_on(node, "/run/enclos/agent.sock")
            log = self.layout.log(node, "enclosd")
            daemons.await_ready(lambda: daemons.accepts(socket), agent, log, f"the agent on {node}")

    def agent_pid(self, node: str) -> int:
        """The agent's pid; ClusterError when none runs."""
        return self._daemon(f"{node}.enclosd").pid

    def slurmd_pid(self, node: str) -> int:
        """slurmd's pid; ClusterError when none runs."""
        return self._daemon(f"{node}.slurmd").pid

    def _daemon(self, key: str) -> Process:
        process = self.record.daemons.get(key)
        if process is None or not process.is_alive():
            raise ClusterError(f"{key} does not run")
        return process

    def stop_agent(self, node: str, number: int = signal.SIGTERM) -> None:
        """Send the agent of a node a signal and wait for its end; one that does not run is fine."""
        process = self.record.daemons.get(f"{node}.enclosd")
        if process is not None:
            process.send(number)
            process.wait(timeout=10)

    def start_agent(self, node: str) -> None:
        """Start the agent of a node and wait until it serves; one that runs is fine."""
        if not self.runs(f"{node}.enclosd"):
            self._start_agent(node)
        self._await_agent(node)

    def restart_agent(self, node: str, number: int = signal.SIGTERM) -> None:
        """Stop the agent of a node by a signal, then start it."""
        self.stop_agent(node, number)
        self.start_agent(node)

    def agent_log(self, node: str) -> str:
        """What the agent wrote so far."""
        return _text(self.layout.log(node, "enclosd"))

    def slurmd_log(self, node: str) -> str:
        """What slurmd and its slurmstepds wrote so far."""
        return _text(self.layout.log(node, "slurmd"))

    def slurmctld_log(self) -> str:
        """What slurmctld wrote so far."""
        return _text(self.layout.log(SUBMIT, "slurmctld"))

    # -- machines -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def release(self) -> str:
        """Which Slurm it runs, as `24.11`."""
        return self.record.slurm or releases.own_slurm()

    @property
    def programs(self) -> Path:
        """The folder with `enclos`, `enclosd` and their Python, at the same path on every machine."""
        return programs_path(self.record.slurm)

    @property
    def nodes(self) -> list[str]:
        return node_names(self.record.nodes)

    def machine(self, node: str | None = None) -> Process:
        """The first process of a node, or of the submit host."""
        try:
            return self.record.machines[node or SUBMIT]
        except KeyError:
            raise ClusterError(f"no machine {node}; there are {SUBMIT} and {', '.join(self.nodes)}") from None

    def node_pid(self, node: str | None = None) -> int:
        """Pid of the first process of a node (or of the submit host): its namespaces are in /proc/PID/ns."""
        return self.machine(node).pid

    def namespaces(self, node: str | None = None) -> Mapping[str, str]:
        """The namespaces of a machine as the kernel names them, by kind (pid, net, mnt, uts, ipc)."""
        return nodes.namespaces(self.machine(node))

    def path_on(self, node: str | None, path: str) -> Path:
        """A path of a machine as the caller can open it."""
        return Path(f"/proc/{self.node_pid(node)}/root") / path.lstrip("/")

    def processes(self, node: str | None = None) -> list[int]:
        """Pids of a node's processes, those in containers included: none of them can leave the pid namespace."""
        return sorted(set(pids_in(self.namespaces(node)["pid"])) - {self.node_pid(node)})

    def host_pid(self, node: str | None, pid: int) -> int:
        """Translate a pid that a command on a machine printed; ProcessLookupError when it is gone."""
        for candidate in self.processes(node):
            with suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{candidate}/status").read_text(errors="replace")
                row = next(row for row in status.splitlines() if row.startswith("NSpid:"))
                if int(row.split()[-1]) == pid:
                    return candidate
        raise ProcessLookupError(f"no process {pid} on {node or SUBMIT}")

    # -- commands -----------------------------------------------------------------------------------------

    def command(
        self, words: str | Sequence[str], user: str = "root", node: str | None = None, cwd: str | None = None
    ) -> tuple[list[str], dict[str, str]]:
        """The words and the environment that run something on a machine; a plain text is for bash.

        Nothing of ours stays in between but nsenter, which waits: right for measuring, too.
        """
        inner = ["bash", "-c", words] if isinstance(words, str) else list(words)
        environment = daemons.root_environment(self.record.slurm)
        become: list[str] = []
        if user != "root":
            try:
                person = users.user(user)
            except KeyError:
                known = ", ".join(one.name for one in users.USERS)
                raise ClusterError(f"no user {user}; there are root, {known}") from None
            environment |= {"HOME": person.home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash"}
            become = ["setpriv", f"--reuid={person.uid}", f"--regid={person.uid}", "--init-groups"]
        place = ["env", "-C", cwd or environment["HOME"]]
        return [*nodes.enter_command(self.machine(node)), *become, *place, *inner], environment

    def run(
        self,
        words: str | Sequence[str],
        user: str = "root",
        node: str | None = None,
        *,
        input: str | None = None,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it printed; a non-zero exit is no exception.

        Raises:
            subprocess.TimeoutExpired: it was still running after `timeout` seconds, and was killed.
        """
        with self.popen(words, user, node, env=env, cwd=cwd, stdin=subprocess.PIPE) as running:
            try:
                out, err = running.communicate(input, timeout)
            except subprocess.TimeoutExpired:
                # Not communicate() again: an orphan of the command may hold the pipes open.
                running.kill()
                raise
            return subprocess.CompletedProcess(words, running.returncode, out, err)

    def popen(
        self,
        words: str | Sequence[str],
        user: str = "root",
        node: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> Running:
        """Start a command; signals sent through the result reach the command itself."""
        command, environment = self.command(words, user, node, cwd)
        return Running(
            command, env={**environment, **(env or {})}, stdin=stdin, stdout=stdout, stderr=stderr, text=True
        )

    def execute(self, words: Sequence[str], user: str = "root", node: str | None = None) -> None:
        """Become a command on a machine: does not return. The terminal is the caller's."""
        command, environment = self.command(words, user, node)
        os.execvpe(command[0], command, environment)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


@contextmanager
def _locked() -> Iterator[None]:
    """One `up` or `down` at a time on this machine; the lock leaves no file."""
    base().mkdir(parents=True, exist_ok=True)
    folder = os.open(base(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
        with suppress(OSError):
            base().rmdir()


def _check_host(name: str, *, own: bool) -> None:
    if os.geteuid() != 0:
        raise ClusterError("the trial cluster makes namespaces and mounts: run it as root")
    if not name or len(name) > 40 or not name.replace("-", "").replace("_", "").isalnum():
        raise ClusterError(f"--name={name}: letters, digits, - and _ only, at most 40")
    tools = ["ip", "nsenter", "unshare", "setpriv", "pivot_root"]
    tools += ["munged", "slurmctld", "slurmd", "srun"] if own else []
    path = daemons.SBIN
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        raise ClusterError(f"not installed: {', '.join(missing)}; `make deps` installs what is needed")


def _write_files(layout: Layout, record: Record, settings: slurm.SlurmSettings, config: str, system: Path) -> None:
    """Everything the machines read, before the first of them exists."""
    layout.create([SUBMIT, *node_names(record.nodes)])
    users.make_homes(layout.homes)
    shim = shim_path(record.slurm)
    texts = {
        layout.slurm / "slurm.conf": slurm.slurm_conf(layout, settings),
        layout.slurm / "cgroup.conf": slurm.cgroup_conf(settings),
        layout.slurm / "mpi.conf": slurm.MPI_CONF,
        layout.slurm / "gres.conf": slurm.gres_conf(settings),
        layout.slurm / "plugstack.conf": slurm.plugstack_conf(str(shim) if shim else None, record.plugstack),
        layout.slurm / "job_submit.lua": slurm.job_submit_lua(users.USERS),
        layout.state / "passwd": users.passwd((system / "etc/passwd").read_text()),
        layout.state / "group": users.group((system / "etc/group").read_text()),
        layout.state / "hosts": slurm.hosts(record.nodes) if record.with_slurm else LAPTOP_HOSTS,
    }
    texts |= {layout.node_etc(machine) / "enclos.yaml": config for machine in [SUBMIT, *node_names(record.nodes)]}
    for path, text in texts.items():
        path.write_text(text)


def _remove(layout: Layout) -> None:
    """End every process of a cluster and remove its folder.

    The first process of the submit host is enough: the kernel ends all others of its pid namespace with it. The
    cookie finds it also when the record was lost, or `up` was killed before it could write one.
    """
    if not layout.state.exists():
        return
    record = Record.load(layout)
    inits = set(nodes.find_stray_inits(layout)) | set(record.machines.values() if record else [])
    for init in inits:
        init.send(signal.SIGKILL)
    for init in inits:
        init.wait(timeout=20)
    cgroups.remove(layout.name)
    shutil.rmtree(layout.state)


def clusters() -> list[str]:
    """The names of all clusters that have a state directory."""
    return sorted(entry.name for entry in base().iterdir()) if base().is_dir() else []
