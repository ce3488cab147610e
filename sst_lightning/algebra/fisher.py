"""Fisher estimates of one module in core coordinates, and their mixtures.

:mod:`~sst_lightning.algebra.eigen_fisher` holds EK-FAC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_base import ModuleFisher

__all__ = ["DiagonalFisher", "ExactFisher", "KroneckerFisher", "ModuleFisher", "mix_modules"]

AXES_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ExactFisher(ModuleFisher):
    """F = Σ w_n vec(g_n) vec(g_n)ᵀ / Σ w_n, kept as the samples.

    Attributes:
        samples: g_n, (N, p, q) fp32.
        weights: w_n, (N,) fp64; all 1 when not given.
        scale: factor in front of F.
        sequences: number of each sample's sequence in its calibration set, (N,); 0 … N−1 when not
            given. In a mixture one sequence may have several samples, taken at several points.
    """

    samples: Tensor
    weights: Tensor | None = None
    scale: float = 1.0
    sequences: Tensor | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.samples.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.samples.shape[1], self.samples.shape[2]

    def factor(self) -> Tensor:
        """Return X, (N, pq) fp64, with F = XᵀX."""
        # A copy in any case, also of fp64 samples: it is scaled in place.
        factor = self.samples.to(torch.float64, copy=True).flatten(1)
        return factor.mul_(self.shares().sqrt()[:, None])

    def shares(self) -> Tensor:
        """Return the weight of each sample in F, scale · w_n / Σ w, (N,) fp64."""
        weights = torch.ones(self.count) if self.weights is None else self.weights
        return weights.double() * (self.scale / float(weights.sum()))

    def numbers(self) -> Tensor:
        """Return the number of each sample's sequence, (N,)."""
        return torch.arange(self.count) if self.sequences is None else self.sequences

    def trace(self) -> float:
        """Tr F."""
        norms = torch.linalg.vector_norm(self.samples, dim=(1, 2), dtype=torch.float64)
        return float(self.shares() @ norms.square())

    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q)."""
        factor = self.factor()
        return (factor.T @ (factor @ core.double().flatten())).reshape(self.shape)

    def dense(self) -> Tensor:
        """F, (pq, pq)."""
        factor = self.factor()
        return factor.T @ factor

    def scaled(self, factor: float) -> "ExactFisher":
        """Factor · F."""
        return replace(self, scale=self.scale * factor)

    def rotated(self, outputs: Tensor, inputs: Tensor) -> "ExactFisher":
        """F in other bases: every g_n becomes T_out g_n T_inᵀ."""
        samples = (outputs @ self.samples.double() @ inputs.T).float()
        return replace(self, samples=samples)

    @classmethod
    def mixture(cls, shares: Sequence[float], fishers: Sequence["ExactFisher"]) -> "ExactFisher":
        """All samples with their weights: exact."""
        parts = [share * fisher.shares() for share, fisher in zip(shares, fishers, strict=True)]
        weights = torch.cat(parts)
        # The class divides by Σw; the scale undoes it where parts carry a scale of their own.
        samples = torch.cat([fisher.samples for fisher in fishers])
        sequences = torch.cat([fisher.numbers() for fisher in fishers])
        return cls(samples, weights, float(weights.sum()), sequences)


@dataclass(frozen=True)
class KroneckerFisher(ModuleFisher):
    """K-FAC: F ≈ G ⊗ A in row-major vec, with A = E[Σ_t P_tᵀP_t], G = E[Σ_t R_tᵀR_t] / E[T].

    E is over sequences, T counts the tokens of a sequence: F is then T̄ times the product of the
    per-token second moments, which is E[vec(g) vec(g)ᵀ] if tokens are independent, inputs are
    independent of output gradients and these have mean 0 (Martens & Grosse 2015, section 3;
    token sums as in Grosse et al. 2023).

    Attributes:
        output_factor: G, (p, p).
        input_factor: A, (q, q).
        count: number of sequences.
    """

    output_factor: Tensor
    input_factor: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.output_factor.shape[0], self.input_factor.shape[0]

    def trace(self) -> float:
        """Tr F = tr G · tr A."""
        return float(self.output_factor.double().trace() * self.input_factor.double().trace())

    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core) = G core A, as (p, q)."""
        return self.output_factor.double() @ core.double() @ self.input_factor.double()

    def dense(self) -> Tensor:
        """G ⊗ A, (pq, pq)."""
        return torch.kron(self.output_factor.double(), self.input_factor.double())

    def scaled(self, factor: float) -> "KroneckerFisher":
        """Factor · F, with the factor put into G."""
        return KroneckerFisher(self.output_factor.double() * factor, self.input_factor, self.count)

    def rotated(self, outputs: Tensor, inputs: Tensor) -> "KroneckerFisher":
        """F in other bases: T_out G T_outᵀ and T_in A T_inᵀ."""
        output_factor = outputs @ self.output_factor.double() @ outputs.T
        return KroneckerFisher(
            output_factor, inputs @ self.input_factor.double() @ inputs.T, self.count
        )

    @classmethod
    def mixture(
        cls, shares: Sequence[float], fishers: Sequence["KroneckerFisher"]
    ) -> "KroneckerFisher":
        """G = Σ s_i tr(A_i) G_i and A = Σ s_i tr(G_i) A_i / Σ s_i tr(G_i) tr(A_i).

        A sum of Kronecker products is not one; this approximation has its trace and partial traces,
        and is exact where the A_i (or the G_i) are multiples of each other.

        Raises:
            FisherError: the sum has no trace.
        """
        outputs = [fisher.output_factor for fisher in fishers]
        inputs = [fisher.input_factor for fisher in fishers]
        trace = sum(share * fisher.trace() for share, fisher in zip(shares, fishers, strict=True))
        if not trace > 0:
            raise FisherError("a Fisher mixture of zero trace: no calibration row gives a gradient")
        output_weights = [s * float(a.trace()) for s, a in zip(shares, inputs, strict=True)]
        input_weights = [s * float(g.trace()) / trace for s, g in zip(shares, outputs, strict=True)]
        count = sum(fisher.count for fisher in fishers)
        return cls(_sum(output_weights, outputs), _sum(input_weights, inputs), count)


