"""Accumulators against autograd: a two-layer network with an explicit core parameter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_lightning.algebra.accumulators import make_accumulator
from sst_lightning.algebra.core import CoreBasis
from sst_lightning.algebra.errors import FisherError
from tests.algebra.builders import generator, random_factors

ESTIMATORS = ["exact", "kfac", "ekfac", "diagonal", "vila"]
D_IN, D_OUT, LENGTHS = 7, 9, (5, 3, 6, 1)
BASIS = CoreBasis.from_factors([random_factors(seed=1), random_factors(seed=2, rank=1)])
WEIGHT = torch.randn(D_OUT, D_IN, generator=generator(3), dtype=torch.float64)
HEAD = torch.randn(4, D_OUT, generator=generator(4), dtype=torch.float64)
SEQUENCES = [
    torch.randn(length, D_IN, generator=generator(10 + length), dtype=torch.float64)
    for length in LENGTHS
]


def loss(output):
    """A summed sequence loss in which tokens interact, as attention makes them."""
    hidden = torch.tanh(output @ HEAD.T)
    return (hidden.cumsum(0) * hidden.flip(0)).exp().log1p().sum()


def gradient(sequence):
    """∂loss/∂M by autograd, (p, q)."""
    core = torch.zeros(BASIS.shape, dtype=torch.float64, requires_grad=True)
    delta = BASIS.q_out.double() @ core @ BASIS.q_in.double().T
    return torch.autograd.grad(loss(sequence @ (WEIGHT + delta).T), core)[0]


def projected(sequence):
    """P and R as the hooks hand them over: fp32, from the module's input and output gradient."""
    output = (sequence @ WEIGHT.T).requires_grad_(True)
    delta = torch.autograd.grad(loss(output), output)[0]
    return sequence.float() @ BASIS.q_in, delta.float() @ BASIS.q_out


def batches(sizes, extra_padding=0):
    """(P, R) batches of the given sizes, right padded with zeros."""
    pairs = [projected(sequence) for sequence in SEQUENCES]
    start = 0
    for size in sizes:
        part = pairs[start : start + size]
        start += size
        length = max(len(p) for p, _ in part) + extra_padding
        yield tuple(
            torch.stack(
                [
                    torch.nn.functional.pad(pair[i], (0, 0, 0, length - len(pair[i])))
                    for pair in part
                ]
            )
            for i in (0, 1)
        )


def collect(estimator, sizes=(4,), extra_padding=0):
    accumulator = make_accumulator(estimator)
    for inputs, gradients in batches(sizes, extra_padding):
        accumulator.update(inputs, gradients)
    return accumulator


GRADIENTS = torch.stack([gradient(sequence) for sequence in SEQUENCES])


