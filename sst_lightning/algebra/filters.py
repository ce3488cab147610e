"""Filters of the safety core: from curvature to what is merged (DESIGN.md section 2)."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import (
    DiagonalFisher,
    ExactFisher,
    KroneckerFisher,
    ModuleFisher,
)
from sst_lightning.algebra.gevp import GeneralisedEigen, Solver, choose_solver, solve_dense


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

    Returns:
        The filtered core, (p, q) fp64.
    """
    solver = choose_solver(safety, utility, solver)
    safety, utility = safety.normalised(), utility.normalised()  # type: ignore[attr-defined]
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
        return soft_filter_dual(
            delta.flatten(), safety.factor(), utility.factor(), mu, rho
        ).reshape(delta.shape)
    identity = torch.eye(delta.numel(), dtype=torch.float64)
    keep = safety.dense() + rho * identity
    return torch.linalg.solve(keep + mu * utility.dense(), keep @ delta.flatten()).reshape(
        delta.shape
    )


def soft_filter_dual(
    delta: Tensor, safety: Tensor, utility: Tensor, mu: float, rho: float
) -> Tensor:
    """Soft filter in the span of the samples: δ_s − μ (F_s+ρI+μF_u)⁻¹ F_u δ_s.

    With X = [S; √μ U], (XᵀX + ρI)⁻¹ b = (b − Xᵀ(XXᵀ + ρI)⁻¹ X b)/ρ. Here ρ is of the order of the
    mean eigenvalue, so the system is well conditioned, unlike the GEVP with a tiny damping.

    Args:
        delta: vec(δ_s), (n,).
        safety: S, (N_s, n), F_s = SᵀS.
        utility: U, (N_u, n), F_u = UᵀU.
        mu: weight of utility.
        rho: ridge, > 0.
    """
    stacked = torch.cat([safety, math.sqrt(mu) * utility])
    pull = utility.T @ (utility @ delta)
    gram = stacked @ stacked.T + rho * torch.eye(len(stacked), dtype=torch.float64)
    inner = torch.cholesky_solve((stacked @ pull)[:, None], torch.linalg.cholesky(gram))[:, 0]
    return delta - mu * (pull - stacked.T @ inner) / rho


def soft_filter_global(
    delta: Mapping[str, Tensor],
    safety: Mapping[str, ModuleFisher],
    utility: Mapping[str, ModuleFisher],
    mu: float,
    rho: float,
) -> dict[str, Tensor]:
    """Soft filter of one problem across all modules (exact Fishers, dual form).

    Raises:
        FisherError: the Fishers do not keep sequences.
    """
    names = list(delta)
    parts = []
    for fishers in (safety, utility):
        blocks = []
        for name in names:
            fisher = fishers[name]
            if not isinstance(fisher, ExactFisher):
                raise FisherError("scope 'global' needs exact Fishers (estimator: exact)")
            blocks.append(fisher.factor())
        factor = torch.cat(blocks, dim=1)
        parts.append(factor / (factor.square().sum() / factor.shape[1]).sqrt())
    flat = torch.cat([delta[name].double().flatten() for name in names])
    filtered = soft_filter_dual(flat, parts[0], parts[1], mu, rho)
    pieces = filtered.split([delta[name].numel() for name in names])
    return {
        name: piece.reshape(delta[name].shape) for name, piece in zip(names, pieces, strict=True)
    }


def hard_filter(
    delta: Tensor,
    eigen: GeneralisedEigen,
    k: int | float,
    projector: str = "euclidean",
    utility: ModuleFisher | None = None,
) -> Tensor:
    """Project onto the top-k generalised eigenvectors.

    Args:
        delta: safety core, (p, q).
        eigen: solution of F_s v = λ F_u v.
        k: number of directions, or as a float in (0, 1] the share of pq.
        projector: ``euclidean`` V(VᵀV)⁻¹Vᵀ, or ``fisher`` V VᵀF_u (F_u-orthogonal; V is
            orthonormalised in F_u, so that this is a projector whatever damping V was made with).
        utility: F_u; needed for ``fisher``.

    Returns:
        The projected core, (p, q) fp64.

    Raises:
        FisherError: k is out of range, the projector is unknown or lacks F_u.
    """
    count = directions(k, delta.numel())
    vectors = torch.from_numpy(np.ascontiguousarray(eigen.vectors[:, :count]))
    flat = delta.double().flatten()
    if projector == "euclidean":
        basis = torch.linalg.qr(vectors)[0]
        return (basis @ (basis.T @ flat)).reshape(delta.shape)
    if projector != "fisher" or utility is None:
        raise FisherError(f"projector '{projector}': use euclidean, or fisher with F_u")
    images = torch.stack(
        [utility.matvec(vector.reshape(delta.shape)).flatten() for vector in vectors.T], dim=1
    )
    gram = vectors.T @ images
    coefficients = torch.linalg.lstsq(gram, images.T @ flat[:, None]).solution[:, 0]
    return (vectors @ coefficients).reshape(delta.shape)


def directions(k: int | float, size: int) -> int:
    """Turn k, a number or a share of ``size``, into a number of directions.

    Raises:
        FisherError: k is out of range.
    """
    count = max(1, round(k * size)) if isinstance(k, float) and k <= 1 else int(k)
    if count < 1:
        raise FisherError(f"k must be positive, got {k}")
    return min(count, size)


def kept_energy(before: Tensor, after: Tensor) -> float:
    """Return ‖after‖² / ‖before‖² (0 for a zero core)."""
    total = float(before.double().square().sum())
    return float(after.double().square().sum()) / total if total > 0 else 0.0


def _soft_kronecker(
    delta: Tensor, safety: KroneckerFisher, utility: KroneckerFisher, mu: float, rho: float
) -> Tensor:
    root = math.sqrt(rho)
    damped = KroneckerFisher(
        _ridge(safety.output_factor, root), _ridge(safety.input_factor, root), safety.count
    )
    # A ridge at rounding level only: F_u is the metric and may be singular.
    outputs = solve_dense(
        damped.output_factor.numpy(), utility.output_factor.double().numpy(), 1e-8
    )
    inputs = solve_dense(damped.input_factor.numpy(), utility.input_factor.double().numpy(), 1e-8)
    left, right = (torch.from_numpy(np.ascontiguousarray(e.vectors)) for e in (outputs, inputs))
    values = torch.from_numpy(np.outer(outputs.values, inputs.values))
    coordinates = torch.linalg.solve(left, delta) @ torch.linalg.inv(right).T
    return left @ (coordinates * values / (values + mu)) @ right.T


def _ridge(factor: Tensor, root: float) -> Tensor:
    factor = factor.double()
    size = len(factor)
    return factor + root * factor.trace() / size * torch.eye(size, dtype=torch.float64)
