"""GEVP solvers against scipy.linalg.eigh(F_s, F_u) of dense matrices."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_lightning.algebra.eigen_fisher import EigenFisher
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.gevp import (
    choose_solver,
    held_out_values,
    solve,
    solve_dense,
    solve_dual,
    solve_kronecker,
)
from tests.algebra.builders import random_diagonal, random_exact, random_kronecker
from tests.algebra.calibration import random_ekfac


def oracle(safety, utility, epsilon):
    """λ descending and V of F_s v = λ (F_u + εI) v."""
    values, vectors = scipy.linalg.eigh(safety, utility + epsilon * np.eye(len(utility)))
    return values[::-1], vectors[:, ::-1]


def assert_solves(eigen, safety, metric, rtol=1e-8):
    """VᵀMV = I, MV = images and F_s v = λ M v."""
    identity = eigen.vectors.T @ metric @ eigen.vectors
    np.testing.assert_allclose(identity, np.eye(len(identity)), atol=rtol)
    expected = metric @ eigen.vectors
    np.testing.assert_allclose(eigen.images, expected, atol=rtol * np.abs(expected).max())
    left = safety @ eigen.vectors
    np.testing.assert_allclose(left, expected * eigen.values, atol=rtol * np.abs(left).max())
    assert np.all(np.diff(eigen.values) <= 1e-9 * eigen.values[0])


def same_projector(first, second, atol=1e-6):
    """Eigenvectors are unique up to sign; compare the spaces."""
    p, q = (np.linalg.qr(item)[0] for item in (first, second))
    np.testing.assert_allclose(p @ p.T, q @ q.T, atol=atol)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    damping=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_dense_and_dual_against_scipy(seed, counts, damping):
    safety, utility = (random_exact(n, 3, 4, seed + i) for i, n in enumerate(counts))
    s, u = safety.dense().numpy(), utility.dense().numpy()
    rank = min(counts[1], 12)
    epsilon = damping * np.trace(u) / rank
    values, vectors = oracle(s, u, epsilon)
    metric = u + epsilon * np.eye(12)
    dense = solve_dense(s, u, damping, rank)
    np.testing.assert_allclose(dense.values, values, atol=1e-10 * values[0])
    assert_solves(dense, s, metric)
    dual = solve_dual(safety.factor().numpy(), utility.factor().numpy(), damping)
    # Dual leaves out only directions without samples, where λ = 0.
    padded = np.zeros(12)
    padded[: len(dual.values)] = dual.values
    np.testing.assert_allclose(padded, values, atol=1e-9 * values[0])
    assert_solves(dual, s, metric)
    top = min(2, counts[0] - 1)
    if values[top - 1] - values[top] > 1e-3 * values[0]:
        same_projector(dual.vectors[:, :top], vectors[:, :top])


def test_dual_keeps_digits_when_safety_lies_near_the_span_of_utility():
    """docs/mathematics.md section 4: the Woodbury form loses all digits here."""
    generator = np.random.default_rng(0)
    utility = generator.normal(size=(12, 60)) * 10.0 ** (-np.arange(12)[:, None] / 3)
    safety = generator.normal(size=(8, 12)) @ utility + 1e-4 * generator.normal(size=(8, 60))
    for damping in (1e-4, 1e-7):
        epsilon = damping * np.square(utility).sum() / 12
        values, _ = oracle(safety.T @ safety, utility.T @ utility, epsilon)
        found = solve_dual(safety, utility, damping).values
        np.testing.assert_allclose(found[:8], values[:8], rtol=1e-6)


def test_kronecker_against_scipy():
    safety, utility = random_kronecker(3, 4, 1), random_kronecker(3, 4, 2)
    for damping in (1e-6, 0.1):
        root = damping**0.5
        factors = [
            f.numpy() + root * float(f.trace()) / len(f) * np.eye(len(f))
            for f in (utility.output_factor, utility.input_factor)
        ]
        metric = np.kron(*factors)
        values, _ = oracle(safety.dense().numpy(), metric, 0.0)
        eigen = solve_kronecker(safety, utility, damping)
        np.testing.assert_allclose(eigen.values, values, rtol=1e-9)
        assert_solves(eigen, safety.dense().numpy(), metric)


def test_auto_picks_by_estimator_and_size():
    few = [random_exact(3, 3, 4, seed) for seed in (0, 1)]
    many = [random_exact(30, 3, 4, seed) for seed in (0, 1)]
    assert solve(*few, 0.1).vectors.shape == (12, 6)  # dual: the span of 3 + 3 samples
    assert solve(*many, 0.1).vectors.shape == (12, 12)
    dense, dual = (solve(*few, 0.1, solver=solver) for solver in ("dense", "dual"))
    np.testing.assert_allclose(dense.values[:3], dual.values[:3], rtol=1e-8)
    diagonal = [random_diagonal(3, 4, seed) for seed in (0, 1)]
    eigen = solve(*diagonal, 1e-3)
    s, u = (f.diagonal.numpy().ravel() for f in diagonal)
    expected = np.sort(s / (u + 1e-3 * u.mean()))[::-1]
    np.testing.assert_allclose(eigen.values, expected, rtol=1e-10)
    assert solve(random_kronecker(3, 4), random_kronecker(3, 4, 1), 0.1).values.shape == (12,)


def test_ekfac_is_solved_dense_and_so_is_its_mixture():
    safety, utility = random_ekfac(3, 4, 1), random_ekfac(3, 4, 2)
    mixed = EigenFisher.mixture([0.25, 0.75], [utility, random_ekfac(3, 4, 3)])
    for fisher in (utility, mixed):
        assert choose_solver(safety, fisher, "auto") == "dense"
        s, u = safety.dense().numpy(), fisher.dense().numpy()
        epsilon = 0.1 * np.trace(u) / 12
        eigen = solve(safety, fisher, 0.1)
        np.testing.assert_allclose(eigen.values, oracle(s, u, epsilon)[0], rtol=1e-8)
        assert_solves(eigen, s, u + epsilon * np.eye(12))
        found = held_out_values(eigen.vectors, safety, fisher, 0.1)
        np.testing.assert_allclose(found, eigen.values, rtol=1e-7)


def test_held_out_values_are_rayleigh_quotients():
    fit = [random_exact(40, 2, 3, seed) for seed in (0, 1)]
    test = [random_exact(40, 2, 3, seed) for seed in (2, 3)]
    eigen = solve(*fit, 0.1)
    # On the data the vectors were made from the quotients are the eigenvalues.
    np.testing.assert_allclose(held_out_values(eigen.vectors, *fit, 0.1), eigen.values, rtol=1e-8)
    s, u = (fisher.dense().numpy() for fisher in test)
    epsilon = 0.1 * np.trace(u) / 6
    v = eigen.vectors[:, 0]
    expected = v @ s @ v / (v @ u @ v + epsilon * v @ v)
    assert held_out_values(eigen.vectors, *test, 0.1)[0] == pytest.approx(expected)
    kronecker = [random_kronecker(2, 3, seed) for seed in (0, 1)]
    found = held_out_values(eigen.vectors, *kronecker, 0.1)
    s, u = (fisher.dense().numpy() for fisher in kronecker)
    expected = v @ s @ v / (v @ u @ v + 0.1 * np.trace(u) / 6 * v @ v)
    assert found[0] == pytest.approx(expected)


def test_what_cannot_be_solved_is_refused():
    exact, kronecker = random_exact(4, 3, 4), random_kronecker(3, 4)
    zero = ExactFisher(exact.samples * 0)
    for arguments, message in (
        ((exact, kronecker, 0.1), "same estimator"),
        ((exact, random_exact(4, 4, 3), 0.1), "one core space"),
        ((exact, exact, 0.0), "damping must be positive"),
        ((kronecker, kronecker, -1.0), "damping must be positive"),
        ((exact, zero, 0.1), "utility Fisher has trace 0"),
        ((exact, exact, 0.1, "kronecker"), "'kronecker' does not work with a ExactFisher"),
        ((kronecker, kronecker, 0.1, "dual"), "'dual' does not work with a KroneckerFisher"),
        ((exact, exact, 0.1, "kronecker"), "use auto, dual or dense"),
        ((kronecker, kronecker, 0.1, "dual"), "use auto, kronecker or dense"),
        ((*[random_ekfac(3, 4)] * 2, 0.1, "dual"), "a EigenFisher: use auto or dense"),
        ((*[random_ekfac(3, 4)] * 2, 0.1, "kronecker"), "a EigenFisher: use auto or dense"),
        ((random_ekfac(3, 4), kronecker, 0.1), "same estimator"),
        ((exact, exact, 0.1, "woodbury"), "unknown solver 'woodbury'"),
    ):
        with pytest.raises(FisherError, match=message):
            solve(*arguments)
