"""Generalised eigenvalue problem F_s v = λ F_u v (DESIGN.md section 2; FISHER.md section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import ExactFisher, KroneckerFisher, ModuleFisher

Array = NDArray[np.float64]
Solver = Literal["auto", "dense", "dual", "kronecker"]

GRAM_TOLERANCE = 1e-12


@dataclass(frozen=True)
class GeneralisedEigen:
    """Solution of F_s v = λ (F_u + εI) v.

    Attributes:
        values: λ, (k,), descending.
        vectors: V, (n, k), Vᵀ(F_u + εI)V = I.
    """

    values: Array
    vectors: Array


def relative_damping(damping: float, trace: float, rank: int) -> float:
    """Return ε = ρ · tr(F_u) / rank.

    Raises:
        FisherError: the damping is not positive, or F_u is zero.
    """
    if damping <= 0:
        raise FisherError(f"damping must be positive, got {damping}")
    if not trace > 0:
        raise FisherError("the utility Fisher is zero: its calibration rows give no gradient here")
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
    values, vectors = scipy.linalg.eigh(
        (safety + safety.T) / 2, (utility + utility.T) / 2 + epsilon * np.eye(size)
    )
    return GeneralisedEigen(values[::-1], vectors[:, ::-1])


def solve_dual(safety: Array, utility: Array, damping: float) -> GeneralisedEigen:
    """Solve in the span of the samples; for more coordinates than sequences.

    F_s = SᵀS and F_u = UᵀU. Directions outside the span of both have F_s v = 0 and are left out.
    The Gram matrix K of [S; U] gives an orthonormal basis of the span, in which the problem is
    small. The Woodbury form is avoided: it loses all digits when rows of S lie near span(U).

    Args:
        safety: S, (N_s, n).
        utility: U, (N_u, n).
        damping: ρ, relative to tr(F_u)/min(N_u, n).
    """
    stacked = np.concatenate([safety, utility])
    coefficients, values = _solve_gram(
        stacked @ stacked.T, len(safety), damping, min(utility.shape)
    )
    return GeneralisedEigen(values, stacked.T @ coefficients)


def solve_kronecker(
    safety: KroneckerFisher, utility: KroneckerFisher, damping: float
) -> GeneralisedEigen:
    """Solve two small problems: λ_ij = α_i β_j, v_ij = a_i ⊗ b_j.

    The damping must be factored to keep the structure: each factor of F_u gets √ρ times its own
    mean eigenvalue.
    """
    root = damping**0.5
    outputs = solve_dense(
        safety.output_factor.double().numpy(), utility.output_factor.double().numpy(), root
    )
    inputs = solve_dense(
        safety.input_factor.double().numpy(), utility.input_factor.double().numpy(), root
    )
    values = np.outer(outputs.values, inputs.values).ravel()
    vectors = np.kron(outputs.vectors, inputs.vectors)
    order = np.argsort(values)[::-1]
    return GeneralisedEigen(values[order], vectors[:, order])


def solve(
    safety: ModuleFisher, utility: ModuleFisher, damping: float, solver: Solver = "auto"
) -> GeneralisedEigen:
    """Solve F_s v = λ (F_u + εI) v of one module.

    Args:
        safety: F_s.
        utility: F_u, of the same estimator.
        damping: ρ, relative to tr(F_u)/rank.
        solver: ``auto`` takes kronecker for K-FAC, dual for exact Fishers with fewer sequences
            than coordinates, dense otherwise.

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


def solve_global(
    safety: Mapping[str, ExactFisher], utility: Mapping[str, ExactFisher], damping: float
) -> tuple[Array, dict[str, Array]]:
    """Solve one problem across all modules, whose core gradients are concatenated.

    Only the (N_s + N_u)² Gram matrix, a sum over modules, is live.

    Returns:
        λ (k,), descending, and V by module, (pq, k).
    """
    gram = 0.0
    size = 0
    for name in safety:
        stacked = _stacked(safety[name], utility[name])
        gram = gram + stacked @ stacked.T
        size += stacked.shape[1]
    count = next(iter(safety.values())).count
    rank = min(size, next(iter(utility.values())).count)
    coefficients, values = _solve_gram(np.asarray(gram), count, damping, rank)
    vectors = {name: _stacked(safety[name], utility[name]).T @ coefficients for name in safety}
    return values, vectors


def held_out_values(
    vectors: Array, safety: ModuleFisher, utility: ModuleFisher, damping: float
) -> Array:
    """Rayleigh quotients vᵀF_s v / vᵀ(F_u + εI)v on Fishers the vectors were not made from, (k,)."""
    epsilon = relative_damping(damping, utility.trace(), fisher_rank(utility))
    numerator, denominator = (_quadratic(fisher, vectors) for fisher in (safety, utility))
    return numerator / (denominator + epsilon * (vectors**2).sum(axis=0))


def fisher_rank(fisher: ModuleFisher) -> int:
    """Largest rank the estimate can have: N sequences give an exact Fisher at most rank N."""
    p, q = fisher.shape
    return min(fisher.count, p * q) if isinstance(fisher, ExactFisher) else p * q


def choose_solver(safety: ModuleFisher, utility: ModuleFisher, solver: Solver) -> Solver:
    """Resolve ``auto`` and refuse what does not fit.

    Raises:
        FisherError: different estimators, or a solver for another estimator.
    """
    if type(safety) is not type(utility):
        raise FisherError("both Fishers must be of the same estimator")
    exact = isinstance(safety, ExactFisher)
    kronecker = isinstance(safety, KroneckerFisher)
    if solver == "auto":
        if kronecker:
            return "kronecker"
        p, q = safety.shape
        return "dual" if exact and safety.count + utility.count < p * q else "dense"
    if (solver == "dual" and not exact) or (solver == "kronecker" and not kronecker):
        raise FisherError(f"solver '{solver}' does not work with a {type(safety).__name__}")
    return solver


def _solve_gram(gram: Array, count: int, damping: float, rank: int) -> tuple[Array, Array]:
    """Coefficients C (N, k) of V = [S;U]ᵀC, and λ."""
    eigenvalues, basis = np.linalg.eigh((gram + gram.T) / 2)
    keep = eigenvalues > GRAM_TOLERANCE * eigenvalues[-1]
    eigenvalues, basis = eigenvalues[keep], basis[:, keep]
    reduced = basis * np.sqrt(eigenvalues)
    safety, utility = reduced[:count], reduced[count:]
    epsilon = relative_damping(damping, float((utility**2).sum()), rank)
    values, vectors = scipy.linalg.eigh(
        safety.T @ safety, utility.T @ utility + epsilon * np.eye(reduced.shape[1])
    )
    coefficients = (basis / np.sqrt(eigenvalues)) @ vectors[:, ::-1]
    return coefficients, values[::-1]


def _stacked(safety: ExactFisher, utility: ExactFisher) -> Array:
    return np.concatenate([safety.factor().numpy(), utility.factor().numpy()])


def _quadratic(fisher: ModuleFisher, vectors: Array) -> Array:
    if isinstance(fisher, ExactFisher):
        return np.asarray(((fisher.factor().numpy() @ vectors) ** 2).sum(axis=0))
    return np.asarray((vectors * (fisher.dense().numpy() @ vectors)).sum(axis=0))
