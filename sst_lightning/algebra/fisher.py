"""Fisher estimates of one module in core coordinates (DESIGN.md section 2, "Fisher").

With g_n (p, q) the gradient of sequence n's summed completion NLL with respect to the core M, the
Fisher is F = E[vec(g) vec(g)ᵀ]. vec is row-major: entry (i, j) of g is entry i·q + j of vec(g).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError

FisherType = TypeVar("FisherType", bound="ModuleFisher")

AXES_TOLERANCE = 1e-3


class ModuleFisher(ABC):
    """An estimate of one module's Fisher.

    Attributes:
        count: number of sequences it was taken from.
    """

    count: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(p, q)."""

    @abstractmethod
    def trace(self) -> float:
        """Tr F = E‖g‖²."""

    @abstractmethod
    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q) in fp64."""

    @abstractmethod
    def dense(self) -> Tensor:
        """F, (pq, pq) in fp64."""

    @abstractmethod
    def scaled(self, factor: float) -> "ModuleFisher":
        """Factor · F."""

    @abstractmethod
    def rotated(self, outputs: Tensor, inputs: Tensor) -> "ModuleFisher":
        """F in other orthonormal bases of the same space, where a core M is T_out M T_inᵀ.

        Args:
            outputs: T_out, (p, p).
            inputs: T_in, (q, q).
        """

    @property
    def size(self) -> int:
        """Number of coordinates pq."""
        p, q = self.shape
        return p * q

    def mean_eigenvalue(self) -> float:
        """Return tr F / (pq)."""
        return self.trace() / self.size

    def rayleigh(self, core: Tensor) -> float:
        """Return vec(core)ᵀ F vec(core)."""
        return float((core.double() * self.matvec(core)).sum())

    def normalised(self: FisherType) -> FisherType:
        """Return F divided by its mean eigenvalue.

        Raises:
            FisherError: F is zero or not finite.
        """
        mean = self.mean_eigenvalue()
        if not 0 < mean < math.inf:
            raise FisherError(
                f"a Fisher has mean eigenvalue {mean}: its calibration rows give no gradient here"
            )
        return cast(FisherType, self.scaled(1 / mean))


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
        return self.samples.double().flatten(1) * self.shares().sqrt()[:, None]

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


@dataclass(frozen=True)
class DiagonalFisher(ModuleFisher):
    """F ≈ diag(E[g²]): the original's ``gradient_variance``, but per sequence and in core space.

    Attributes:
        diagonal: E[g_ij²], (p, q).
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
        """diag(E[g²]), (pq, pq)."""
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


def mix_modules(parts: Sequence[tuple[float, ModuleFisher]]) -> ModuleFisher:
    """Return Σ w_i F_i / Σ w_i of one module.

    Exact Fishers concatenate their weighted samples and diagonal ones add up: both exactly. A sum
    of Kronecker products is not one; G ⊗ A with G = Σ w_i tr(A_i) G_i and
    A = Σ w_i tr(G_i) A_i / Σ w_i tr(G_i) tr(A_i) is the approximation with the sum's trace and
    partial traces, exact where the A_i (or the G_i) are multiples of each other.

    Raises:
        FisherError: the estimators or shapes differ, or a weight is not positive.
    """
    if not parts or any(not 0 < weight < math.inf for weight, _ in parts):
        raise FisherError("a Fisher mixture needs parts with positive weights")
    fishers = [fisher for _, fisher in parts]
    if len({fisher.shape for fisher in fishers}) != 1:
        raise FisherError("only Fishers of one core space can be mixed")
    total = sum(weight for weight, _ in parts)
    shares = [weight / total for weight, _ in parts]
    exact = [fisher for fisher in fishers if isinstance(fisher, ExactFisher)]
    if len(exact) == len(fishers):
        return _mix_exact(shares, exact)
    diagonal = [fisher for fisher in fishers if isinstance(fisher, DiagonalFisher)]
    count = sum(fisher.count for fisher in fishers)
    if len(diagonal) == len(fishers):
        return DiagonalFisher(_sum(shares, [fisher.diagonal for fisher in diagonal]), count)
    kronecker = [fisher for fisher in fishers if isinstance(fisher, KroneckerFisher)]
    if len(kronecker) != len(fishers):
        raise FisherError("only Fishers of one estimator can be mixed")
    outputs = [fisher.output_factor for fisher in kronecker]
    inputs = [fisher.input_factor for fisher in kronecker]
    trace = sum(share * fisher.trace() for share, fisher in zip(shares, kronecker, strict=True))
    if not trace > 0:
        raise FisherError("a Fisher mixture of zero trace: no calibration row gives a gradient")
    output_weights = [s * float(a.trace()) for s, a in zip(shares, inputs, strict=True)]
    input_weights = [s * float(g.trace()) / trace for s, g in zip(shares, outputs, strict=True)]
    return KroneckerFisher(_sum(output_weights, outputs), _sum(input_weights, inputs), count)


def _mix_exact(shares: Sequence[float], fishers: Sequence[ExactFisher]) -> ExactFisher:
    weights = torch.cat([s * fisher.shares() for s, fisher in zip(shares, fishers, strict=True)])
    # The class divides by Σw; the scale undoes it where parts carry a scale of their own.
    samples = torch.cat([fisher.samples for fisher in fishers])
    sequences = torch.cat([fisher.numbers() for fisher in fishers])
    return ExactFisher(samples, weights, float(weights.sum()), sequences)


def _sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * t.double() for w, t in zip(weights, tensors, strict=True)]).sum(0)
