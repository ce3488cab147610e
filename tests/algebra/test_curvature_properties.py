"""What every method of the curvature family must do, whatever its formula."""

from dataclasses import replace

import numpy as np
import pytest

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.methods import SST, SSTSpectral, SubspaceBoosting
from sst_lightning.algebra.methods.curvature import FisherAveraging, RegMean
from sst_lightning.algebra.methods.published import SSTPublished
from tests.algebra.builders import random_lora
from tests.algebra.calibration import (
    assert_same,
    calibrated,
    deltas,
    make_rows,
    refactored,
    scaled,
    silenced,
    three_adapters,
)

METHODS = [
    *(FisherAveraging(estimator=name) for name in ("exact", "kfac", "ekfac", "diagonal", "vila")),
    RegMean(),
    SSTPublished(k=20),
    SST(estimator="ekfac"),
    SST(estimator="vila"),
    SSTSpectral(),
    SSTSpectral("subspace_boosting", estimator="diagonal"),
]
IDS = [method.label() for method in METHODS]
NAMES = ("layers.0.q_proj", "layers.1.down_proj")


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_order_of_the_utility_adapters_does_not_matter(method):
    first, second, safety = three_adapters()
    found = [
        deltas(method.merge(calibrated(order, method.estimator)[0], 0.7))
        for order in ([first, second, safety], [second, first, safety])
    ]
    assert_same(*found, atol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_result_does_not_depend_on_the_factorisation(method):
    others = [refactored(adapter, seed) for seed, adapter in enumerate(three_adapters())]
    found = [
        deltas(method.merge(calibrated(given, method.estimator)[0], 0.7))
        for given in (three_adapters(), others)
    ]
    assert_same(*found, atol=2e-3)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_merge_scales_with_the_adapters(method):
    """With the same Fishers; the regularisation of SSTPublished is absolute, so it must be tiny."""
    if isinstance(method, SSTPublished):
        method = SSTPublished(k=20, regularization=1e-30)
    problem, _ = calibrated(three_adapters(), method.estimator)
    larger = replace(problem, adapters=[scaled(adapter, 3.0) for adapter in problem.adapters])
    found, expected = deltas(method.merge(larger, 0.7)), deltas(method.merge(problem, 0.7))
    assert_same(found, {name: 3 * delta for name, delta in expected.items()}, atol=5e-4)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_zero_utility_adapter_is_neutral(method):
    """The utility adapters are one model, their weighted sum: a zero adds nothing to an average."""
    first, second, safety = three_adapters()
    found = [
        deltas(method.merge(calibrated(given, method.estimator)[0], 0.7))
        for given in ([first, safety], [first, silenced(second), safety])
    ]
    assert_same(*found)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_single_adapter(method):
    """An additive method returns it; an average weighs it against the safety model's ΔW = 0."""
    utility, safety = random_lora(1), silenced(random_lora(2, rank=3))
    problem, _ = calibrated([utility, safety], method.estimator)
    merged = deltas(method.merge(problem, 0.7))
    expected = {name: factors.delta() for name, factors in utility.factors.items()}
    if isinstance(method, SSTSpectral) and method.spectral == "subspace_boosting":
        # Boosting changes a single adapter too.
        expected = deltas(SubspaceBoosting(0.5).merge(problem, 0.0))
    if isinstance(method, SST | SSTPublished | SSTSpectral):
        assert_same(merged, expected)
        return
    assert_same(deltas(method.merge(problem, 0.0)), expected)
    for name, basis in problem.space.bases.items():
        utility_core = problem.module(name, 0.7).utility_core()
        core = basis.q_out.T.double() @ merged[name] @ basis.q_in.double()
        assert 0 < float(core.norm()) < 1.5 * float(utility_core.norm())
        assert float((core - utility_core).norm()) > 1e-2 * float(utility_core.norm())
    # Twice the same model is that model, at any weight.
    twice, _ = calibrated([utility, utility], method.estimator)
    assert_same(deltas(method.merge(twice, 0.7)), expected)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_module_that_one_side_lacks(method):
    """An absent adapter counts as ΔW = 0."""
    utility, safety = random_lora(1), random_lora(2, rank=3, names=NAMES[:1])
    zero = silenced(random_lora(4, rank=1, names=NAMES[1:]))
    padded = type(safety)({**safety.factors, **zero.factors})
    found = [
        deltas(method.merge(calibrated(given, method.estimator)[0], 0.7))
        for given in ([utility, safety], [utility, padded])
    ]
    assert_same(*found)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_module_without_difference_needs_no_fisher(method):
    """Where the models agree (here: safety absent and utility zero) a Fisher may be zero."""
    utility = random_lora(1)
    silent = {NAMES[1]: silenced(utility).factors[NAMES[1]]}
    utility = type(utility)({**utility.factors, **silent})
    problem, _ = calibrated([utility, random_lora(2, names=NAMES[:1])], method.estimator)
    zero = {
        name: {NAMES[0]: fishers[NAMES[0]], NAMES[1]: fishers[NAMES[1]].scaled(0.0)}
        for name, fishers in (("u", problem.fisher_utility), ("s", problem.fisher_safety))
    }
    given = replace(problem, fisher_utility=zero["u"], fisher_safety=zero["s"])
    assert not deltas(method.merge(given, 0.7))[NAMES[1]].any()


def test_rows_know_their_core_gradients():
    """The oracle of this file: accumulators and the sequence-by-sequence sum agree."""
    space = CoreSpace.from_adapters(three_adapters())
    rows = make_rows(space)[0][NAMES[0]]
    basis = space.bases[NAMES[0]]
    samples = rows.fisher(basis, "exact").samples
    np.testing.assert_allclose(samples.numpy(), rows.core_gradients(basis), rtol=0, atol=1e-4)
