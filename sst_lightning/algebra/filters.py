"""Filters of the safety core: from curvature to what is merged (docs/mathematics.md section 5)."""

import math
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import (
    DiagonalFisher,
    ExactFisher,
    KroneckerFisher,
    ModuleFisher,
)
from sst_lightning.algebra.gevp import GeneralisedEigen, Solver, choose_solver, solve_metric

Projector = Literal["euclidean", "fisher"]


def soft_filter(
    delta: Tensor,
    safety: ModuleFisher,
    utility: ModuleFisher,
    mu: float,
    rho: float,
    solver: Solver = "auto",
) -> Tensor:
    """Return argmin_δ (δ−δ_s)ᵀ(F_s+ρI)(δ−δ_s) + μ δᵀF_u δ = (F_s+ρI+μF_u)⁻¹(F_s+ρI) δ_s.

    Each Fisher is first divided by its mean eigenvalue. In the eigenbasis of
    (F_s+ρI) v = λ F_u v every coordinate is multiplied by λ/(λ+μ): what matters to safety more
    than to utility is kept, and so is what matters to neither.

    Args:
        delta: safety core δ_s, (p, q).
        safety: F_s.
        utility: F_u, of the same estimator.
        mu: weight of utility, ≥ 0.
        rho: weight of staying near δ_s where safety has no curvature, > 0.
        solver: ``dense`` (pq, pq), ``dual`` (a Cholesky of the size of all sequences, exact
            Fishers) or ``kronecker`` (K-FAC; damping factored, so ρ means √ρ in each factor).
            Diagonal Fishers need none, EK-FAC has only ``dense``.

    Returns:
        The filtered core, (p, q) fp64.

    Raises:
        FisherError: μ or ρ is out of range, a Fisher is zero, or the Fishers or the solver do not
            fit each other.
    """
    check_weights(mu, rho)
    solver = choose_solver(safety, utility, solver)
    if tuple(delta.shape) != safety.shape:
        raise FisherError(f"the core is {tuple(delta.shape)}, but its Fisher is of {safety.shape}")
    safety, utility = safety.normalised(), utility.normalised()
    delta = delta.double()
    if isinstance(safety, DiagonalFisher) and isinstance(utility, DiagonalFisher):
        keep = safety.diagonal.double() + rho
        return delta * keep / (keep + mu * utility.diagonal.double())
    if solver == "kronecker":
        assert isinstance(safety, KroneckerFisher)
        assert isinstance(utility, KroneckerFisher)
        return _soft_kronecker(delta, safety, utility, mu, rho)
    if solver == "dual":
        assert isinstance(safety, ExactFisher)
        assert isinstance(utility, ExactFisher)
        flat = soft_filter_dual(delta.flatten(), safety.factor(), utility.factor(), mu, rho)
        return flat.reshape(delta.shape)
    keep = safety.dense()
    keep.diagonal().add_(rho)
    root = torch.linalg.cholesky(keep + mu * utility.dense())
    return torch.cholesky_solve((keep @ delta.flatten())[:, None], root).reshape(delta.shape)


def soft_filter_dual(
    delta: Tensor, safety: Tensor, utility: Tensor, mu: float, rho: float
) -> Tensor:
    """Soft filter in the span of the samples: δ_s − μ (F_s+ρI+μF_u)⁻¹ F_u δ_s.

    With V = √μ U and X = [S; V]: (XᵀX + ρI)⁻¹ Vᵀ = Xᵀ(XXᵀ + ρI)⁻¹ E_u, E_u the columns of V's rows.
    Nothing is subtracted but the correction itself, and ρ is of the order of the mean eigenvalue,
    so this is well conditioned, unlike the GEVP with a tiny damping.

    Args:
        delta: vec(δ_s), (n,).
        safety: S, (N_s, n), F_s = SᵀS.
        utility: U, (N_u, n), F_u = UᵀU.
        mu: weight of utility.
        rho: ridge, > 0.
    """
    # At 8B shape another copy of the samples would cost as much as the solve.
    stacked = torch.cat([safety, utility])
    scaled = stacked[len(safety) :].mul_(math.sqrt(mu))
    weights = dual_weights(lower_gram(stacked), scaled @ delta, rho)
    return delta - stacked.T @ weights


def lower_gram(samples: Tensor) -> Tensor:
    """Return XXᵀ of X (N, n) fp64, (N, N), below the diagonal only: all that a Cholesky reads.

    dsyrk on the transposed view does so at half the cost of a product; in the dual filters this
    product dominates.
    """
    return torch.from_numpy(scipy.linalg.blas.dsyrk(1.0, samples.numpy().T, trans=1).T)


