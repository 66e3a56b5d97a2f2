"""The tour of `make demo`: the main job as a user types it, on a fresh cluster of two nodes.

Each part runs a real command, shows what it printed, and checks it: a demo that shows something else than it says ends
with a non-zero status. Runs as root; what it shows runs as usera and userb.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from enclos.runtime.cluster import image
from enclos.runtime.cluster.cluster import Cluster, ClusterError, Running
from enclos.runtime.cluster.layout import agent_command, shim_path

IMAGE = "/images/openmpi.sqsh"
CONTAINER = f"--container-image={IMAGE} --container-network=job"
MAIN_JOB = f"srun -N2 -n4 --mpi=pmix {CONTAINER}"
PORTS = {"usera": 7001, "userb": 7002}
NETCAT = "/images/openmpi/usr/bin/busybox nc"
SLURMD_PORT = 6818
REPETITIONS = 8
PROBE_DEADLINE_S = 20.0

NEXT = """\
What to type next, as root:
  {program} up --name try                   # a cluster to play with
  {program} image --name try                # puts the demo's image into its /images
  {program} shell --name try --user usera   # and there:
      {job} ring
  {program} run --name try --node n1 enclos check
  {program} down --name try"""


class DemoFailed(ClusterError):
    """A part of the demo did not show what it should."""


def show(name: str, keep: bool) -> int:
    """Run the whole tour; 0 when all was as it should be.

    Raises:
        DemoFailed: a part went wrong; its output has been printed.
        ClusterError: the cluster could not be made.
    """
    start = time.monotonic()
    if shim_path() is None or agent_command() is None:
        raise DemoFailed("the plugin or the agent is not built; `make` builds them")
    _title("A Slurm cluster of two nodes on this machine")
    Cluster.remove(name)
    cluster = Cluster.up(name, 2)
    try:
        image.install(cluster.layout.images)
        print(f"munged, slurmctld, two slurmd and two enclosd are up; image {IMAGE} has a compiled MPI program.")
        _main_job(cluster)
        _overlay_traffic(cluster)
        _two_tenants(cluster)
        _added_time(cluster)
    finally:
        if not keep:
            cluster.down()
    _title(f"Done in {time.monotonic() - start:.0f} s" + (f"; cluster {name} is still up" if keep else ""))
    print(NEXT.format(program=".venv/bin/enclos-cluster", job=MAIN_JOB))
    return 0


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _type(cluster: Cluster, user: str, line: str) -> str:
    """Show a command as the user types it, run it, show and return what it printed."""
    cluster.await_idle()
    print(f"{user}@submit$ {line}", flush=True)
    done = cluster.run(line, user=user, timeout=90)
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode != 0:
        raise DemoFailed(f"that command ended with status {done.returncode}")
    return done.stdout


def _check(truth: bool, text: str) -> None:
    if not truth:
        raise DemoFailed(text)


def _main_job(cluster: Cluster) -> None:
    _title("An MPI program on two nodes, in containers, on a network of its own")
    shown = _type(cluster, "usera", f"{MAIN_JOB} ring")
    ranks = re.findall(r"rank (\d+)  node (\S+)  address (\S+)", shown)
    _check([int(rank) for rank, _, _ in ranks] == [0, 1, 2, 3], "not all four ranks answered")
    _check({node for _, node, _ in ranks} == {"n1", "n2"}, "the ranks are not on two nodes")
    underlay = set(cluster.run("getent hosts n1 n2").stdout.split())
    _check(not underlay & {address for _, _, address in ranks}, "a rank is on the nodes' own network")


def _overlay_traffic(cluster: Cluster) -> None:
    _title("What it sends crosses the overlay (packets of the vxlan device in each container)")
    shown = _type(cluster, "usera", f"{MAIN_JOB} traffic ring")
    counts = re.findall(r"^(\S+): \S+ sent (\d+) -> (\d+) packets", shown, re.MULTILINE)
    _check(len(counts) == 2, "not both nodes showed counters")
    _check(all(int(after) - int(before) > 100 for _, before, after in counts), "nothing crossed the overlay")


@dataclass(frozen=True, slots=True)
class Tenant:
    """A user's running job, and where its service listens."""

    user: str
    job: str
    port: int
    addresses: tuple[str, ...]


def _two_tenants(cluster: Cluster) -> None:
    _title("The same job by a second user, at the same time, on the same nodes")
    with _tenant_job(cluster, "usera") as first, _tenant_job(cluster, "userb") as second:
        jobs = [_await_tenant(cluster, user) for user in PORTS]
        for tenant in jobs:
            print(f"{tenant.user}'s job {tenant.job} has the addresses {', '.join(tenant.addresses)}")
        for one, other in (jobs, reversed(jobs)):
            _own_job_answers(cluster, one)
            _other_job_does_not(cluster, one, other)
        for running in (first, second):
            out, err = running.communicate(timeout=60)
            _check(running.returncode == 0 and "all data right" in out, f"a job failed meanwhile: {out}{err}")
    print("Both jobs ran to their end meanwhile: all data right.")


@contextmanager
def _tenant_job(cluster: Cluster, user: str) -> Iterator[Running]:
    """Run the main job with a service beside it, for a while."""
    line = f"{MAIN_JOB} tenant {PORTS[user]} ring --seconds 10"
    print(f"{user}@submit$ {line} &", flush=True)
    with cluster.popen(line, user=user) as running:
        try:
            yield running
        finally:
            running.terminate()


