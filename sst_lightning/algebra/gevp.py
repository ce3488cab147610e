"""Generalised eigenvalue problem F_s v = λ F_u v (docs/mathematics.md section 4)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from torch import Tensor

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import ExactFisher, KroneckerFisher, ModuleFisher

Array = NDArray[np.floating[Any]]
Solver = Literal["auto", "dense", "dual", "kronecker"]

GRAM_TOLERANCE = 1e-12


@dataclass(frozen=True)
class GeneralisedEigen:
    """Solution of F_s v = λ M v with the damped metric M = F_u + εI.

    Attributes:
        values: λ, (k,), descending.
        vectors: V, (n, k), VᵀMV = I.
        images: MV, (n, k): imagesᵀδ are the coordinates of δ in V.
    """

    values: Array
    vectors: Array
    images: Array


def relative_damping(damping: float, trace: float, rank: int) -> float:
    """Return ε = ρ · tr(F_u) / rank.

    Raises:
        FisherError: the damping is not positive, or F_u is zero.
    """
    if not 0 < damping < np.inf:
        raise FisherError(f"damping must be positive and finite, got {damping}")
    if not 0 < trace < np.inf:
        raise FisherError(
            f"the utility Fisher has trace {trace}: its calibration rows give no gradient here"
        )
    return damping * trace / rank


def solve_dense(
    safety: Array, utility: Array, damping: float, rank: int | None = None
) -> GeneralisedEigen:
    """Solve with dense matrices, in fp64, symmetrised.

    Args:
        safety: F_s, (n, n).
        utility: F_u, (n, n).
        damping: ρ, relative to tr(F_u)/rank.
        rank: rank of F_u; n when not given.
    """
    size = len(utility)
    epsilon = relative_damping(damping, float(np.trace(utility)), rank or size)
    return solve_metric(safety, utility + epsilon * np.eye(size))


def solve_metric(safety: Array, metric: Array) -> GeneralisedEigen:
    """Solve F_s v = λ M v for a positive definite M, both (n, n)."""
    metric = (metric + metric.T) / 2
    values, vectors = scipy.linalg.eigh((safety + safety.T) / 2, metric)
    vectors = np.ascontiguousarray(vectors[:, ::-1])
    return GeneralisedEigen(np.ascontiguousarray(values[::-1]), vectors, metric @ vectors)


def solve_dual(safety: Array, utility: Array, damping: float) -> GeneralisedEigen:
    """Solve in the span of the samples; for more coordinates than sequences.

    F_s = SᵀS and F_u = UᵀU. Directions outside the span of both have F_s v = 0 and are left out.

    Args:
        safety: S, (N_s, n).
        utility: U, (N_u, n).
        damping: ρ, relative to tr(F_u)/min(N_u, n).
    """
    stacked = np.concatenate([safety, utility])
    basis, eigen = solve_gram(stacked @ stacked.T, len(safety), damping, min(utility.shape))
    frame = stacked.T @ basis
    vectors, images = (np.asarray(frame @ item) for item in (eigen.vectors, eigen.images))
    return GeneralisedEigen(eigen.values, vectors, images)


def solve_gram(
    gram: Array, safety_count: int, damping: float, rank: int
) -> tuple[Array, GeneralisedEigen]:
    """Solve from the inner products of all samples X = [S; U] alone.

    With XXᵀ = LΛLᵀ the rows of E = XᵀLΛ^-½ are an orthonormal frame of the span, in which
    F_s = R_sᵀR_s and F_u = R_uᵀR_u with [R_s; R_u] = LΛ^½. The Woodbury form is avoided: it loses
    all digits when rows of S lie near span(U) (docs/mathematics.md section 4).

    Args:
        gram: XXᵀ, (N, N), the N_s safety samples first.
        safety_count: N_s.
        damping: ρ, relative to tr(F_u)/rank.
        rank: rank of F_u.

    Returns:
        LΛ^-½ (N, r), so that E = Xᵀ times it, and the solution in the frame's coordinates (r, r).
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    keep = values > GRAM_TOLERANCE * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    reduced = vectors * np.sqrt(values)
    safety, utility = reduced[:safety_count], reduced[safety_count:]
    epsilon = relative_damping(damping, float((utility**2).sum()), rank)
    metric = utility.T @ utility + epsilon * np.eye(reduced.shape[1])
    return vectors / np.sqrt(values), solve_metric(safety.T @ safety, metric)


