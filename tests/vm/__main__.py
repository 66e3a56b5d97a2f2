"""`tests/vm/vm`: a shell, a command or the tests in a guest with a kernel of its own. Runs as root."""

from __future__ import annotations

import argparse
import compileall
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from enclos.runtime.cluster import image, releases
from enclos.runtime.cluster.cluster import Cluster, ClusterError

from vm import guest, kernels, rxe, verbs

ROOT = Path(__file__).resolve().parents[2]
# In a guest a feature that is missing is a failure, where the same test skips on the host; and everything takes longer.
VARIABLES = {"ENCLOS_REQUIRE": "cgroup2 rdma nfs", "ENCLOS_CLUSTER_DEADLINE": "200", "ENCLOS_PATIENCE": "6"}
EXCLUSIVE = "exclusive"
KERNEL_HELP = "which kernel (default: new); exclusive: the new one, with RDMA devices that belong to one namespace"
MARKS = {"new": "vm or vm_new", EXCLUSIVE: "vm_exclusive"}
CABLES = 4
TESTS = ("tests/kernel", "tests/cluster")


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="tests/vm/vm", description=__doc__)
    parser.add_argument("--kernel", default="new", choices=(*kernels.SUITES, EXCLUSIVE), help=KERNEL_HELP)
    parser.add_argument("--slurm", default="", metavar="RELEASE", help="Slurm of the tests' clusters (default: own)")
    parser.add_argument("--counting", action="store_true", help="the guest's clock counts instructions, not seconds")
    parser.add_argument("--cpus", type=int, default=2, help="its processors (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a guest is ended")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("shell", help="a shell in a guest; exit ends it, ctrl-A x at once")
    run = verbs.add_parser("run", help="run a command in a guest")
    run.add_argument("words", nargs=argparse.REMAINDER)
    verbs.add_parser("test", help="run pytest in a guest: on the tests marked vm, or on tests/… that follow")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.verb != "test":
        parser.error(f"unknown: {' '.join(rest)}")
    if arguments.verb == "run" and not arguments.words:
        parser.error("run: no command")
    if shutil.which(guest.QEMU) is None:
        print(f"vm: not installed: {guest.QEMU}; `make deps` installs what is needed", file=sys.stderr)
        return 1
    try:
        kernel = kernels.fetch("new" if arguments.kernel == EXCLUSIVE else arguments.kernel)
        what = [arguments.verb, arguments.kernel, *([arguments.slurm] if arguments.slurm else [])]
        folder = guest.scratch("-".join(what))
        machine = guest.Guest(kernel, folder, cpus=arguments.cpus, variables=VARIABLES, counting=arguments.counting)
        missing = _add_cards(machine) if arguments.kernel == EXCLUSIVE else ""
        status = _serve(machine, arguments, rest)
        if missing:
            print(f"vm: RDMA DEVICES THAT MOVE WERE NOT TESTED: {missing}", file=sys.stderr)
        return status
    except (kernels.KernelUnavailable, guest.FolderInUse, ClusterError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1


def _add_cards(machine: guest.Guest) -> str:
    """Cards, and the driver for them; why there is none, "" where there is: what needs it is skipped then."""
    machine.cables = CABLES
    machine.variables = VARIABLES | {"ENCLOS_RDMA": "exclusive"}
    try:
        machine.variables |= {"ENCLOS_RXE": str(rxe.module(machine.kernel))}
    except kernels.KernelUnavailable as error:
        return str(error)
    return ""


def _serve(machine: guest.Guest, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    here = f"cd {shlex.quote(str(ROOT))}; "
    if arguments.verb == "shell":
        return machine.shell(ROOT)
    if arguments.verb == "run":
        return machine.run(here + shlex.join(arguments.words), arguments.timeout)
    words = list(rest)
    mark = "vm_slurm" if arguments.slurm else MARKS.get(arguments.kernel, "vm")
    marked = _warm_up(arguments.slurm, mark)
    if not any(word.startswith("tests/") for word in words):
        words += ["-m", mark, *marked]
    if arguments.slurm:
        words += ["--slurm", arguments.slurm]
    # Nobody watches a test run; without colours and a line that is written anew, its log can be read.
    command = [".venv/bin/pytest", "--color=no", "-o", "cache_dir=/vm/cache", "--junitxml=/vm/junit.xml", *words]
    status = machine.run(f"{here}export ENCLOS_TEST_LOGS=/vm/logs; {shlex.join(command)}", arguments.timeout)
    print(f"vm: kernel {machine.kernel.release}: exit status {status}; results in {machine.folder}")
    return status


def _warm_up(release: str, mark: str) -> list[str]:
    """Make here what is slow to make in a guest, and would be lost with it; the files with tests of that mark."""
    if release not in ("", releases.own_slurm()):
        # The root of that release, and in build/releases our programs for it.
        Cluster.up("vm-warm-up", 1, release=release).down()
    for folder in ("runtime", "netns"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    for mpi in ("openmpi", "mpich"):
        image.make(mpi)
    verbs.make()
    # Collecting compiles the tests, with pytest's changes to their assertions. In a guest all files take half a minute.
    collect = [".venv/bin/pytest", "-q", "--collect-only", "-m", mark, *TESTS]
    found = subprocess.run(collect, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return list(dict.fromkeys(line.partition("::")[0] for line in found.splitlines() if "::" in line))


if __name__ == "__main__":
    sys.exit(main())