def _in_job(cluster: Cluster, user: str, job: str, words: str) -> str:
    """Run something in a job that runs, in its container and network, on each of its nodes."""
    step = f"srun -Q --jobid={job} --overlap -N2 -n2 --ntasks-per-node=1 {CONTAINER}"
    done = cluster.run(f"{step} bash -c '{words}'", user=user, timeout=60)
    _check(done.returncode == 0, f"a step in {user}'s job failed: {done.stderr}")
    return done.stdout


def _await_tenant(cluster: Cluster, user: str) -> Tenant:
    """Wait until a user's job runs and its service answers on both nodes."""
    deadline = time.monotonic() + PROBE_DEADLINE_S
    job = ""
    while not job:
        _check(time.monotonic() < deadline, f"{user}'s job did not start")
        job = cluster.run(["squeue", "-h", "-t", "R", "-u", user, "-o", "%A"]).stdout.strip()
    ask = f"nc -w 1 $node {PORTS[user]} < /dev/null > /dev/null 2>&1"
    wait = f"for node in n1 n2; do until {ask}; do sleep 0.1; done; done"
    shown = _in_job(cluster, user, job, f"{wait}; ip -o addr show scope global")
    addresses = re.findall(r"inet6? (\S+?)/", shown)
    own = set(cluster.run("getent ahosts n1; getent ahosts n2").stdout.split())
    return Tenant(user, job, PORTS[user], tuple(sorted(set(addresses) - own)))


def _own_job_answers(cluster: Cluster, tenant: Tenant) -> None:
    """Ask the own service at each address of the job, from both nodes."""
    answer = f"for address in {' '.join(tenant.addresses)}; do nc -w 2 $address {tenant.port} < /dev/null; done"
    shown = _in_job(cluster, tenant.user, tenant.job, answer).splitlines()
    wanted = 2 * len(tenant.addresses)
    _check(shown == [f"hello from a job of {tenant.user}"] * wanted, f"{tenant.user}'s own service: {shown}")
    print(f"{tenant.user} asks the own job at these addresses, from both nodes: {wanted} of {wanted} say {shown[0]!r}")


def _other_job_does_not(cluster: Cluster, tenant: Tenant, other: Tenant) -> None:
    """Try every address of the other job, and the nodes' own, from inside the container and from outside."""
    shown = cluster.run("getent ahosts n1; getent ahosts n2").stdout
    underlay = sorted(set(re.findall(r"^(\S+)", shown, re.MULTILINE)))
    targets = " ".join([*other.addresses, *underlay])
    attempt = (
        f"for address in {targets}; do {NETCAT} -w 1 $address {other.port} < /dev/null"
        f" && echo REACHED $address || echo $address: no answer; done 2> /dev/null"
    )
    # slurmd listens on the nodes: the same attempt has to reach it there, or it proves nothing.
    control = f"{NETCAT} -w 1 $(hostname) {SLURMD_PORT} < /dev/null || exit 1; "
    inside = _in_job(cluster, tenant.user, tenant.job, attempt.replace(NETCAT, "nc"))
    attempts = [cluster.run(control + attempt, user=tenant.user, node=node) for node in cluster.nodes]
    _check(all(one.returncode == 0 for one in attempts), "the attempts on the nodes cannot reach anything")
    outside = "".join(one.stdout for one in attempts)
    tries = len(re.findall("no answer", inside + outside))
    print(f"{tenant.user} asks {other.user}'s job (port {other.port}) at {targets.replace(' ', ', ')}:")
    for place, text in (("in the container", inside), ("on the nodes, outside", outside)):
        failed = text.count("no answer")
        print(f"  {place}: {failed} of {len(text.splitlines())} attempts got no answer")
        _check(failed == len(text.splitlines()) and failed > 0, f"{tenant.user} reached {other.user}: {text}")
    _check(tries == 4 * (len(other.addresses) + len(underlay)), "an attempt is missing")


def _added_time(cluster: Cluster) -> None:
    _title("What the container adds to a step (bare and in a container by turns, in one allocation)")
    loop = f"""
step() {{ start=$(date +%s%N); srun -N2 -n4 $2 true || exit 1; echo "$1 $((($(date +%s%N) - start) / 1000))"; }}
step warm "{CONTAINER}" > /dev/null
for turn in {" ".join(map(str, range(REPETITIONS)))}; do step bare ""; step container "{CONTAINER}"; done
"""
    cluster.await_idle()
    done = cluster.run(["salloc", "-Q", "-N2", "-n4", "bash", "-c", loop], user="usera", timeout=120)
    _check(done.returncode == 0, f"the measurement failed: {done.stderr}")
    times = {"bare": list[float](), "container": list[float]()}
    for kind, microseconds in re.findall(r"^(\w+) (\d+)$", done.stdout, re.MULTILINE):
        times[kind].append(int(microseconds) / 1000)
    bare, container = (statistics.median(times[kind]) for kind in ("bare", "container"))
    print(f"srun -N2 -n4 true: {bare:.0f} ms bare, {container:.0f} ms in a container on a network of its own")
    print(f"added: {container - bare:.0f} ms (median of {REPETITIONS}; this machine runs both nodes and all daemons)")
