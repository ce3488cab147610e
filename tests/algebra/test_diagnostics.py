import numpy as np
import pytest
import scipy.linalg
import torch

from sst_lightning.algebra.diagnostics import half, kept_energy_by_module, spectrum
from sst_lightning.algebra.fisher import ExactFisher, mix_modules
from tests.algebra.builders import generator, random_core, random_exact, random_kronecker


def test_kept_energy_by_module():
    before = {"a": random_core(2, 3), "b": 0 * random_core(2, 3)}
    after = {"a": 0.5 * before["a"], "b": before["b"]}
    assert kept_energy_by_module(before, after) == {"a": pytest.approx(0.25), "b": 0.0}


def test_spectrum_is_solved_on_one_half_and_tested_on_the_other():
    safety, utility = random_exact(40, 2, 3, 1), random_exact(60, 2, 3, 2)
    result = spectrum({"m": safety}, {"m": utility}, damping=0.1)
    dense = []
    for start in (0, 1):
        pair = []
        for fisher in (safety, utility):
            rows = fisher.samples[start::2].double().flatten(1).numpy()
            matrix = rows.T @ rows
            pair.append(matrix * len(matrix) / np.trace(matrix))
        pair[1] = pair[1] + 0.1 * np.eye(6)
        dense.append(pair)
    values, vectors = scipy.linalg.eigh(*dense[0])
    np.testing.assert_allclose(result["in_sample"], values[::-1], rtol=1e-8)
    quotients = [(v @ dense[1][0] @ v) / (v @ dense[1][1] @ v) for v in vectors.T[::-1]]
    np.testing.assert_allclose(result["held_out"], quotients, rtol=1e-8)


def test_overfitted_spectrum_shows():
    """Both Fishers are estimates of I: every true quotient is 1/(1 + damping)."""
    draws = torch.randn(2, 32, 6, 6, generator=generator(0))
    result = spectrum({"m": ExactFisher(draws[0])}, {"m": ExactFisher(draws[1])})
    assert result["in_sample"][0] > 4
    assert 0.3 < result["held_out"][0] < 2


def test_spectrum_needs_sequences():
    kronecker = {"m": random_kronecker(2, 3)}
    assert spectrum(kronecker, kronecker) is None
    few = {"m": random_exact(3, 2, 3)}
    assert spectrum(few, few) is None


def test_halves_share_no_sequence():
    fisher = random_exact(5, 2, 3)
    assert half(fisher, 0).count == 3
    assert half(fisher, 1).count == 2


def test_a_sequence_taken_at_two_points_is_in_one_half():
    """In-sample directions would otherwise be tested on the sequences they were found on."""
    parts = [ExactFisher(torch.randn(5, 2, 3)) for _ in range(2)]
    mixed = mix_modules([(0.5, part) for part in parts]).normalised()
    for start in (0, 1):
        expected = torch.cat([part.samples[start::2] for part in parts])
        assert torch.equal(half(mixed, start).samples, expected)