def solve_kronecker(
    safety: KroneckerFisher, utility: KroneckerFisher, damping: float
) -> GeneralisedEigen:
    """Solve two small problems: λ_ij = α_i β_j, v_ij = a_i ⊗ b_j.

    The damping must be factored to keep the structure: each factor of F_u gets √ρ times its own
    mean eigenvalue.
    """
    relative_damping(damping, utility.trace(), utility.size)  # refuses what √ρ would hide
    root = float(np.sqrt(damping))
    outputs = solve_dense(_array(safety.output_factor), _array(utility.output_factor), root)
    inputs = solve_dense(_array(safety.input_factor), _array(utility.input_factor), root)
    values = np.outer(outputs.values, inputs.values).ravel()
    order = np.argsort(values, kind="stable")[::-1]
    return GeneralisedEigen(
        values[order],
        np.kron(outputs.vectors, inputs.vectors)[:, order],
        np.kron(outputs.images, inputs.images)[:, order],
    )


def solve(
    safety: ModuleFisher, utility: ModuleFisher, damping: float, solver: Solver = "auto"
) -> GeneralisedEigen:
    """Solve F_s v = λ (F_u + εI) v of one module.

    Args:
        safety: F_s.
        utility: F_u, of the same estimator.
        damping: ρ, relative to tr(F_u)/rank.
        solver: ``auto`` takes kronecker for K-FAC, dual for exact Fishers with fewer sequences
            than coordinates, dense otherwise. Two EK-FACs have no common eigenbasis, so they are
            always solved dense: (pq)² numbers, for pq up to about 10⁴.

    Raises:
        FisherError: the solver does not work with this estimator.
    """
    solver = choose_solver(safety, utility, solver)
    if solver == "kronecker":
        assert isinstance(safety, KroneckerFisher)
        assert isinstance(utility, KroneckerFisher)
        return solve_kronecker(safety, utility, damping)
    if solver == "dual":
        assert isinstance(safety, ExactFisher)
        assert isinstance(utility, ExactFisher)
        return solve_dual(safety.factor().numpy(), utility.factor().numpy(), damping)
    rank = fisher_rank(utility)
    return solve_dense(safety.dense().numpy(), utility.dense().numpy(), damping, rank)


def held_out_values(
    vectors: Array, safety: ModuleFisher, utility: ModuleFisher, damping: float
) -> Array:
    """Rayleigh quotients vᵀF_s v / vᵀ(F_u + εI)v on Fishers that V was not made from, (k,)."""
    epsilon = relative_damping(damping, utility.trace(), fisher_rank(utility))
    numerator, denominator = (_quadratic(fisher, vectors) for fisher in (safety, utility))
    return numerator / (denominator + epsilon * (vectors**2).sum(axis=0))


def fisher_rank(fisher: ModuleFisher) -> int:
    """Largest rank the estimate can have: N sequences give an exact Fisher at most rank N."""
    return min(fisher.count, fisher.size) if isinstance(fisher, ExactFisher) else fisher.size


def choose_solver(safety: ModuleFisher, utility: ModuleFisher, solver: Solver) -> Solver:
    """Resolve ``auto`` and refuse what does not fit: see :func:`solve`.

    Raises:
        FisherError: different estimators or core spaces, or a solver for another estimator.
    """
    if type(safety) is not type(utility):
        raise FisherError(
            f"both Fishers must be of the same estimator, got {type(safety).__name__} and "
            f"{type(utility).__name__}"
        )
    if safety.shape != utility.shape:
        raise FisherError(
            f"both Fishers must be of one core space, got {safety.shape} and {utility.shape}"
        )
    exact = isinstance(safety, ExactFisher)
    kronecker = isinstance(safety, KroneckerFisher)
    if solver == "auto":
        if kronecker:
            return "kronecker"
        return "dual" if exact and safety.count + utility.count < safety.size else "dense"
    if solver not in ("dense", "dual", "kronecker"):
        raise FisherError(f"unknown solver '{solver}': use auto, dense, dual or kronecker")
    if (solver == "dual" and not exact) or (solver == "kronecker" and not kronecker):
        fitting = "auto, dual" if exact else "auto, kronecker" if kronecker else "auto"
        raise FisherError(
            f"solver '{solver}' does not work with a {type(safety).__name__}: use {fitting} or dense"
        )
    return solver


def _array(factor: Tensor) -> Array:
    return np.asarray(factor.double().numpy(), dtype=np.float64)


def _quadratic(fisher: ModuleFisher, vectors: Array) -> Array:
    if isinstance(fisher, ExactFisher):
        return np.asarray(((fisher.factor().numpy() @ vectors) ** 2).sum(axis=0))
    return np.asarray((vectors * (fisher.dense().numpy() @ vectors)).sum(axis=0))
