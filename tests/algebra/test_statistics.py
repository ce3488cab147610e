"""Intervals against scipy; the tax and the comparison at equal safety against closed forms."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sst_lightning.algebra.statistics import (
    FREE_REFERENCE,
    NO_COMMON_SAFETY,
    NOT_SIGNIFICANT,
    UNBOUNDED,
    ZERO_REFERENCE,
    Curve,
    bootstrap_mean,
    bootstrap_ratio_of_sums,
    compare_at_equal_safety,
    paired_difference,
    pareto_front,
    safety_tax,
    wilson_interval,
)


@given(st.integers(1, 300), st.floats(0, 1))
def test_wilson_equals_scipy(n, share):
    successes = round(share * n)
    interval = wilson_interval(successes, n)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert interval.value == successes / n
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)


def test_no_examples_is_undefined_not_a_number():
    for interval in (wilson_interval(0, 0), bootstrap_mean(np.zeros(0))):
        assert interval.value is interval.low is interval.high is None
        assert interval.note


def test_bootstrap_of_a_mean_is_close_to_scipys():
    scores = np.random.default_rng(1).gamma(2.0, size=60)
    interval = bootstrap_mean(scores)
    expected = scipy.stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    width = expected.high - expected.low
    assert interval.value == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(expected.low, abs=0.06 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.06 * width)


def test_bootstrap_of_a_ratio_of_sums_is_close_to_scipys():
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 30, 80).astype(float)
    nll = tokens * rng.gamma(3.0, size=80)
    interval = bootstrap_ratio_of_sums(nll, tokens)
    expected = scipy.stats.bootstrap(
        (nll, tokens),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = expected.high - expected.low
    assert interval.value == pytest.approx(nll.sum() / tokens.sum())
    assert interval.low == pytest.approx(expected.low, abs=0.08 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.08 * width)


def test_pairing_removes_what_examples_have_in_common():
    base = np.random.default_rng(3).normal(size=50) * 100
    interval = paired_difference(base + 1, base)
    assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1))


def rates(n, *shares):
    return [np.arange(n) < round(share * n) for share in shares]


def tax_of(utility, utility_reference, safety, safety_reference, safety_adapter):
    values = (utility, utility_reference, safety, safety_reference, safety_adapter)
    return safety_tax(*(np.asarray(value, dtype=np.float64) for value in values))


def test_tax_is_the_originals_quotient():
    merged, reference, adapter = rates(200, 0.8, 0.2, 1.0)
    tax = tax_of(np.full(50, 0.54), np.full(50, 0.6), merged, reference, adapter)
    assert tax.utility_drop_rate.value == pytest.approx(0.1)
    assert tax.safety_gain_rate.value == pytest.approx(3.0)
    assert tax.safety_tax.value == pytest.approx(0.1 / 3)
    assert tax.safety_tax_absolute.value == pytest.approx(0.06 / 0.6)
    assert tax.alignment_drift.value == pytest.approx(0.2)
    for interval in vars(tax).values():
        assert interval.low <= interval.value <= interval.high
    assert tax.safety_tax.low < tax.safety_tax.high


def test_tax_is_undefined_where_the_gain_is_not_significant():
    merged, reference, adapter = rates(40, 0.225, 0.2, 1.0)
    tax = tax_of(np.full(50, 0.5), np.full(50, 0.6), merged, reference, adapter)
    for interval in (tax.safety_tax, tax.safety_tax_absolute):
        assert (interval.value, interval.low, interval.high) == (None, None, None)
        assert interval.note == NOT_SIGNIFICANT
    assert tax.utility_drop_rate.value == pytest.approx(1 / 6)


def test_tax_is_undefined_not_negative_where_safety_fell():
    """A loss of utility divided by a loss of safety would look like a bargain."""
    merged, reference, adapter = rates(100, 0.2, 0.8, 1.0)
    tax = tax_of(np.full(50, 0.5), np.full(50, 0.6), merged, reference, adapter)
    assert tax.safety_tax.value is tax.safety_tax_absolute.value is None
    assert "fell" in tax.safety_tax.note
    assert tax.safety_gain_rate.value == pytest.approx(-0.75)


def test_only_the_absolute_tax_exists_where_the_reference_refuses_nothing():
    merged, reference, adapter = rates(100, 0.5, 0.0, 1.0)
    tax = tax_of(np.full(50, 0.5), np.full(50, 0.6), merged, reference, adapter)
    for interval in (tax.safety_tax, tax.safety_gain_rate):
        assert interval.value is None
        assert interval.note == ZERO_REFERENCE
    assert tax.safety_tax_absolute.value == pytest.approx(0.2)


def test_a_gain_over_almost_nothing_has_no_finite_interval():
    """Where the reference refuses 1 of 32, a third of the resamples have none at all."""
    merged, reference, adapter = rates(32, 0.6, 1 / 32, 1.0)
    tax = tax_of(np.ones(9), np.ones(9), merged, reference, adapter)
    assert tax.safety_gain_rate.value is None
    assert tax.safety_gain_rate.note == UNBOUNDED
    assert tax.safety_tax_absolute.value == 0


def test_drift_is_undefined_where_the_safety_adapter_refuses_nothing():
    merged, reference, adapter = rates(100, 0.5, 0.1, 0.0)
    drift = tax_of(np.ones(9), np.ones(9), merged, reference, adapter).alignment_drift
    assert drift.value is None
    assert drift.note == ZERO_REFERENCE


def test_zero_utility_of_the_reference_is_undefined():
    merged, reference, adapter = rates(100, 0.9, 0.1, 1.0)
    tax = tax_of(np.zeros(9), np.zeros(9), merged, reference, adapter)
    assert tax.utility_drop_rate.value is tax.safety_tax.value is None


def test_an_empty_set_of_attacks_is_undefined():
    tax = tax_of(np.ones(9), np.ones(9), [], [], [])
    assert tax.safety_tax.value is tax.safety_gain_rate.value is None


def curve(alphas, safety, cost, over, n=40):
    """Examples all alike, so that every resample has the closed form's value."""
    alphas = np.asarray(alphas, dtype=np.float64)[:, None]
    ones = np.ones((1, n))
    return Curve(safety(alphas) * ones, cost(alphas) * ones, np.ones(n), over(alphas) * ones)


