"""Fisher estimates of one module in core coordinates (DESIGN.md section 2, "Fisher").

With g_n (p, q) the gradient of sequence n's summed completion NLL with respect to the core M, the
Fisher is F = E[vec(g) vec(g)ᵀ]. vec is row-major: entry (i, j) of g is entry i·q + j of vec(g).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError


@runtime_checkable
class ModuleFisher(Protocol):
    """What every estimate offers."""

    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        ...

    def trace(self) -> float:
        """Tr F = E‖g‖²."""
        ...

    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q) in fp64."""
        ...

    def dense(self) -> Tensor:
        """F, (pq, pq) in fp64."""
        ...

    def scaled(self, factor: float) -> "ModuleFisher":
        """factor · F."""
        ...


class _Common:
    """Quantities that follow from trace, shape and matvec."""

    def mean_eigenvalue(self: ModuleFisher) -> float:  # type: ignore[misc]
        """Return tr F / (pq)."""
        p, q = self.shape
        return self.trace() / (p * q)

    def rayleigh(self: ModuleFisher, core: Tensor) -> float:  # type: ignore[misc]
        """Return vec(core)ᵀ F vec(core)."""
        return float((core.double() * self.matvec(core)).sum())

    def normalised(self: ModuleFisher) -> ModuleFisher:  # type: ignore[misc]
        """Return F divided by its mean eigenvalue.

        Raises:
            FisherError: F is zero or not finite.
        """
        p, q = self.shape
        mean = self.trace() / (p * q)
        if not 0 < mean < float("inf"):
            raise FisherError(
                f"a Fisher has mean eigenvalue {mean}: its calibration rows give no gradient here"
            )
        return self.scaled(1 / mean)


@dataclass(frozen=True)
class ExactFisher(_Common):
    """F = Σ w_n vec(g_n) vec(g_n)ᵀ / Σ w_n, kept as the samples.

    Attributes:
        samples: g_n, (N, p, q) fp32.
        weights: w_n, (N,) fp64; all 1 when not given.
        scale: factor in front of F.
    """

    samples: Tensor
    weights: Tensor | None = None
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Number of sequences N."""
        return self.samples.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.samples.shape[1], self.samples.shape[2]

    def factor(self) -> Tensor:
        """Return X, (N, pq) fp64, with F = XᵀX."""
        weights = torch.ones(self.count) if self.weights is None else self.weights
        weights = weights.double() * (self.scale / float(weights.sum()))
        return self.samples.double().flatten(1) * weights.sqrt()[:, None]

    def trace(self) -> float:
        """Tr F."""
        return float(self.factor().square().sum())

    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q)."""
        factor = self.factor()
        return (factor.T @ (factor @ core.double().flatten())).reshape(self.shape)

    def dense(self) -> Tensor:
        """F, (pq, pq)."""
        factor = self.factor()
        return factor.T @ factor

    def scaled(self, factor: float) -> "ExactFisher":
        """factor · F."""
        return ExactFisher(self.samples, self.weights, self.scale * factor)


@dataclass(frozen=True)
class KroneckerFisher(_Common):
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
        """factor · F, with the factor put into G."""
        return KroneckerFisher(self.output_factor.double() * factor, self.input_factor, self.count)


@dataclass(frozen=True)
class DiagonalFisher(_Common):
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
        """factor · F."""
        return DiagonalFisher(self.diagonal.double() * factor, self.count)


def mix_modules(parts: Sequence[tuple[float, ModuleFisher]]) -> ModuleFisher:
    """Return Σ w_i F_i / Σ w_i of one module.

    Exact Fishers concatenate their weighted samples and diagonal ones add up: both exactly. A sum
    of Kronecker products is not one; there the factors are averaged, which keeps the trace's order
    of magnitude but is an approximation.

    Raises:
        FisherError: the estimators or shapes differ, or a weight is not positive.
    """
    kinds = {type(fisher) for _, fisher in parts}
    if len(kinds) != 1 or len({fisher.shape for _, fisher in parts}) != 1:
        raise FisherError("only Fishers of one estimator and one core space can be mixed")
    if any(weight <= 0 for weight, _ in parts):
        raise FisherError("the weights of a Fisher mixture must be positive")
    total = sum(weight for weight, _ in parts)
    shares = [weight / total for weight, _ in parts]
    fishers = [fisher for _, fisher in parts]
    count = sum(fisher.count for fisher in fishers)
    if kinds == {ExactFisher}:
        weights, samples = [], []
        for share, fisher in zip(shares, fishers, strict=True):
            assert isinstance(fisher, ExactFisher)
            own = torch.ones(fisher.count) if fisher.weights is None else fisher.weights
            weights.append(own.double() * (share * fisher.scale / float(own.sum())))
            samples.append(fisher.samples)
        joined = torch.cat(weights)
        # The class divides by Σw; the scale undoes it where parts carry a scale of their own.
        return ExactFisher(torch.cat(samples), joined, float(joined.sum()))
    if kinds == {DiagonalFisher}:
        diagonal = sum(
            share * fisher.diagonal.double()  # type: ignore[attr-defined]
            for share, fisher in zip(shares, fishers, strict=True)
        )
        assert isinstance(diagonal, Tensor)
        return DiagonalFisher(diagonal, count)
    outputs = sum(s * f.output_factor.double() for s, f in zip(shares, fishers, strict=True))  # type: ignore[attr-defined]
    inputs = sum(s * f.input_factor.double() for s, f in zip(shares, fishers, strict=True))  # type: ignore[attr-defined]
    assert isinstance(outputs, Tensor)
    assert isinstance(inputs, Tensor)
    return KroneckerFisher(outputs, inputs, count)
