"""What a benchmark gives back: tables, charts and claims as data. Printing them as plain text is here, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import HEADINGS, Figures


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts; the first cell of each is its name."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of_samples(cls, title: str, samples: Mapping[str, Sequence[float]], digits: int = 1) -> Table:
        """A row of figures per set of samples; empty sets are left out."""
        rows = [(name, *Figures.of(values).cells(digits)) for name, values in samples.items() if values]
        return cls(title, ("", *HEADINGS), tuple(rows))

    def lines(self) -> list[str]:
        """Plain text in columns."""
        widths = [max(len(row[place]) for row in (self.headings, *self.rows)) for place in range(len(self.headings))]
        out = [self.title]
        for row in (self.headings, *self.rows):
            cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            out.append("  " + "  ".join((f"{row[0]:<{widths[0]}}", *cells)).rstrip())
        return out


@dataclass(frozen=True, slots=True)
class Claim:
    """What is promised, what was measured, and whether that is kept."""

    text: str
    measured: str
    kept: bool

    def line(self) -> str:
        return f"{'kept' if self.kept else 'MISSED'}: {self.text}; measured {self.measured}"


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture to draw: `spread` shows samples by name, `line` y over x by name."""

    kind: str
    name: str
    title: str
    unit: str
    series: Mapping[str, Any]


@dataclass(slots=True)
class Result:
    """Everything that one benchmark found. `data` holds the samples themselves, as JSON can have them."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        """The result as plain text."""
        yield f"== {self.name}: {self.title}"
        yield "; ".join(f"{name} {value}" for name, value in self.machine.items())
        for table in self.tables:
            yield ""
            yield from table.lines()
        yield ""
        yield from self.notes
        yield from (claim.line() for claim in self.claims)
