"""Means, percentiles and bootstrap intervals: the only arithmetic on samples that the benchmarks share. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec
import numpy as np


class Summary(msgspec.Struct, frozen=True):
    """A sample in five numbers, in the unit of the sample."""

    count: int
    mean: float
    median: float
    p95: float
    p99: float


class Estimate(msgspec.Struct, frozen=True):
    """A figure, usually the median of a sample, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of a sample lies, by linear interpolation between the two nearest ones."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(values: Sequence[float]) -> Summary | None:
    """None for an empty sample."""
    if not values:
        return None
    return Summary(len(values), fmean(values), percentile(values, 50), percentile(values, 95), percentile(values, 99))


def estimate(values: Sequence[float], num_resamples: int = 5000, seed: int = 0) -> Estimate:
    """Median and 95 % percentile bootstrap over the values, which must be independent of each other: one a prompt, not one a token."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(sample, size=(num_resamples, len(sample)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Estimate(float(np.median(sample)), float(low), float(high))


def estimate_mean_per(totals: Sequence[float], counts: Sequence[float], num_resamples: int = 5000, seed: int = 0) -> Estimate:
    """sum(totals) / sum(counts) and its 95 % percentile bootstrap over the pairs, such as loss and tokens of one answer each."""
    total, count = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(total), size=(num_resamples, len(total)))
    low, high = np.percentile(total[drawn].sum(axis=1) / count[drawn].sum(axis=1), [2.5, 97.5])
    return Estimate(float(total.sum() / count.sum()), float(low), float(high))


def estimate_difference_per(
    ones: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], num_resamples: int = 5000, seed: int = 0
) -> Estimate:
    """sum(totals) / sum(counts) of `ones` less that of `others`, and its 95 % percentile bootstrap over the pairs.

    Entries are (total, count), the i-th of both of the same prompt: what a prompt does to both of them cancels.
    """
    one, other = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(one), size=(num_resamples, len(one)))

    def per(pairs: np.typing.NDArray[np.float64]) -> np.typing.NDArray[np.float64]:
        """[..., N, 2] to [...]."""
        totals, counts = np.moveaxis(pairs.sum(axis=-2), -1, 0)
        ratios: np.typing.NDArray[np.float64] = totals / counts
        return ratios

    low, high = np.percentile(per(one[drawn]) - per(other[drawn]), [2.5, 97.5])
    return Estimate(float(per(one) - per(other)), float(low), float(high))
