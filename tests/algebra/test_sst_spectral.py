"""SST on a spectral merge against a dense transcription: full-width merge, full Fishers, a solve."""

import numpy as np
import pytest
import torch

from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.methods import (
    MergeProblem,
    SSTSpectral,
    SubspaceBoosting,
    TSVMerge,
)
from tests.algebra.builders import random_lora
from tests.algebra.calibration import assert_same, calibrated, deltas, three_adapters
from tests.algebra.test_spectral import dense_tsv

NAMES = ("layers.0.q_proj", "layers.1.down_proj")


def dense_boosted(total, rank, beta=0.5):
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    s = s[:rank]
    cut = next(value for k, value in enumerate(s) if s[: k + 1].sum() >= beta * s.sum())
    return u[:, :rank] @ np.diag(np.maximum(s, cut)) @ vt[:rank]


def dense_fisher(gradients):
    """Mean of g gᵀ, divided by its mean eigenvalue."""
    rows = gradients.reshape(len(gradients), -1)
    fisher = rows.T @ rows / len(rows)
    return fisher / (np.trace(fisher) / len(fisher))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize("spectral", ["tsv_merge", "subspace_boosting"])
def test_equals_the_formula_on_dense_matrices(spectral, weights):
    adapters, alpha, mu, rho = three_adapters(), 0.7, 5.0, 0.2
    problem, rows = calibrated(adapters, "exact", weights)
    method = SSTSpectral(spectral, mu=mu, rho=rho)
    merged = deltas(method.merge(problem, alpha))
    for name, basis in problem.space.bases.items():
        own = [
            w * adapter.factors[name].delta().numpy()
            for w, adapter in zip((*weights, alpha), adapters, strict=True)
        ]
        ranks = [adapter.factors[name].rank for adapter in adapters]
        if spectral == "tsv_merge":
            without, whole = dense_tsv(own[:2], ranks[:2]), dense_tsv(own, ranks)
        else:
            without = dense_boosted(own[0] + own[1], sum(ranks[:2]))
            whole = dense_boosted(sum(own), sum(ranks))
        q_out, q_in = basis.q_out.double().numpy(), basis.q_in.double().numpy()
        change = q_out.T @ (whole - without) @ q_in
        f_u, f_s = (dense_fisher(side[name].core_gradients(basis)) for side in rows)
        near = f_s + rho * np.eye(len(f_s))
        kept = np.linalg.solve(near + mu * f_u, near @ change.ravel()).reshape(change.shape)
        expected = without + q_out @ kept @ q_in.T
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("spectral", "plain"),
    [("tsv_merge", TSVMerge()), ("subspace_boosting", SubspaceBoosting(0.5))],
)
def test_a_filter_that_keeps_everything_leaves_the_spectral_merge(spectral, plain):
    problem, _ = calibrated(three_adapters(), "exact")
    found = deltas(SSTSpectral(spectral, mu=0.0).merge(problem, 0.7))
    assert_same(found, deltas(plain.merge(problem, 0.7)))


@pytest.mark.parametrize("spectral", ["tsv_merge", "subspace_boosting"])
def test_a_filter_that_keeps_nothing_leaves_the_spectral_merge_of_the_utility_adapters(spectral):
    """F_u of full rank and a huge μ."""
    problem, _ = calibrated(three_adapters(), "exact", counts=(200, 5))
    found = deltas(SSTSpectral(spectral, mu=1e9).merge(problem, 0.7))
    assert_same(found, deltas(SSTSpectral(spectral).merge(problem, 0.0)), atol=5e-4)
    plain = TSVMerge() if spectral == "tsv_merge" else SubspaceBoosting(0.5)
    assert_same(found, deltas(plain.merge(problem, 0.0)), atol=5e-4)


def test_without_safety_a_module_has_the_spectral_merge_of_the_utility_adapters():
    adapters = three_adapters()
    without = deltas(TSVMerge().merge(calibrated(adapters, "exact")[0], 0.0))
    adapters[-1] = random_lora(3, rank=3, names=NAMES[:1])
    merged = deltas(SSTSpectral().merge(calibrated(adapters, "exact")[0], 1.0))
    torch.testing.assert_close(merged[NAMES[1]], without[NAMES[1]], rtol=0, atol=1e-5)
    assert not torch.allclose(merged[NAMES[0]], without[NAMES[0]], atol=1e-2)


def test_one_utility_adapter_is_itself_without_safety():
    first, _, safety = three_adapters()
    problem, _ = calibrated([first, safety], "exact")
    found = deltas(SSTSpectral().merge(problem, 0.0))
    assert_same(found, {name: item.delta() for name, item in first.factors.items()})


def test_without_fishers_it_says_so():
    problem, _ = calibrated(three_adapters(), "exact")
    bare = MergeProblem(problem.space, problem.adapters)
    with pytest.raises(FisherError, match="no Fisher for module"):
        SSTSpectral().merge(bare, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spectral": "iso"}, "one of tsv_merge, subspace_boosting"),
        ({"mu": -1.0}, "mu must be"),
        ({"rho": 0.0}, "rho must be"),
        ({"iterations": -1}, "iterations must be"),
        ({"estimator": "exakt"}, "estimator must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SSTMergeError, match=message):
        SSTSpectral(**arguments)


def test_label_says_what_differs():
    assert SSTSpectral().label() == "sst_spectral"
    found = SSTSpectral("subspace_boosting", mu=30.0, estimator="kfac").label()
    assert found == "sst_spectral_subspace_boosting_mu_30_kfac"
