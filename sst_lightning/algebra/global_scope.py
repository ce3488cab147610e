"""One problem across all modules, whose core gradients are concatenated (exact Fishers).

Only N × N matrices, sums over modules, are live next to one module's samples: with vec(M) the
concatenation of all cores, XXᵀ = Σ_m X_m X_mᵀ and Xδ = Σ_m X_m δ_m.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.filters import (
    Projector,
    check_weights,
    directions,
    dual_weights,
    hard_filter,
)
from sst_lightning.algebra.fisher import ExactFisher, ModuleFisher
from sst_lightning.algebra.gevp import Array, GeneralisedEigen, solve_gram

Fishers = Mapping[str, ModuleFisher]


@dataclass(frozen=True)
class GlobalEigen:
    """Solution of F_s v = λ (F_u + εI) v across modules, in the span of the samples X = [S; U].

    Attributes:
        eigen: solution in the coordinates of the orthonormal frame E = Xᵀ · basis, (r, r).
        basis: (N, r).
    """

    eigen: GeneralisedEigen
    basis: Array


def solve_global(safety: Fishers, utility: Fishers, damping: float) -> GlobalEigen:
    """Solve one GEVP across the modules of ``safety``.

    Args:
        safety: exact F_s by module.
        utility: exact F_u by module.
        damping: ρ, relative to tr(F_u)/rank over all modules.

    Raises:
        FisherError: a Fisher does not keep sequences, or modules have different numbers of them.
    """
    names = list(safety)
    counts, size = _check(names, safety, utility)
    gram = _gram(names, safety, utility, 1.0, 1.0)
    basis, eigen = solve_gram(gram.numpy(), counts[0], damping, min(counts[1], size))
    return GlobalEigen(eigen, basis)


def hard_filter_global(
    delta: Mapping[str, Tensor],
    safety: Fishers,
    utility: Fishers,
    solution: GlobalEigen,
    k: int | float,
    projector: Projector = "euclidean",
) -> Cores:
    """Project all cores together onto the top-k directions of :func:`solve_global`.

    Args:
        delta: safety cores by module, (p, q).
        safety: F_s by module.
        utility: F_u by module.
        solution: of these two.
        k: number of directions, or as a float in (0, 1] the share of all coordinates.
        projector: see :func:`~sst_lightning.algebra.filters.hard_filter`.
    """
    names = list(delta)
    basis = torch.from_numpy(solution.basis)
    products = torch.zeros(len(basis), dtype=torch.float64)
    for name, stacked in _samples(names, safety, utility, 1.0, 1.0):
        products += stacked @ delta[name].double().flatten()
    # E is orthonormal and holds V: projecting δ is projecting its coordinates Eᵀδ.
    size = sum(core.numel() for core in delta.values())
    count = min(directions(k, size), basis.shape[1])
    weights = basis @ hard_filter(basis.T @ products, solution.eigen, count, projector)
    return {
        name: (stacked.T @ weights).reshape(delta[name].shape)
        for name, stacked in _samples(names, safety, utility, 1.0, 1.0)
    }


def soft_filter_global(
    delta: Mapping[str, Tensor], safety: Fishers, utility: Fishers, mu: float, rho: float
) -> Cores:
    """Soft filter of all cores together, in the dual form of ``soft_filter_dual``.

    Each Fisher is divided by its mean eigenvalue over all modules.

    Args:
        delta: safety cores by module, (p, q).
        safety: exact F_s by module.
        utility: exact F_u by module.
        mu: weight of utility, ≥ 0.
        rho: weight of staying near δ_s, > 0.

    Raises:
        FisherError: μ or ρ is out of range, a Fisher is zero or does not keep sequences, or
            modules have different numbers of them.
    """
    check_weights(mu, rho)
    names = list(delta)
    counts, size = _check(names, safety, utility)
    means = [sum(part[name].trace() for name in names) / size for part in (safety, utility)]
    if not all(0 < mean < math.inf for mean in means):
        raise FisherError(
            f"mean eigenvalues of the Fishers are {means}: calibration rows give no gradient"
        )
    scales = 1 / math.sqrt(means[0]), math.sqrt(mu / means[1])
    # Xδ for μ = 1, which is what the right-hand side needs: μ may be 0.
    products = torch.zeros(counts[1], dtype=torch.float64)
    for name in names:
        fisher = utility[name]
        assert isinstance(fisher, ExactFisher)
        products += fisher.factor() @ delta[name].double().flatten() / math.sqrt(means[1])
    weights = dual_weights(_gram(names, safety, utility, *scales), products, rho)
    return {
        name: delta[name].double()
        - math.sqrt(mu) * (stacked.T @ weights).reshape(delta[name].shape)
        for name, stacked in _samples(names, safety, utility, *scales)
    }


def _check(names: list[str], safety: Fishers, utility: Fishers) -> tuple[tuple[int, int], int]:
    """Return (N_s, N_u) and the number of coordinates of all modules."""
    counts: set[tuple[int, int]] = set()
    for name in names:
        for fisher in (safety[name], utility[name]):
            if not isinstance(fisher, ExactFisher):
                raise FisherError("scope 'global' needs exact Fishers (estimator: exact)")
        counts.add((safety[name].count, utility[name].count))
    if len(counts) != 1:
        raise FisherError(
            "scope 'global' needs the same sequences in every module's Fisher, got "
            f"{sorted(counts)} sequences"
        )
    return counts.pop(), sum(safety[name].size for name in names)


def _samples(
    names: list[str], safety: Fishers, utility: Fishers, safety_scale: float, utility_scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield each module's [a S; b U], (N, pq) fp64."""
    for name in names:
        parts = safety[name], utility[name]
        assert isinstance(parts[0], ExactFisher)
        assert isinstance(parts[1], ExactFisher)
        yield (
            name,
            torch.cat([safety_scale * parts[0].factor(), utility_scale * parts[1].factor()]),
        )


def _gram(
    names: list[str], safety: Fishers, utility: Fishers, safety_scale: float, utility_scale: float
) -> Tensor:
    products = (x @ x.T for _, x in _samples(names, safety, utility, safety_scale, utility_scale))
    total = next(products)
    for product in products:
        total += product
    return total
