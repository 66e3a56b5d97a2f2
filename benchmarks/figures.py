"""Figures from samples: median and spread, what one case adds to another, what stands apart. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FENCE = 3.0
"""A sample this many interquartile ranges above the upper quartile stands apart."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Five numbers of a set of samples, in the samples' unit, and how many samples there were."""

    n: int
    minimum: float
    q1: float
    median: float
    q3: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figures:
        """Raises ValueError where there is no sample."""
        if not samples:
            raise ValueError("no samples")
        ordered = sorted(samples)
        if len(ordered) == 1:
            return cls(1, *(ordered * 5))
        q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(len(ordered), ordered[0], q1, median, q3, ordered[-1])

    def cells(self, digits: int = 1) -> tuple[str, ...]:
        """The numbers as texts, in the order of HEADINGS."""
        values = (self.median, self.minimum, self.q1, self.q3, self.maximum)
        return (*(f"{value:.{digits}f}" for value in values), str(self.n))


def median_interval(samples: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The narrowest pair of samples, as far from both ends, between which the median of all lies with that probability.

    Holds for any distribution: each sample is above the median with probability one half, as a coin falls. With fewer
    than 6 samples the level of 95 % cannot be reached, and the pair is the least and the greatest.
    """
    ordered = sorted(samples)
    outside, place = 0.0, 0
    while place < len(ordered) // 2:
        outside += 2 * math.comb(len(ordered), place) / 2 ** len(ordered)
        if outside > 1 - level:
            break
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[-1 - place]


HEADINGS = ("median", "min", "q1", "q3", "max", "n")


def differences(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """Sample by sample: what `other` took more than `base` in the same round."""
    return [one - zero for zero, one in zip(base, other, strict=True)]


def standing_apart(samples: Sequence[float]) -> list[float]:
    """The samples far above the rest (FENCE), in their order; they stay in every other figure."""
    figures = Figures.of(samples)
    fence = figures.q3 + FENCE * (figures.q3 - figures.q1)
    return [sample for sample in samples if sample > fence]
