"""SST-Merge: the safety adapter filtered by curvature."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.filters import (
    directions,
    hard_filter,
    soft_filter,
    soft_filter_global,
)
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.algebra.gevp import Solver, solve, solve_global
from sst_lightning.algebra.methods.base import MergeMethod, MergeProblem
from sst_lightning.algebra.methods.layers import layer_patterns, layer_weight


class SST(MergeMethod):
    """Adds the safety adapter where F_s v = λ F_u v has large λ (DESIGN.md section 2).

    Args:
        filter: ``soft`` multiplies each generalised eigendirection by λ/(λ+μ); ``hard`` keeps the
            top-k directions and drops the rest.
        mu: weight of utility in the soft filter; larger values protect utility more.
        rho: ridge of F_s in the soft filter, in mean eigenvalues.
        k: directions the hard filter keeps per module: a number, or a share of them up to 1.0.
        projector: hard filter: ``euclidean`` V(VᵀV)⁻¹Vᵀ or ``fisher`` V VᵀF_u.
        damping: hard filter: damping of F_u, relative to tr(F_u)/rank.
        iterations: how often F_u is taken again at the merge and the filter applied again.
        iteration_alpha: α of the merges that those Fishers are taken at.
        harmless_share: share of harmless look-alikes in F_u, where the data has them.
        merge_share: share of the utility rows' part of F_u that is taken at the merge.
        residual_ratio: r in r·M_s + (1−r)·filter(M_s) (the original's V2).
        layer_weights: preset (safety_first, balanced, utility_first, minimal) or module patterns
            with weights (the original's V3).
        scope: ``module``: one problem per module; ``global``: one across all modules.
        solver: ``auto``, ``dense``, ``dual`` or ``kronecker``.
        estimator: Fisher estimator: ``exact``, ``kfac`` or ``diagonal``.

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "sst"
    requires_fisher = True

    def __init__(
        self,
        filter: Literal["soft", "hard"] = "soft",
        mu: float = 10.0,
        rho: float = 0.1,
        k: int | float = 0.25,
        projector: Literal["euclidean", "fisher"] = "euclidean",
        damping: float = 0.1,
        iterations: int = 1,
        iteration_alpha: float = 1.5,
        harmless_share: float = 0.5,
        merge_share: float = 0.5,
        residual_ratio: float = 0.0,
        layer_weights: str | dict[str, float] | None = None,
        scope: Literal["module", "global"] = "module",
        solver: Solver = "auto",
        estimator: Literal["exact", "kfac", "diagonal"] = "exact",
    ) -> None:
        _check("mu", mu >= 0, "0 or more")
        _check("rho", rho > 0, "positive")
        _check("k", k > 0 and (isinstance(k, int) or k <= 1), "a number of directions or a share")
        _check("damping", damping > 0, "positive")
        _check("iterations", iterations >= 0, "0 or more")
        _check("harmless_share", 0 <= harmless_share < 1, "in [0, 1)")
        _check("merge_share", 0 <= merge_share <= 1, "in [0, 1]")
        _check("residual_ratio", 0 <= residual_ratio <= 1, "in [0, 1]")
        _check("filter", filter in ("soft", "hard"), "soft or hard")
        _check("projector", projector in ("euclidean", "fisher"), "euclidean or fisher")
        _check("scope", scope in ("module", "global"), "module or global")
        if scope == "global" and (estimator != "exact" or projector != "euclidean"):
            raise SSTMergeError("SST: scope 'global' needs estimator exact and projector euclidean")
        self.kind = filter
        self.mu = mu
        self.rho = rho
        self.k = k
        self.projector = projector
        self.damping = damping
        self.iterations = iterations
        self.iteration_alpha = iteration_alpha
        self.harmless_share = harmless_share
        self.merge_share = merge_share
        self.residual_ratio = residual_ratio
        self.layer_weights = layer_weights
        self.patterns = layer_patterns(layer_weights)
        self.scope = scope
        self.solver = solver
        self.estimator = estimator

    def filter(self, problem: MergeProblem) -> Cores:
        """Return the filtered safety core; the Fishers must be in ``problem``."""
        safety, utility = problem.fisher_safety, problem.fisher_utility
        if safety is None or utility is None:
            raise SSTMergeError("SST needs the Fishers of safety and utility")
        names = [name for name, core in problem.safety.items() if bool(core.any())]
        problem_safety = {name: problem.safety[name] for name in names}
        if self.scope == "global":
            filtered = self._global(problem_safety, safety, utility)
        else:
            filtered = {
                name: self._module(core, safety[name], utility[name])
                for name, core in problem_safety.items()
            }
        result: Cores = {}
        for name, core in problem.safety.items():
            part = filtered.get(name, core)
            part = self.residual_ratio * core + (1 - self.residual_ratio) * part
            result[name] = layer_weight(name, self.patterns) * part
        return result

    def utility_mixture(
        self, at_adapters: Mapping[str, FisherStatistics], at_merge: Mapping[str, FisherStatistics]
    ) -> list[tuple[float, FisherStatistics]]:
        """Mix utility rows and harmless look-alikes, the latter at the newest point.

        Taken at a merge, harmless prompts that are refused by now have large gradients: their
        Fisher sees the directions that over-refusal comes from (DESIGN.md section 2).
        """
        newest = {**at_adapters, **at_merge}
        harmless = self.harmless_share if "harmless" in newest else 0.0
        rows = 1 - harmless
        merged = self.merge_share * rows if "utility" in at_merge else 0.0
        parts = [(rows - merged, at_adapters["utility"])]
        if merged:
            parts.append((merged, at_merge["utility"]))
        if harmless:
            parts.append((harmless, newest["harmless"]))
        return [(weight, part) for weight, part in parts if weight > 0]

    def label(self) -> str:
        """``sst_soft``, ``sst_hard``, with what differs from the defaults of estimator and scope."""
        extra = [self.estimator] if self.estimator != "exact" else []
        extra += [self.scope] if self.scope != "module" else []
        extra += ["residual"] if self.residual_ratio else []
        extra += ["layers"] if self.patterns else []
        return "_".join([self.name, self.kind, *extra])

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that this variant uses."""
        common: dict[str, Any] = {
            "filter": self.kind,
            "estimator": self.estimator,
            "scope": self.scope,
            "solver": self.solver,
            "iterations": self.iterations,
            "iteration_alpha": self.iteration_alpha,
            "harmless_share": self.harmless_share,
            "merge_share": self.merge_share,
            "residual_ratio": self.residual_ratio,
            "layer_weights": self.layer_weights,
        }
        if self.kind == "soft":
            return {**common, "mu": self.mu, "rho": self.rho}
        return {**common, "k": self.k, "projector": self.projector, "damping": self.damping}

    def _module(self, core: torch.Tensor, safety: Any, utility: Any) -> torch.Tensor:
        if self.kind == "soft":
            return soft_filter(core, safety, utility, self.mu, self.rho, self.solver)
        eigen = solve(safety, utility, self.damping, self.solver)
        return hard_filter(core, eigen, self.k, self.projector, utility)

    def _global(self, cores: Cores, safety: Mapping[str, Any], utility: Mapping[str, Any]) -> Cores:
        if self.kind == "soft":
            return soft_filter_global(cores, safety, utility, self.mu, self.rho)
        exact = [
            {name: fishers[name] for name in cores if isinstance(fishers[name], ExactFisher)}
            for fishers in (safety, utility)
        ]
        if any(len(fishers) != len(cores) for fishers in exact):
            raise SSTMergeError("SST: scope 'global' needs exact Fishers")
        _, vectors = solve_global(exact[0], exact[1], self.damping)
        flat = np.concatenate([cores[name].double().numpy().ravel() for name in cores])
        stacked = np.concatenate([vectors[name] for name in cores])
        basis, _ = np.linalg.qr(stacked[:, : directions(self.k, stacked.shape[1])])
        projected = torch.from_numpy(basis @ (basis.T @ flat))
        pieces = projected.split([core.numel() for core in cores.values()])
        return {
            name: piece.reshape(core.shape)
            for (name, core), piece in zip(cores.items(), pieces, strict=True)
        }


def _check(name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise SSTMergeError(f"SST: {name} must be {expected}")
