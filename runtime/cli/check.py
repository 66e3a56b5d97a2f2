"""`enclos check`: test whether this node can run containers, and say what to mend.

Prints a line per test; exit status 1 when something must be mended. As root it tests
everything, as a user what a user can. Nothing it makes outlives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from enclos.runtime.cli import check_kernel, check_node, check_slurm, common
from enclos.runtime.cli.finding import MEND, OK, Finding
from enclos.runtime.errors import printable


def run(arguments: list[str]) -> int:
    """Test and print."""
    parser = common.Parser(
        prog="enclos check",
        description="Test whether this node can run containers, and say what to mend. Kernel features are tested by "
        "using them, in namespaces that end with the test; as root it tests more. Each line starts with ok, mend "
        "(containers will fail until it is mended; the next line says how), note (worth knowing), or skipped (could "
        "not be tested here).",
    )
    common.add_json(parser)
    given = parser.parse_args(arguments)
    found: list[Finding] = []
    for finding in _findings():
        found.append(finding)
        if not given.json:
            print("\n".join(lines(finding)), flush=True)
    if given.json:
        common.print_json(
            {"ok": all(f.status != MEND for f in found), "findings": [asdict(f) for f in found]}
        )
    else:
        print(summary(found))
    return 1 if any(f.status == MEND for f in found) else 0


def _findings() -> Iterator[Finding]:
    yield from check_kernel.findings()
    yield from check_node.findings()
    yield from check_slurm.findings()


def lines(finding: Finding) -> list[str]:
    """A finding as printed: status, subject, text; the hint below."""
    text = f": {finding.text}" if finding.text else ""
    found = [printable(f"{finding.status:<8}{finding.subject}{text}")]
    if finding.hint and finding.status != OK:
        found.append(printable(f"{'':8}-> {finding.hint}"))
    return found


def summary(found: list[Finding]) -> str:
    """The last line."""
    counts = Counter(f.status for f in found)
    if counts[MEND]:
        return f"{counts[MEND]} to mend, {counts[OK]} ok: containers may fail on this node until then"
    return f"all {counts[OK]} ok" if counts[OK] == len(found) else f"nothing to mend, {counts[OK]} ok"
