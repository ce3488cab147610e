"""The original SST-Merge as published, kept to show by measurement what went wrong with it."""

import math
from typing import Literal

import torch
from torch import Tensor

from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.fisher import ExactFisher, ModuleFisher
from sst_lightning.algebra.methods.base import AdditiveMethod
from sst_lightning.algebra.methods.curvature import module_fishers
from sst_lightning.algebra.methods.problem import MergeProblem

FACTOR_TOLERANCE = 1e-6

Factors = tuple[Tensor, Tensor]
"""A' (r, q) and B' (p, r) of a core M = B'A', or one number for each of their entries."""


class SSTPublished(AdditiveMethod):
    """A reproduction of the published SST-Merge and of its defects; use SST to merge.

    With the diagonal Fishers f_u, f_s of the safety adapter's *factors* the problem
    F_s v = λ F_u v has the unit vectors as eigenvectors and λ_i = f_s,i / (f_u,i + 1e-6), so it
    only ranks single coordinates. The k first *of the whole adapter* are kept, all others are 0, and
    the masked factors are merged: M_u + α B″A″. What follows from that: k = 5 to 20 of millions of
    coordinates leave next to nothing; a coordinate of A′ counts only if its row's partner in B′ is
    kept too; and an absolute 1e-6 changes the ranking with the unit of the loss: what is far above
    the Fisher's entries ranks by f_s alone.

    What is *not* reproduced, so that only these defects are measured: gradients are per sequence, in
    eval mode and without padding, not those of mini-batch means, and utility adapters are merged as
    ΔW, not factor by factor. The coordinates are those of A′ = √S Vᵀ, B′ = U√S of the core's SVD
    M_s = USVᵀ: the original used the trained A and B in full width, whose diagonal Fisher depends on
    the factorisation that was trained and cannot be had from core gradients. Those of A′ and B′ can:
    with g the gradient of the core they are B′ᵀg and gA′ᵀ.

    Args:
        k: coordinates kept, over all modules (published: 5, 10 and 20).
        regularization: what is added to f_u, as an absolute number.
        projector: ``mask`` keeps the k coordinates as they are, which is V Vᵀφ with the unit
            vectors of the published code's diagonal case. ``published`` is the formula V Vᵀφ with
            the F_u-normalised V that a GEVP solver returns, v_i = e_i / √(f_u,i + regularization):
            each coordinate is divided by f_u,i + regularization, so V Vᵀ is no projector.

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "sst_published"
    family = "curvature"
    summary = "the original SST-Merge with its defects: k coordinates of the safety factors"
    formula = "M_u + α (m_B∘B′)(m_A∘A′), m = 1 at the k largest f_s/(f_u + 10⁻⁶) of all modules"
    source = "the published description of SST-Merge"
    requires_fisher = True

    def __init__(
        self,
        k: int = 10,
        regularization: float = 1e-6,
        projector: Literal["mask", "published"] = "mask",
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SSTMergeError(
                f"SSTPublished: k must be a number of coordinates (1, 2, …), got {k!r}"
            )
        if isinstance(regularization, bool) or not 0 < regularization < math.inf:
            raise SSTMergeError(
                f"SSTPublished: regularization must be positive and finite, got {regularization!r}"
            )
        if projector not in ("mask", "published"):
            raise SSTMergeError(
                f"SSTPublished: projector must be mask or published, got {projector!r}"
            )
        self.k = k
        self.regularization = regularization
        self.projector = projector

    def filter_safety(self, problem: MergeProblem) -> Cores:
        """Return the core of the masked safety factors.

        Raises:
            FisherError: a Fisher is missing or does not keep the gradients of sequences.
        """
        factors: dict[str, Factors] = {}
        ratios: dict[str, Factors] = {}
        damped: dict[str, Factors] = {}
        for name, core in problem.safety.items():
            if not bool(core.any()):
                continue  # ΔW = 0 has no coordinates
            module = problem.module(name, 0.0)
            given = module.factors[-1]
            assert given is not None
            factors[name] = canonical_factors(core, given.rank)
            utility, safety = (
                factor_fisher(self._exact(fisher, name, core), factors[name])
                for fisher in module_fishers("SSTPublished", module)
            )
            damped[name] = utility[0] + self.regularization, utility[1] + self.regularization
            ratios[name] = safety[0] / damped[name][0], safety[1] / damped[name][1]
        masks = self._masks(ratios)
        result = {name: torch.zeros_like(core) for name, core in problem.safety.items()}
        for name, (a, b) in factors.items():
            scales = masks[name]
            if self.projector == "published":
                scales = scales[0] / damped[name][0], scales[1] / damped[name][1]
            result[name] = (scales[1] * b) @ (scales[0] * a)
        return result

    def _masks(self, ratios: dict[str, Factors]) -> dict[str, Factors]:
        """1 at the k largest ratios of all modules, 0 elsewhere."""
        if not ratios:
            return {}
        flat = torch.cat([item.flatten() for pair in ratios.values() for item in pair])
        # A stable sort, so that equal ratios are taken in the order of modules on every machine.
        kept = torch.sort(flat, descending=True, stable=True)[1][: self.k]
        mask = torch.zeros_like(flat)
        mask[kept] = 1
        sizes = [item.numel() for pair in ratios.values() for item in pair]
        parts = iter(mask.split(sizes))
        return {
            name: (next(parts).reshape(a.shape), next(parts).reshape(b.shape))
            for name, (a, b) in ratios.items()
        }

    def _exact(self, fisher: ModuleFisher, name: str, core: Tensor) -> ExactFisher:
        if not isinstance(fisher, ExactFisher):
            raise FisherError(
                "SSTPublished needs the gradients of sequences that estimator 'exact' keeps, but "
                f"module '{name}' has a {type(fisher).__name__}: collect them again with "
                "estimator: exact"
            )
        if fisher.shape != tuple(core.shape):
            raise FisherError(
                f"module '{name}': the core is {tuple(core.shape)}, but its Fisher is of "
                f"{fisher.shape}"
            )
        return fisher


def canonical_factors(core: Tensor, rank: int) -> Factors:
    """Return A' = √S Vᵀ (r, q) and B' = U√S (p, r) of the core's SVD, M = B'A'.

    Unique up to a sign of each pair of a row of A' and a column of B' (with distinct singular
    values), which neither a squared gradient nor a masked product sees. Directions below fp32
    rounding are left out: their singular vectors are noise.

    Args:
        core: M, (p, q).
        rank: rank of the adapter.
    """
    u, s, vt = torch.linalg.svd(core.double(), full_matrices=False)
    count = min(rank, int((s > FACTOR_TOLERANCE * s[0]).sum()))
    root = s[:count].sqrt()
    return root[:, None] * vt[:count], u[:, :count] * root


def factor_fisher(fisher: ExactFisher, factors: Factors) -> Factors:
    """Return the diagonal Fishers E[(B'ᵀg)²] of A' (r, q) and E[(gA'ᵀ)²] of B' (p, r).

    Args:
        fisher: of the core M, at samples g.
        factors: A' (r, q) and B' (p, r).
    """
    a, b = factors
    samples, shares = fisher.samples.double(), fisher.shares()
    return (
        torch.einsum("n,nrq->rq", shares, (b.T @ samples).square()),
        torch.einsum("n,npr->pr", shares, (samples @ a.T).square()),
    )