def test_a_method_at_a_fifth_of_the_cost_has_ratio_a_fifth():
    """Same safety as a function of α, a fifth of the cost; grids of α differ."""

    def make(alphas, factor, over):
        return curve(alphas, lambda a: a, lambda a: factor * a, lambda a: over * a)

    equal = compare_at_equal_safety(make([0, 0.3, 1.0], 0.2, 0.1), make([0, 0.5, 0.9], 1.0, 0.3))
    ratio = equal.cost_ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.2, 0.2, 0.2))
    # a is uniform on the common levels up to 0.9 (20 of them): costs differ by −0.8 a, over-refusal
    # by −0.2 a.
    mean_level = 0.9 * np.linspace(0, 1, 21)[1:].mean()
    assert equal.cost_difference.value == pytest.approx(-0.8 * mean_level)
    assert equal.over_refusal_difference.value == pytest.approx(-0.2 * mean_level)


def test_cost_is_compared_at_equal_safety_not_at_equal_alpha():
    """The method reaches the same safety at twice the α: at equal α it would look cheaper."""
    method = curve([0, 1, 2], lambda a: a / 2, lambda a: a / 2, lambda a: 0 * a)
    reference = curve([0, 0.5, 1], lambda a: a, lambda a: a, lambda a: 0 * a)
    assert compare_at_equal_safety(method, reference).cost_ratio.value == pytest.approx(1.0)


def test_without_common_safety_nothing_is_defined():
    flat = curve([0, 1], lambda a: 0 * a, lambda a: a, lambda a: 0 * a)
    rising = curve([0, 1], lambda a: a, lambda a: a, lambda a: 0 * a)
    equal = compare_at_equal_safety(flat, rising)
    for interval in (equal.cost_ratio, equal.cost_difference, equal.over_refusal_difference):
        assert interval.value is None
        assert interval.note == NO_COMMON_SAFETY


def test_against_a_free_reference_only_the_ratio_is_undefined():
    rising = curve([0, 1], lambda a: a, lambda a: a, lambda a: 0 * a)
    free = curve([0, 1], lambda a: a, lambda a: 0 * a, lambda a: 0 * a)
    equal = compare_at_equal_safety(rising, free)
    assert equal.cost_ratio.value is None
    assert equal.cost_ratio.note == FREE_REFERENCE
    assert equal.cost_difference.value == pytest.approx(np.linspace(0, 1, 21)[1:].mean())
    reverse = compare_at_equal_safety(free, rising)
    assert reverse.cost_ratio.value == 0
    assert reverse.over_refusal_difference.value == 0


def test_weights_of_rows_are_their_tokens():
    """Row 2 has nine of ten tokens and the whole difference."""
    safety = np.array([[0.0] * 4, [1.0] * 4])
    over = np.zeros((2, 4))
    weight = np.array([1.0, 9.0])
    costs = [np.array([[0.0, 0.0], [1.0, 9.0 * factor]]) for factor in (0.0, 1.0)]
    method, reference = (Curve(safety, cost, weight, over) for cost in costs)
    assert compare_at_equal_safety(method, reference).cost_ratio.value == pytest.approx(0.1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_equals_brute_force(points):
    cost, gain = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    expected = [
        not any((c <= a and g >= b) and (c < a or g > b) for c, g in points) for a, b in points
    ]
    assert pareto_front(cost, gain).tolist() == expected


def test_same_seed_same_interval():
    scores = np.random.default_rng(5).normal(size=30)
    assert bootstrap_mean(scores, seed=1) == bootstrap_mean(scores, seed=1)
    assert bootstrap_mean(scores, seed=1) != bootstrap_mean(scores, seed=2)
    assert math.isfinite(bootstrap_mean(scores[:1]).high)
