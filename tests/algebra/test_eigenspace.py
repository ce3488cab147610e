"""Split-half convergence of leading eigenspaces, on streams whose truth is known."""

import torch

from sst_lightning.algebra.eigenspace import (
    CHECKS,
    RANK,
    EigenspaceMonitor,
    compressed,
    leading_overlap,
)
from tests.algebra.builders import generator

P, Q = 6, 8


def stream(scales, blocks, size=16, seed=0):
    """Blocks of gradients with covariance diag(scales²) in a random basis."""
    source = generator(seed)
    basis = torch.linalg.qr(torch.randn(P * Q, P * Q, generator=source, dtype=torch.float64))[0]
    for _ in range(blocks):
        rows = torch.randn(size, P * Q, generator=source, dtype=torch.float64) * scales
        yield (rows @ basis.T).reshape(size, P, Q).float()


def watch(threshold, blocks):
    """Similarity after each block, until convergence."""
    monitor = EigenspaceMonitor(threshold)
    history = []
    for block in blocks:
        monitor.check([("a", block), ("b", 2 * block)])
        history.append(monitor.similarity)
        if monitor.converged:
            break
    return monitor, history


def test_a_stream_with_few_leading_directions_converges():
    scales = torch.full((P * Q,), 0.1, dtype=torch.float64)
    scales[:RANK] = torch.linspace(3, 2, RANK, dtype=torch.float64)
    monitor, history = watch(0.95, stream(scales, blocks=30))
    assert monitor.converged
    assert len(history) < 30
    assert monitor.sequences == 16 * len(history)
    assert min(history[-CHECKS:]) >= 0.95


def test_isotropic_gradients_do_not_converge_however_small_a_block_becomes():
    """The estimate changes little from block to block, which is not convergence."""
    monitor, history = watch(0.9, stream(torch.ones(P * Q, dtype=torch.float64), blocks=60))
    assert not monitor.converged
    assert max(history) < 0.6


def test_the_similarity_is_that_of_the_halves_dense_fishers():
    scales = torch.linspace(2, 0.1, P * Q, dtype=torch.float64)
    # Fewer sequences than the sketch keeps: nothing is cut, so the oracle must agree exactly.
    blocks = list(stream(scales, blocks=3, size=14))
    monitor, _ = watch(0.999, blocks)
    rows = torch.cat(blocks).double().flatten(1)
    eigen = [torch.linalg.eigh(rows[start::2].T @ rows[start::2]) for start in (0, 1)]
    tops = [(values[-RANK:], vectors[:, -RANK:]) for values, vectors in eigen]
    shared = sum(
        float((values * (tops[1 - i][1].T @ vectors).square().sum(0)).sum())
        for i, (values, vectors) in enumerate(tops)
    )
    total = sum(float(values.sum()) for values, _ in tops)
    assert abs(monitor.similarity - shared / total) < 1e-10


def test_halves_are_told_apart_by_position_whatever_the_blocks():
    scales = torch.linspace(2, 0.1, P * Q, dtype=torch.float64)
    rows = torch.cat(list(stream(scales, blocks=3, size=14)))
    similarities = []
    for sizes in ((14, 14, 14), (9, 20, 13), (42,)):
        monitor = EigenspaceMonitor(0.999)
        for block in rows.split(sizes):
            monitor.check([("a", block)])
        similarities.append(monitor.similarity)
    assert max(similarities) - min(similarities) < 1e-10


def test_nothing_is_said_before_each_half_has_enough():
    monitor, history = watch(0.01, stream(torch.ones(P * Q, dtype=torch.float64), 3, size=RANK - 1))
    assert history[:2] == [None, None]
    assert history[2] is not None
    assert not monitor.converged


def test_one_good_check_is_not_convergence():
    monitor = EigenspaceMonitor(0.5)
    leading = torch.zeros(P * Q, dtype=torch.float64)
    leading[:RANK] = 1
    block = next(stream(leading, 1, size=64))
    monitor.check([("a", block)])
    assert monitor.similarity > 0.5
    assert not monitor.converged
    monitor.check([("a", block)])
    assert monitor.converged


def test_zero_gradients_have_no_eigenspace():
    monitor = EigenspaceMonitor(0.5)
    for _ in range(3):
        monitor.check([("a", torch.zeros(32, P, Q))])
    assert monitor.similarity is None
    assert not monitor.converged


def test_rows_of_rounding_errors_span_nothing():
    """Both halves are of rank one, in orthogonal directions."""
    halves = [compressed(torch.eye(P * Q, dtype=torch.float64)[[i] * 20], RANK) for i in (0, 1)]
    assert leading_overlap(halves)[0] < 1e-12
