"""The command `enclos-cluster`: the trial cluster for people, from the shell."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from enclos.runtime.cluster import mpi_matrix as mpi_matrix_page
from enclos.runtime.cluster import registry as registries
from enclos.runtime.cluster.cluster import Cluster, ClusterError, clusters
from enclos.runtime.cluster.demo import show
from enclos.runtime.cluster.image import ImageError, install
from enclos.runtime.cluster.layout import DEFAULT_NAME, SUBMIT
from enclos.runtime.cluster.releases import SUITES, ReleaseError

NEXT = """\
next:
  enclos-cluster run{name} --user usera srun -N2 -n4 hostname
  enclos-cluster shell{name} --user usera
  enclos-cluster down{name}"""


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand per verb."""
    top = argparse.ArgumentParser(
        prog="enclos-cluster", description="A real Slurm cluster on this machine, to try Enclos."
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default=DEFAULT_NAME, help="which cluster (default: %(default)s)")
    where = argparse.ArgumentParser(add_help=False, parents=[common])
    where.add_argument("--user", default="root", help="root, usera or userb (default: %(default)s)")
    where.add_argument("--node", default=None, help=f"on which machine (default: the {SUBMIT} host)")
    up = verbs.add_parser("up", parents=[common], help="bring a cluster up; harmless when it is")
    up.add_argument("--nodes", type=int, default=2, help="number of nodes (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=8, help="CPUs each node tells Slurm it has (default: %(default)s)")
    up.add_argument("--slurm-conf-extra", type=Path, metavar="FILE", help="rows for slurm.conf; they replace ours")
    up.add_argument("--plugstack", choices=("optional", "required"), default="required", help="word in plugstack.conf")
    up.add_argument("--slurm", default="", metavar="RELEASE", help=f"{', '.join(SUITES)} (default: own)")
    up.add_argument("--config", type=Path, metavar="ENCLOS_YAML", help="enclos.yaml of all nodes (default: empty)")
    up.add_argument("--gpu-files", default="", metavar="FILES", help="device files to be GPUs for Slurm: /dev/x[0-3]")
    up.add_argument("--without-slurm", action="store_true", help="machines with nothing of Slurm, for 'enclos run'")
    verbs.add_parser("down", parents=[common], help="take it down and remove all it made; harmless when it is down")
    verbs.add_parser("status", parents=[common], help="what runs")
    run = verbs.add_parser("run", parents=[where], help="run a command on the cluster")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD", help="the command and its arguments")
    verbs.add_parser("shell", parents=[where], help="an interactive shell on the cluster")
    image = verbs.add_parser("image", parents=[common], help="put the demo's image into /images of a cluster")
    image.add_argument(
        "--mpi", choices=("openmpi", "mpich"), default="openmpi", help="which MPI (default: %(default)s)"
    )
    verbs.add_parser("registry", parents=[common], help="run a registry on the submit host, with the demo's image")
    matrix = verbs.add_parser("mpi-matrix", help="run each MPI of each Debian on each Slurm, and write what works")
    matrix.add_argument("page", type=Path, help="the file to write: docs/mpi-matrix.md")
    matrix.add_argument("--name", default="mpi-matrix", help="name of its clusters (default: %(default)s)")
    tour = verbs.add_parser("demo", help="the tour that `make demo` gives, on a fresh cluster of two nodes")
    tour.add_argument("--name", default="demo", help="name of its cluster (default: %(default)s)")
    tour.add_argument("--keep", action="store_true", help="leave the cluster up (as DEMO_KEEP=1)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; errors are one line."""
    try:
        try:
            options = parser().parse_args(arguments)
            return int(VERBS[options.verb](options))
        except (ClusterError, ImageError, ReleaseError) as error:
            print(f"enclos-cluster: {error}", file=sys.stderr)
            return 1
        finally:  # --help leaves by SystemExit.
            if sys.stdout is not None:  # It was closed by whoever started this.
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 1


def up(options: argparse.Namespace) -> int:
    """Bring it up and say what to type next."""
    if options.nodes < 1 or options.cpus < 1:
        raise ClusterError("--nodes and --cpus must be 1 or more")
    cluster = Cluster.up(
        options.name,
        options.nodes,
        options.cpus,
        slurm_conf_extra=_read(options.slurm_conf_extra),
        plugstack=options.plugstack,
        config=_read(options.config),
        gpu_files=options.gpu_files,
        release=options.slurm,
        with_slurm=not options.without_slurm,
    )
    if options.without_slurm:
        print(f"machines without Slurm are up: {', '.join(cluster.nodes)}")
        print(f"next: enclos-cluster shell --name {cluster.name} --user usera --node n1; enclos run IMAGE")
        return 0
    print(f"cluster {cluster.name} is up: {', '.join(cluster.nodes)}, Slurm {cluster.release}")
    print(NEXT.format(name="" if cluster.name == DEFAULT_NAME else f" --name {cluster.name}"))
    return 0


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error


def down(options: argparse.Namespace) -> int:
    """Take it down."""
    Cluster.remove(options.name)
    return 0


def status(options: argparse.Namespace) -> int:
    """Print machines, daemons and Slurm's own view; non-zero when something does not run."""
    try:
        cluster = Cluster.attach(options.name)
    except ClusterError:
        others = ", ".join(clusters()) or "none"
        raise ClusterError(f"cluster {options.name} is down (clusters: {others})") from None
    dead = 0
    for name, process in [*cluster.record.machines.items(), *cluster.record.daemons.items()]:
        alive = process.is_alive()
        dead += not alive
        print(f"{name:16} {'runs, pid ' + str(process.pid) if alive else 'ended'}")
    print(f"{'logs':16} {cluster.layout.logs}")
    print(cluster.run(["sinfo", "-N", "-l"]).stdout, end="")
    return 1 if dead else 0


def run(options: argparse.Namespace) -> int:
    """Become the command, so that nothing of ours is between the caller and its exit status."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise ClusterError("run: a command is needed")
    Cluster.attach(options.name).execute(words, options.user, options.node)
    return 0


def shell(options: argparse.Namespace) -> int:
    """Become an interactive shell."""
    Cluster.attach(options.name).execute(["bash", "-i"], options.user, options.node)
    return 0


def image(options: argparse.Namespace) -> int:
    """Make the image, put it where all nodes see it, and tell its path there."""
    placed = install(Cluster.attach(options.name).layout.images, options.mpi)
    print(f"/images/{placed.squashfs.name}")
    return 0


def registry(options: argparse.Namespace) -> int:
    """Run the registry, put the demo's image into it, and tell its reference."""
    cluster = Cluster.attach(options.name)
    registries.start(cluster)
    print(registries.push_demo_image(cluster))
    return 0


def demo(options: argparse.Namespace) -> int:
    """Show the main job."""
    keep = options.keep or os.environ.get("DEMO_KEEP", "") not in ("", "0")
    return show(options.name, keep)


def mpi_matrix(options: argparse.Namespace) -> int:
    """Make the page."""
    mpi_matrix_page.write(options.page, options.name)
    print(options.page)
    return 0


VERBS = {
    "mpi-matrix": mpi_matrix,
    "image": image,
    "registry": registry,
    "demo": demo,
    "up": up,
    "down": down,
    "status": status,
    "run": run,
    "shell": shell,
}

if __name__ == "__main__":
    sys.exit(main())