def test_exact_samples_are_autograd_gradients_of_the_core():
    fisher = collect("exact").finish()
    assert fisher.count == len(LENGTHS)
    torch.testing.assert_close(fisher.samples.double(), GRADIENTS, rtol=1e-4, atol=1e-4)
    flat = GRADIENTS.flatten(1).numpy()
    expected = sum(np.outer(g, g) for g in flat) / len(flat)
    np.testing.assert_allclose(fisher.dense(), expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_diagonal_is_the_mean_squared_gradient():
    fisher = collect("diagonal").finish()
    assert fisher.count == len(LENGTHS)
    torch.testing.assert_close(fisher.diagonal, GRADIENTS.square().mean(0), rtol=1e-3, atol=1e-4)


def test_vila_is_the_variance_of_the_gradient():
    fisher = collect("vila").finish()
    assert fisher.count == len(LENGTHS)
    expected = GRADIENTS.numpy().var(axis=0)
    torch.testing.assert_close(fisher.diagonal, torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
    assert bool((fisher.diagonal < collect("diagonal").finish().diagonal).all())


def test_vila_of_equal_gradients_is_zero_and_never_negative():
    accumulator = make_accumulator("vila")
    # In fp64, because sums of fp32 squares would be exact.
    inputs, gradients = (x[None].double() / 3 for x in projected(SEQUENCES[0]))
    for _ in range(10):
        accumulator.update(inputs, gradients)
    total, squares, count = accumulator.state()
    assert bool((squares / count < (total / count).square()).any())  # by rounding
    diagonal = accumulator.finish().diagonal
    assert bool((diagonal >= 0).all())
    assert float(diagonal.max()) < 1e-12 * float(GRADIENTS.square().max())


def test_vila_of_one_sequence_is_refused():
    accumulator = make_accumulator("vila")
    accumulator.update(*(x[None] for x in projected(SEQUENCES[0])))
    with pytest.raises(FisherError, match="at least 2 calibration rows"):
        accumulator.finish()


def test_ekfac_is_the_fishers_diagonal_in_the_eigenbasis_of_kfac():
    """U_G, U_A by numpy, v_ij = E[(U_Gᵀ g U_A)_ij²] one sequence at a time."""
    fisher, kfac = collect("ekfac").finish(), collect("kfac").finish()
    outputs = np.linalg.eigh(kfac.output_factor.numpy())[1]
    inputs = np.linalg.eigh(kfac.input_factor.numpy())[1]
    values = np.mean([np.square(outputs.T @ g @ inputs) for g in GRADIENTS.numpy()], axis=0)
    basis = np.kron(outputs, inputs)
    expected = basis @ np.diag(values.ravel()) @ basis.T
    np.testing.assert_allclose(fisher.dense(), expected, rtol=1e-3, atol=1e-4 * expected.max())
    assert fisher.count == len(LENGTHS)
    assert fisher.trace() == pytest.approx(float(GRADIENTS.square().sum()) / 4, rel=1e-4)


def test_ekfac_is_nearer_to_the_fisher_than_kfac():
    """George et al. 2018: the best diagonal in that basis, and K-FAC is one of them."""
    exact, kfac, ekfac = (collect(name).finish().dense() for name in ("exact", "kfac", "ekfac"))
    assert float((exact - ekfac).norm()) < float((exact - kfac).norm())


def test_ekfac_keeps_no_samples():
    fisher = collect("ekfac").finish()
    p, q = BASIS.shape
    assert fisher.output_basis.shape == (1, p, p)
    assert fisher.input_basis.shape == (1, q, q)
    assert fisher.values.shape == (1, p, q)


def test_kronecker_factors_are_second_moments_of_tokens():
    fisher = collect("kfac").finish()
    pairs = [projected(sequence) for sequence in SEQUENCES]
    inputs = torch.cat([p for p, _ in pairs]).double()
    outputs = torch.cat([r for _, r in pairs]).double()
    torch.testing.assert_close(fisher.input_factor, inputs.T @ inputs / len(LENGTHS))
    torch.testing.assert_close(fisher.output_factor, outputs.T @ outputs / sum(LENGTHS))
    assert fisher.count == len(LENGTHS)


def test_kronecker_is_the_exact_fisher_of_one_single_token():
    inputs, gradients = (x[None] for x in projected(SEQUENCES[-1]))
    assert inputs.shape[1] == 1
    parts = {}
    for estimator in ("exact", "kfac", "ekfac"):
        accumulator = make_accumulator(estimator)
        accumulator.update(inputs, gradients)
        parts[estimator] = accumulator.finish().dense()
    torch.testing.assert_close(parts["kfac"], parts["exact"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(parts["ekfac"], parts["exact"], rtol=1e-5, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    estimator=st.sampled_from(ESTIMATORS),
    sizes=st.sampled_from([(1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (4,)]),
    extra_padding=st.integers(0, 3),
)
def test_batch_size_and_padding_do_not_matter(estimator, sizes, extra_padding):
    expected = collect(estimator).finish().dense()
    found = collect(estimator, sizes, extra_padding).finish().dense()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_processes_add_up_sums_and_counts(estimator):
    """Ranks with 1, 3 and no sequences give what one process gives (not a mean of means)."""
    states = []
    parts = list(batches((1, 3)))
    for part in [[parts[0]], [parts[1]], []]:
        accumulator = make_accumulator(estimator)
        for inputs, gradients in part:
            accumulator.update(inputs, gradients)
        states.append(accumulator.state())
    for order in (states, states[::-1]):
        joined = make_accumulator(estimator)
        joined.load_states(order)
        fisher = joined.finish()
        assert fisher.count == len(LENGTHS)
        torch.testing.assert_close(fisher.dense(), collect(estimator).finish().dense())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_calibration_set_and_bad_gradients_are_refused(estimator):
    with pytest.raises(FisherError, match="calibration set is empty"):
        make_accumulator(estimator).finish()
    accumulator = collect(estimator)
    accumulator.update(
        torch.ones(1, 2, BASIS.shape[1]), torch.full((1, 2, BASIS.shape[0]), torch.nan)
    )
    with pytest.raises(FisherError, match="NaN or infinite"):
        accumulator.finish()


def test_unknown_estimator_is_refused():
    with pytest.raises(FisherError, match="'full': use exact, kfac, ekfac, diagonal, vila"):
        make_accumulator("full")


def test_kronecker_sums_are_accurate_over_many_batches():
    """Products in fp32, sums in fp64: as near the fp64 oracle as one product is."""
    source = generator(5)
    accumulator = make_accumulator("kfac")
    expected = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for _ in range(400):
        # Token norms over four orders of magnitude, as gradients have.
        scale = 10 ** (4 * torch.rand(3, 40, 1, generator=source) - 2)
        inputs = torch.randn(3, 40, 5, generator=source) + 1
        outputs = scale * torch.randn(3, 40, 6, generator=source)
        accumulator.update(inputs, outputs)
        expected[0].add_(outputs.flatten(0, 1).double().T @ outputs.flatten(0, 1).double())
        expected[1].add_(inputs.flatten(0, 1).double().T @ inputs.flatten(0, 1).double())
    fisher = accumulator.finish()
    found = fisher.output_factor * (400 * 120), fisher.input_factor * (400 * 3)
    for one, two in zip(found, expected, strict=True):
        diagonal = two.diagonal().sqrt()
        error = (one - two).abs() / torch.outer(diagonal, diagonal)
        assert float(error.max()) < 3e-7


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_offloading_changes_nothing(estimator):
    plain, offloaded = make_accumulator(estimator), make_accumulator(estimator)
    for inputs, gradients in batches((1, 3)):
        for accumulator in (plain, offloaded):
            accumulator.update(inputs, gradients)
        offloaded.offload()
    for one, two in zip(plain.state(), offloaded.state(), strict=True):
        assert torch.equal(one, two)
    assert len(plain.state()) == plain.sums + (estimator in ("exact", "ekfac"))


def test_kronecker_factors_are_symmetric():
    """XᵀX in fp32 is not, on some CPUs."""
    generator = torch.Generator().manual_seed(0)
    accumulator = make_accumulator("kfac")
    for _ in range(2):
        inputs, gradients = (torch.randn(2, 20, n, generator=generator) for n in (6, 7))
        accumulator.update(inputs, gradients)
    fisher = accumulator.finish()
    assert torch.equal(fisher.input_factor, fisher.input_factor.T)
    assert torch.equal(fisher.output_factor, fisher.output_factor.T)
