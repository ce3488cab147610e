"""Entries of a record's ``metrics``: a figure with its interval, or a tested difference."""

from collections.abc import Sequence
from typing import Any

from sst_lightning.algebra.paired import compare_paired
from sst_lightning.algebra.statistics import (
    Array,
    Interval,
    bootstrap_ratio_of_sums,
    mean_interval,
)

SUMMED = {name: f"{name}_count" for name in ("nll", "nll_per_byte", "nll_per_word")}
"""Metrics that are ratios of sums, and the score that holds their denominators."""


def to_json(interval: Interval) -> dict[str, Any]:
    """Return the entry of a record's ``metrics``."""
    entry: dict[str, Any] = {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
    }
    return entry | ({"note": interval.note} if interval.note else {})


def value_interval(scores: Array, sizes: Array | None, clusters: Sequence[str]) -> Interval:
    """Return Σ scores / Σ sizes, or the mean of the scores, with its interval.

    Args:
        scores: (n,).
        sizes: denominators of a ratio of sums, (n,); none of a mean.
        clusters: (n,), "" being a cluster of its own.
    """
    if sizes is None:
        return mean_interval(scores, clusters=clusters)
    return bootstrap_ratio_of_sums(scores, sizes, clusters=clusters)


def tested_difference(
    scores: Array, reference: Array, sizes: Array | None, clusters: Sequence[str]
) -> dict[str, Any]:
    """Return the entry of a paired difference, with the p-value ``p`` of its test where there is one.

    Args:
        scores: (n,).
        reference: of the other model on the same examples, (n,).
        sizes: as of :func:`value_interval`.
        clusters: likewise.
    """
    interval, test = compare_paired(scores, reference, sizes, clusters)
    return to_json(interval) | ({"p": test.p} if interval.value is not None else {})
