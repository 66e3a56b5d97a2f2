"""The report of a run: report.md with tables and pictures, and a JSON file per benchmark with every sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import plots
from benchmarks.result import Result, Table


def write(results: Sequence[Result], folder: Path) -> Path:
    """Write all files; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for result in results:
        (folder / f"{result.name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
        drawn[result.name] = [plots.draw(result.name, chart, folder) for chart in result.charts if plots.available()]
    lines = ["# Benchmarks", ""]
    for result in results:
        lines += section(result, drawn[result.name])
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def section(result: Result, pictures: Sequence[str]) -> Iterator[str]:
    """One benchmark: claims first, then pictures and tables."""
    yield f"## {result.name}: {result.title}"
    yield ""
    for claim in result.claims:
        yield f"- {'kept' if claim.kept else '**missed**'}: {claim.text}; measured {claim.measured}"
    yield from (f"- {note}" for note in result.notes)
    yield ""
    yield "; ".join(f"{name} {value}" for name, value in result.machine.items())
    yield ""
    for picture in pictures:
        yield f"![{picture}]({picture})"
        yield ""
    for table in result.tables:
        yield from markdown(table)


def markdown(table: Table) -> Iterator[str]:
    """A table with its title, as Markdown."""
    yield f"**{table.title}**"
    yield ""
    yield f"| {' | '.join(table.headings)} |"
    yield f"|{'---|' + '--:|' * (len(table.headings) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in table.rows)
    yield ""
