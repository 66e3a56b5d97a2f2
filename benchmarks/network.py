"""Entries for 10,000 peers, as a benchmark of the report: runs peers.py in a process of its own.

peers.py moves its whole process into a network namespace of its own, which no other benchmark wants.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benchmarks import command, machine
from benchmarks.result import Chart, Claim, Result, Table

NAME = "peers"
TITLE = "one namespace gets the entries for its peers"
PEERS, QUICK_PEERS = 10_000, 1_000
ROUNDS, QUICK_ROUNDS = 7, 3
LIMIT_MS = 500.0
WHOLE = "create"


def run(quick: bool = False) -> Result:
    """The claim is about 10,000 peers; with `quick` there are fewer, and a share of the time."""
    peers, rounds = (QUICK_PEERS, QUICK_ROUNDS) if quick else (PEERS, ROUNDS)
    result = Result(NAME, TITLE, machine=machine.describe())
    words = [sys.executable, "-m", "benchmarks.peers", "--json", "--peers", str(peers), "--rounds", str(rounds)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"benchmarks.peers ended with {done.returncode}")
    found = json.loads(done.stdout)
    samples = {name: [1e3 * value for value in values] for name, values in found["seconds"].items()}
    result.tables.append(Table.of_samples(f"{peers} peers: ms", samples))
    limit = LIMIT_MS * peers / PEERS
    for name in (name for name in samples if name.startswith(WHOLE)):
        median = statistics.median(samples[name])
        text = f"{peers} peers, {name}: at most {limit:g} ms"
        result.claims.append(Claim(text, f"{median:.0f} ms (median)", median <= limit))
    result.charts.append(Chart("spread", "parts", f"{peers} peers", "ms", samples))
    result.data["ms"] = samples
    result.machine["load average after"] = machine.load()
    return result


def main() -> int:
    """0 if the claims are kept, else 1."""
    options = command.parser(__doc__).parse_args()
    command.need_root()
    return command.finish(run(options.quick), options)


if __name__ == "__main__":
    sys.exit(main())