def dual_weights(gram: Tensor, utility: Tensor, rho: float) -> Tensor:
    """Return (XXᵀ + ρI)⁻¹ [0; Uδ], (N,).

    Args:
        gram: XXᵀ, (N, N), the utility samples last. Overwritten; read below the diagonal only.
        utility: Uδ, (N_u,).
        rho: ridge, > 0.
    """
    right = torch.zeros(len(gram), dtype=gram.dtype)
    right[len(gram) - len(utility) :] = utility
    return solve_ridge(gram, right, rho)


def solve_ridge(gram: Tensor, right: Tensor, rho: float) -> Tensor:
    """Return (XXᵀ + ρI)⁻¹ b, (N,).

    Args:
        gram: XXᵀ, (N, N). Overwritten; read below the diagonal only.
        right: b, (N,). Overwritten.
        rho: ridge, > 0.
    """
    gram.diagonal().add_(rho)
    factor = scipy.linalg.cho_factor(gram.numpy(), lower=True, overwrite_a=True)
    return torch.from_numpy(scipy.linalg.cho_solve(factor, right.numpy(), overwrite_b=True))


def hard_filter(
    delta: Tensor, eigen: GeneralisedEigen, k: int | float, projector: Projector = "euclidean"
) -> Tensor:
    """Project onto the top-k generalised eigenvectors.

    ``fisher`` is the step-function limit of the soft filter: in the eigenbasis it multiplies the
    first k coordinates by 1 and the others by 0. (V Vᵀδ, which the original used, is neither
    projector: docs/mathematics.md section 5.)

    Args:
        delta: safety core, (p, q).
        eigen: solution of F_s v = λ M v, M = F_u + εI.
        k: number of directions, or as a float in (0, 1] the share of pq; never more than solved.
        projector: ``euclidean`` V(VᵀV)⁻¹Vᵀ, or the M-orthogonal ``fisher`` V VᵀM.

    Returns:
        The projected core, (p, q) fp64.

    Raises:
        FisherError: k is out of range or the projector is unknown.
    """
    count = directions(k, delta.numel())
    vectors = torch.from_numpy(eigen.vectors[:, :count].copy())
    flat = delta.double().flatten()
    if projector == "euclidean":
        basis = torch.linalg.qr(vectors)[0]
        return (basis @ (basis.T @ flat)).reshape(delta.shape)
    if projector != "fisher":
        raise FisherError(f"unknown projector '{projector}': use euclidean or fisher")
    images = torch.from_numpy(eigen.images[:, :count].copy())
    return (vectors @ (images.T @ flat)).reshape(delta.shape)


def directions(k: int | float, size: int) -> int:
    """Turn k, a number (int) or a share of ``size`` (float), into a number of directions.

    Raises:
        FisherError: k is out of range.
    """
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise FisherError(f"k as a share must be in (0, 1], got {k}")
        return max(1, round(k * size))
    if k < 1:
        raise FisherError(f"k must be at least 1, got {k}")
    return min(k, size)


def kept_energy(before: Tensor, after: Tensor) -> float:
    """Return ‖after‖² / ‖before‖² (0 for a zero core)."""
    total = float(before.double().square().sum())
    return float(after.double().square().sum()) / total if total > 0 else 0.0


def check_weights(mu: float, rho: float) -> None:
    """Refuse weights without a unique minimum.

    Raises:
        FisherError: μ is negative, ρ is not positive, or one is not finite.
    """
    if not 0 <= mu < math.inf:
        raise FisherError(f"mu must be 0 or more and finite, got {mu}")
    if not 0 < rho < math.inf:
        raise FisherError(f"rho must be positive and finite, got {rho}")


def _soft_kronecker(
    delta: Tensor, safety: KroneckerFisher, utility: KroneckerFisher, mu: float, rho: float
) -> Tensor:
    """Soft filter with F_s + ρI replaced by (G_s + √ρ ḡI) ⊗ (A_s + √ρ āI), in the eigenbasis.

    The damped safety factors are the metric, because those of utility may be singular; an
    eigenvalue of this problem is 1/λ.
    """
    outputs = solve_metric(
        utility.output_factor.double().numpy(), _ridge(safety.output_factor, rho).numpy()
    )
    inputs = solve_metric(
        utility.input_factor.double().numpy(), _ridge(safety.input_factor, rho).numpy()
    )
    ratios = torch.outer(torch.from_numpy(outputs.values), torch.from_numpy(inputs.values))
    coordinates = torch.from_numpy(outputs.images).T @ delta @ torch.from_numpy(inputs.images)
    kept = coordinates / (1 + mu * ratios.clamp(min=0))
    return torch.from_numpy(outputs.vectors) @ kept @ torch.from_numpy(inputs.vectors).T


def _ridge(factor: Tensor, rho: float) -> Tensor:
    """Add √ρ times the factor's mean eigenvalue."""
    factor = factor.double()
    mean = float(factor.trace()) / len(factor)
    return factor + math.sqrt(rho) * mean * torch.eye(len(factor), dtype=torch.float64)
