"""Charts of results as PNG files, with matplotlib where it is installed. The only importer of matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figures
from benchmarks.result import Chart

Axes = Any
"""matplotlib's, where it is installed."""
INCHES = (8.0, 3.5)
DOTS_PER_INCH = 120


def available() -> bool:
    """False where matplotlib is not installed: then there are no pictures, and nothing else is missing."""
    return importlib.util.find_spec("matplotlib") is not None


def file_name(benchmark: str, chart: Chart) -> str:
    """The picture's name, from letters and digits only."""
    return re.sub(r"[^a-z0-9]+", "-", f"{benchmark} {chart.name}".lower()).strip("-") + ".png"


def draw(benchmark: str, chart: Chart, folder: Path) -> str:
    """Draw one chart into the folder; returns its file name."""
    # By name: type checking must not need matplotlib either.
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    draw_series = _draw_spread if chart.kind == "spread" else _draw_line
    draw_series(axes, chart.series, chart.unit)
    axes.set_title(chart.title)
    name = file_name(benchmark, chart)
    figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return name


def _draw_spread(axes: Axes, series: Mapping[str, Sequence[float]], unit: str) -> None:
    """A bar from quartile to quartile per name, the median, and every sample; outliers may not squeeze the rest."""
    names = list(series)
    for place, name in enumerate(names, 1):
        figures = Figures.of(series[name])
        axes.plot([figures.q1, figures.q3], [place] * 2, color="tab:blue", linewidth=12, alpha=0.3)
        axes.plot([figures.median], [place], "|", color="black", markersize=18)
        axes.plot(series[name], [place] * len(series[name]), ".", color="tab:blue", alpha=0.4)
    everything = sorted(value for name in names for value in series[name])
    axes.set_xlim(everything[0] * 0.9, everything[int(len(everything) * 0.97)] * 1.15)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set_xlabel(unit)


def _draw_line(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> None:
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.set_xlabel("steps")
    axes.legend()