@dataclass(frozen=True)
class DiagonalFisher(ModuleFisher):
    """F ≈ diag(d) in core coordinates.

    d is E[g²] (``diagonal``: the original's ``gradient_variance``, but per sequence) or the variance
    E[g²] − E[g]² (``vila``).

    Attributes:
        diagonal: d, (p, q).
        count: number of sequences.
    """

    diagonal: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.diagonal.shape[0], self.diagonal.shape[1]

    def trace(self) -> float:
        """Tr F."""
        return float(self.diagonal.double().sum())

    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q)."""
        return self.diagonal.double() * core.double()

    def dense(self) -> Tensor:
        """diag(d), (pq, pq)."""
        return torch.diag(self.diagonal.double().flatten())

    def scaled(self, factor: float) -> "DiagonalFisher":
        """Factor · F."""
        return DiagonalFisher(self.diagonal.double() * factor, self.count)

    def rotated(self, outputs: Tensor, inputs: Tensor) -> "DiagonalFisher":
        """F in other bases, whose axes must be the same up to sign and order.

        Raises:
            FisherError: the axes are other ones; a diagonal does not say what F is along those.
        """
        squares = outputs.square(), inputs.square()
        if any(float((square - square.round()).abs().max()) > AXES_TOLERANCE for square in squares):
            raise FisherError(
                "a diagonal Fisher cannot be expressed along other axes; collect it again"
            )
        return DiagonalFisher(
            squares[0].round() @ self.diagonal.double() @ squares[1].round().T, self.count
        )

    @classmethod
    def mixture(
        cls, shares: Sequence[float], fishers: Sequence["DiagonalFisher"]
    ) -> "DiagonalFisher":
        """The diagonals' sum: exact (with ``vila`` the mean variance, not that of all gradients)."""
        diagonals = [fisher.diagonal for fisher in fishers]
        return cls(_sum(shares, diagonals), sum(fisher.count for fisher in fishers))


def mix_modules(parts: Sequence[tuple[float, ModuleFisher]]) -> ModuleFisher:
    """Return Σ w_i F_i / Σ w_i of one module: exact, but for K-FAC (:class:`KroneckerFisher`).

    Raises:
        FisherError: the estimators or shapes differ, or a weight is not positive.
    """
    if not parts or any(not 0 < weight < math.inf for weight, _ in parts):
        raise FisherError("a Fisher mixture needs parts with positive weights")
    fishers = [fisher for _, fisher in parts]
    if len({fisher.shape for fisher in fishers}) != 1:
        raise FisherError("only Fishers of one core space can be mixed")
    if len({type(fisher) for fisher in fishers}) != 1:
        raise FisherError("only Fishers of one estimator can be mixed")
    total = sum(weight for weight, _ in parts)
    return type(fishers[0]).mixture([weight / total for weight, _ in parts], fishers)


def _sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * t.double() for w, t in zip(weights, tensors, strict=True)]).sum(0)
