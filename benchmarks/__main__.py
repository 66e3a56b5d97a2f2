"""Run all benchmarks, or those named, one after the other, and write a report.

    sudo .venv/bin/python -m benchmarks [NAME…] [--quick] [--output FOLDER]

Plain numbers go to stdout as each benchmark ends; report.md, JSON and pictures to build/benchmarks. Needs root.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import agent, command, files, imports, launch, network, rdma, report
from benchmarks.result import Claim, Result

FOLDER = Path("build/benchmarks")
BENCHMARKS: dict[str, tuple[str, Callable[[bool], Result]]] = {
    launch.NAME: (launch.TITLE, lambda quick: launch.run(quick=quick)),
    agent.NAME: (agent.TITLE, lambda quick: agent.run(quick=quick)),
    network.NAME: (network.TITLE, lambda quick: network.run(quick=quick)),
    imports.NAME: (imports.TITLE, lambda quick: imports.run(quick=quick)),
    files.NAME: (files.TITLE, lambda quick: files.run(quick=quick)),
    rdma.NAME: (rdma.TITLE, lambda quick: rdma.run(quick=quick)),
}


def parser() -> argparse.ArgumentParser:
    """The command line; --help lists the benchmarks."""
    rows = "\n".join(f"  {name:10} {title}" for name, (title, _) in BENCHMARKS.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"benchmarks:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    made.add_argument("--quick", action="store_true", help="few samples: does it run at all")
    made.add_argument("--output", type=Path, default=FOLDER, help="folder of the report (default: %(default)s)")
    return made


def run(names: Sequence[str], quick: bool) -> list[Result]:
    """The results in the order of the names. One that fails does not keep the others from running."""
    results = []
    for name in names:
        title, benchmark = BENCHMARKS[name]
        try:
            result = benchmark(quick)
        except Exception as error:
            traceback.print_exception(error)
            claim = Claim("it runs to its end", f"{type(error).__name__}: {error}", False)
            result = Result(name, title, claims=[claim])
        print("\n".join(result.lines()), end="\n\n", flush=True)
        results.append(result)
    return results


def main() -> int:
    """0 if every benchmark ran and every claim is kept, else 1."""
    made = parser()
    options = made.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        made.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    command.need_root()
    results = run(options.names or list(BENCHMARKS), options.quick)
    print(f"report: {report.write(results, options.output)}")
    return 0 if all(claim.kept for result in results for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
