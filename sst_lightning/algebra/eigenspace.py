"""Has the leading eigenspace of a Fisher converged? A split-half estimate in bounded memory."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

RANK = 8
"""Directions of each module's leading eigenspace that are compared."""

SKETCH = 32
"""Directions of each half that are kept; more than are compared, so that cuts do not show."""

CHECKS = 2
"""Checks in a row that must agree: a similarity just above the threshold may be luck."""


class EigenspaceMonitor:
    """Compares the leading eigenspaces of two disjoint halves of the sequences.

    Sequence n goes to half n mod 2 in the order of arrival, which must be random. Each half of each
    module keeps the SVD of its gradients, cut to ``SKETCH`` directions after every block
    (incremental SVD, Brand 2002; what is cut stays below the directions that are compared). With
    λ_i, u_i the ``RANK`` leading eigenpairs of one half and V those of the other, the similarity is

        Σ λ_i ‖Vᵀu_i‖² / Σ λ_i,

    over both directions and all modules: the share of the leading energy of one half that lies in
    the leading space of the other. It is 1 for equal spaces, and about RANK / (pq) for isotropic
    gradients, however many there are.

    The halves share no sequence. Comparing an estimate with its own predecessor, which holds most of
    its sequences, would report convergence on pure noise as soon as one block is a small part of all.
    The similarity is that of two Fishers of half the sequences each, so the Fisher of all of them is
    nearer to the truth than it says; it says nothing about directions after the first ``RANK``.

    Args:
        threshold: similarity to reach, in (0, 1).

    Attributes:
        similarity: at the last check; ``None`` before each half has ``RANK`` sequences.
        sequences: number of sequences seen.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.similarity: float | None = None
        self.sequences = 0
        self._halves: dict[str, list[Tensor]] = {}
        self._reached = 0

    @property
    def converged(self) -> bool:
        """Whether the threshold was reached at the last ``CHECKS`` checks."""
        return self._reached >= CHECKS

    def check(self, samples: Iterable[tuple[str, Tensor]]) -> None:
        """Add a block and compare.

        Args:
            samples: each module with g_n of the block's sequences, (n, p, q).
        """
        shared, total = 0.0, 0.0
        enough = False
        count = 0
        for name, block in samples:
            count = len(block)
            rows = block.double().flatten(1)
            halves = self._halves.get(name, [rows[:0], rows[:0]])
            halves = [
                compressed(torch.cat([half, rows[(start + self.sequences) % 2 :: 2]]), SKETCH)
                for start, half in enumerate(halves)
            ]
            self._halves[name] = halves
            enough = (self.sequences + count) // 2 >= RANK
            if enough:
                overlap, energy = leading_overlap(halves)
                shared, total = shared + overlap, total + energy
        self.sequences += count
        if enough and total > 0:
            self.similarity = shared / total
            self._reached = self._reached + 1 if self.similarity >= self.threshold else 0


def compressed(rows: Tensor, rank: int) -> Tensor:
    """Return ``rank`` rows whose XᵀX is the leading part of that of ``rows``, largest first.

    Args:
        rows: X, (n, pq).
        rank: most rows to keep.
    """
    vectors = torch.linalg.eigh(rows @ rows.T)[1]
    return vectors[:, -rank:].flip(1).T @ rows


def leading_overlap(halves: Sequence[Tensor]) -> tuple[float, float]:
    """Return Σ λ_i ‖Vᵀu_i‖² over both directions, and Σ λ_i.

    Args:
        halves: two results of :func:`compressed`, whose rows are √λ_i u_iᵀ.
    """
    leading = [half[:RANK] for half in halves]
    # A row of rounding errors has a direction too, and would take part in the other's frame.
    energies = [rows.square().sum(1) for rows in leading]
    leading = [rows[e > 1e-12 * e.sum()] for rows, e in zip(leading, energies, strict=True)]
    frames = [torch.linalg.qr(half.T)[0] for half in leading]
    shared = sum(
        float((half @ frame).square().sum())
        for half, frame in zip(leading, reversed(frames), strict=True)
    )
    return shared, sum(float(half.square().sum()) for half in leading)
