"""One problem across modules against the same problem with one dense Fisher of all coordinates."""

import numpy as np
import pytest
import scipy.linalg
import torch

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.global_scope import (
    hard_filter_global,
    soft_filter_global,
    solve_global,
)
from tests.algebra.builders import dense_soft, random_core, random_diagonal, random_exact

SHAPES = {"a": (3, 4), "b": (2, 2), "c": (1, 5)}
SIZE = sum(p * q for p, q in SHAPES.values())


def fishers(count, seed):
    return {name: random_exact(count, *s, seed + i) for i, (name, s) in enumerate(SHAPES.items())}


def dense(parts):
    """F of all coordinates: the samples of all modules side by side."""
    samples = torch.cat([fisher.samples.double().flatten(1) for fisher in parts.values()], dim=1)
    return (samples.T @ samples / len(samples)).numpy()


def flatten(cores):
    return torch.cat([core.flatten() for core in cores.values()])


DELTA = {name: random_core(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize(("n_s", "n_u"), [(4, 6), (30, 40)])
@pytest.mark.parametrize("mu", [0.0, 3.0, 1e4])
def test_soft_filter_equals_dense(n_s, n_u, mu):
    safety, utility = fishers(n_s, 1), fishers(n_u, 11)
    expected = dense_soft(flatten(DELTA), dense(safety), dense(utility), mu, 0.1)
    found = soft_filter_global(DELTA, safety, utility, mu, 0.1)
    assert {name: tuple(core.shape) for name, core in found.items()} == SHAPES
    torch.testing.assert_close(flatten(found), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("n_s", "n_u"), [(4, 6), (30, 40)])
def test_gevp_and_projectors_equal_dense(n_s, n_u):
    safety, utility = fishers(n_s, 1), fishers(n_u, 11)
    s, u = dense(safety), dense(utility)
    metric = u + 0.1 * np.trace(u) / min(n_u, SIZE) * np.eye(SIZE)
    values, vectors = scipy.linalg.eigh(s, metric)
    values, vectors = values[::-1], vectors[:, ::-1]
    solution = solve_global(safety, utility, 0.1)
    found = solution.eigen.values
    np.testing.assert_allclose(found[:4], values[:4], rtol=1e-8)
    top = vectors[:, :3]
    flat = flatten(DELTA).numpy()
    expected = {
        "euclidean": top @ np.linalg.solve(top.T @ top, top.T @ flat),
        "fisher": top @ (top.T @ metric @ flat),
    }
    for projector, value in expected.items():
        once = hard_filter_global(DELTA, safety, utility, solution, 3, projector)
        np.testing.assert_allclose(flatten(once).numpy(), value, rtol=1e-6, atol=1e-9)
        twice = hard_filter_global(once, safety, utility, solution, 3, projector)
        torch.testing.assert_close(flatten(twice), flatten(once), rtol=1e-8, atol=1e-10)
    share = hard_filter_global(DELTA, safety, utility, solution, 3 / SIZE)
    np.testing.assert_allclose(flatten(share).numpy(), expected["euclidean"], rtol=1e-6, atol=1e-9)


def test_scale_between_modules_matters():
    """Module-wise Fishers are normalised each by itself; the global one as a whole."""
    safety, utility = fishers(10, 1), fishers(10, 11)
    louder = {**utility, "a": ExactFisher(utility["a"].samples * 100)}
    kept = [
        soft_filter_global(DELTA, safety, item, 10.0, 0.1)["a"].norm() for item in (utility, louder)
    ]
    assert kept[1] < kept[0]


def test_what_is_not_one_problem_is_refused():
    safety, utility = fishers(4, 1), fishers(4, 11)
    diagonal = {**utility, "b": random_diagonal(2, 2)}
    uneven = {**utility, "b": random_exact(5, 2, 2)}
    zero = {name: ExactFisher(fisher.samples * 0) for name, fisher in utility.items()}
    for item, message in (
        (diagonal, "needs exact Fishers"),
        (uneven, "same sequences"),
        (zero, "no gradient"),
    ):
        with pytest.raises(FisherError, match=message):
            soft_filter_global(DELTA, safety, item, 1.0, 0.1)
    for item, message in ((diagonal, "needs exact"), (uneven, "same seq"), (zero, "trace 0")):
        with pytest.raises(FisherError, match=message):
            solve_global(safety, item, 0.1)
