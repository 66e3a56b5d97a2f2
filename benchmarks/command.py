"""The command line that the benchmarks share, when one runs alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from benchmarks.result import Result


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few samples: does it run at all")
    made.add_argument("--json", action="store_true", help="the samples, for programs")
    return made


def need_root() -> None:
    """End with a line where the caller is not root."""
    if os.geteuid() != 0:
        sys.exit("benchmarks: need root, they make namespaces")


def finish(result: Result, options: argparse.Namespace) -> int:
    """Print; 0 if all claims are kept, else 1."""
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        print("\n".join(result.lines()))
    return 0 if all(claim.kept for claim in result.claims) else 1
