"""SST-Merge: the safety adapter filtered by curvature."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from sst_lightning.algebra.accumulators import Estimator
from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.filters import Projector, hard_filter, soft_filter
from sst_lightning.algebra.fisher import ModuleFisher
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.algebra.gevp import Solver, solve
from sst_lightning.algebra.global_scope import (
    hard_filter_global,
    soft_filter_global,
    solve_global,
)
from sst_lightning.algebra.methods.arguments import check
from sst_lightning.algebra.methods.base import AdditiveMethod
from sst_lightning.algebra.methods.layers import layer_patterns, layer_weight
from sst_lightning.algebra.methods.problem import MergeProblem


class SST(AdditiveMethod):
    """M = M_u + α · filter(M_s): safety is added where F_s v = λ F_u v has large λ.

    ``soft`` takes δ = argmin (δ − M_s)ᵀ(F_s + ρI)(δ − M_s) + μ δᵀF_u δ: near the safety adapter
    where safety is sensitive, and small where utility is. That is (F_s+ρI+μF_u)⁻¹(F_s+ρI) M_s, and
    multiplies each coordinate in the eigenbasis of (F_s + ρI) v = λ F_u v by λ/(λ+μ), so that
    directions that matter to neither task are kept. Each Fisher is divided by its mean eigenvalue
    first. ``hard`` keeps the top-k generalised eigenvectors and drops the rest: the step-function
    limit. With ``iterations`` F_u is taken again at the merge, where refused look-alikes have large
    gradients, and the filter starts again from M_s. Nothing is solved for α, which may exceed 1.

    Args:
        filter: ``soft`` multiplies each generalised eigendirection by λ/(λ+μ); ``hard`` keeps the
            top-k directions and drops the rest.
        mu: weight of utility in the soft filter; larger values protect utility more.
        rho: ridge of F_s in the soft filter, in mean eigenvalues.
        k: directions the hard filter keeps per module: a number, or a share of them up to 1.0.
        projector: hard filter: ``euclidean`` V(VᵀV)⁻¹Vᵀ, or ``fisher`` V VᵀF_u (damped F_u).
        damping: hard filter: damping of F_u, relative to tr(F_u)/rank.
        iterations: how often F_u is taken again at the merge and the filter applied again.
        iteration_alpha: α of the merges that those Fishers are taken at.
        harmless_share: share of harmless look-alikes in F_u, where the data has them.
        merge_share: share of the utility rows' part of F_u that is taken at the merge.
        residual_ratio: r in r·M_s + (1−r)·filter(M_s) (the original's V2).
        layer_weights: preset (safety_first, balanced, utility_first, minimal) or module patterns
            with weights (the original's V3).
        scope: ``module``: one problem per module; ``global``: one across all modules.
        solver: ``auto``, ``dense``, ``dual`` (estimator exact) or ``kronecker`` (estimator kfac).
        estimator: Fisher estimator: ``exact``, ``kfac``, ``ekfac``, ``diagonal`` or ``vila``.

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "sst"
    family = "curvature"
    summary = (
        "the safety adapter where its curvature exceeds that of utility (soft filter by default)"
    )
    formula = (
        "soft: M_u + α (F_s+ρI+μF_u)⁻¹(F_s+ρI) M_s; hard: M_u + α P_k M_s, P_k the projector onto the "
        "top-k v of F_s v = λ F_u v"
    )
    source = "this project; the hard filter is the original SST-Merge's idea"
    requires_fisher = True

    def __init__(
        self,
        filter: Literal["soft", "hard"] = "soft",
        mu: float = 10.0,
        rho: float = 0.1,
        k: int | float = 0.25,
        projector: Projector = "euclidean",
        damping: float = 0.1,
        iterations: int = 1,
        iteration_alpha: float = 1.5,
        harmless_share: float = 0.5,
        merge_share: float = 0.5,
        residual_ratio: float = 0.0,
        layer_weights: str | dict[str, float] | None = None,
        scope: Literal["module", "global"] = "module",
        solver: Solver = "auto",
        estimator: Estimator = "exact",
    ) -> None:
        check("SST", "filter", filter in ("soft", "hard"), "soft or hard", filter)
        check("SST", "mu", 0 <= mu < math.inf, "0 or more and finite", mu)
        check("SST", "rho", 0 < rho < math.inf, "positive and finite", rho)
        is_count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        is_share = isinstance(k, float) and 0 < k <= 1
        check(
            "SST", "k", is_count or is_share, "a number of directions (1, 2, …) or a share ≤ 1.0", k
        )
        check(
            "SST",
            "projector",
            projector in ("euclidean", "fisher"),
            "euclidean or fisher",
            projector,
        )
        check("SST", "damping", 0 < damping < math.inf, "positive and finite", damping)
        check("SST", "iterations", iterations >= 0, "0 or more", iterations)
        check("SST", "iteration_alpha", 0 < iteration_alpha < math.inf, "positive", iteration_alpha)
        check("SST", "harmless_share", 0 <= harmless_share < 1, "in [0, 1)", harmless_share)
        check("SST", "merge_share", 0 <= merge_share <= 1, "in [0, 1]", merge_share)
        check("SST", "residual_ratio", 0 <= residual_ratio <= 1, "in [0, 1]", residual_ratio)
        check("SST", "scope", scope in ("module", "global"), "module or global", scope)
        estimators = get_args(Estimator)
        check(
            "SST",
            "estimator",
            estimator in estimators,
            f"one of {', '.join(estimators)}",
            estimator,
        )
        special = {"exact": ("dual",), "kfac": ("kronecker",)}.get(estimator, ())
        allowed = ("auto", "dual") if scope == "global" else ("auto", "dense", *special)
        if scope == "global" and estimator != "exact":
            raise SSTMergeError("SST: scope 'global' needs estimator 'exact'")
        kind = f"{', '.join(allowed)} with estimator '{estimator}' and scope '{scope}'"
        check("SST", "solver", solver in allowed, kind, solver)
        self.filter = filter
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

    @property
    def by_module(self) -> bool:
        """Whether the filter of a module depends on that module alone."""
        return self.scope == "module"

    def filter_safety(self, problem: MergeProblem) -> Cores:
        """Return the filtered safety core; depends on ``problem`` alone.

        Raises:
            FisherError: the Fishers are missing, zero, or not those of the problem's modules.
        """
        safety, utility = problem.fisher_safety, problem.fisher_utility
        if safety is None or utility is None:
            raise FisherError("SST needs the Fishers of safety and utility")
        # Where the safety adapter has no ΔW there is nothing to filter, and a Fisher may be zero.
        cores = {name: core for name, core in problem.safety.items() if bool(core.any())}
        missing = [name for name in cores if name not in safety or name not in utility]
        if missing:
            raise FisherError(
                f"no Fisher for module '{missing[0]}': collect them with these adapters"
            )
        if self.scope == "global":
            filtered = self._global(cores, safety, utility)
        else:
            filtered = {
                name: self.filter_module(name, core, safety[name], utility[name])
                for name, core in cores.items()
            }
        result: Cores = {}
        for name, core in problem.safety.items():
            part = filtered.get(name, core)
            part = self.residual_ratio * core + (1 - self.residual_ratio) * part
            result[name] = layer_weight(name, self.patterns) * part
        return result

    def filter_module(
        self, name: str, core: Tensor, safety: ModuleFisher, utility: ModuleFisher
    ) -> Tensor:
        """Return what the filter leaves of ``core``, (p, q), in one module.

        Raises:
            FisherError: the Fishers are zero or do not fit; names the module.
        """
        try:
            if self.filter == "soft":
                return soft_filter(core, safety, utility, self.mu, self.rho, self.solver)
            eigen = solve(safety, utility, self.damping, self.solver)
            return hard_filter(core, eigen, self.k, self.projector)
        except FisherError as error:
            raise FisherError(f"module '{name}': {error}") from error

    def utility_mixture(
        self, at_adapters: Mapping[str, FisherStatistics], at_merge: Mapping[str, FisherStatistics]
    ) -> list[tuple[float, FisherStatistics]]:
        """Mix utility rows and harmless look-alikes, the latter at the newest point.

        Taken at a merge, harmless prompts that are refused by now have large gradients: their
        Fisher sees the directions that over-refusal comes from (docs/mathematics.md section 6).
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
        """``sst_soft`` or ``sst_hard``, with what differs from the defaults: ``sst_soft_mu_30``."""
        extra = [item for item in self.differing() if not item.startswith("filter_")]
        # "kfac" and "global" say enough without "estimator" and "scope" before them.
        extra = [item.removeprefix("estimator_").removeprefix("scope_") for item in extra]
        if isinstance(self.k, float):
            # k = 1 is one direction, k = 1.0 all of them.
            extra = [f"k_share_{self.k:.12g}" if item.startswith("k_") else item for item in extra]
        return "_".join([self.name, self.filter, *extra])

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that this variant uses."""
        common: dict[str, Any] = {
            "filter": self.filter,
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
        if self.filter == "soft":
            return {**common, "mu": self.mu, "rho": self.rho}
        return {**common, "k": self.k, "projector": self.projector, "damping": self.damping}

    def _global(
        self,
        cores: Cores,
        safety: Mapping[str, ModuleFisher],
        utility: Mapping[str, ModuleFisher],
    ) -> Cores:
        if not cores:
            return {}
        if self.filter == "soft":
            return soft_filter_global(cores, safety, utility, self.mu, self.rho)
        parts = [{name: fishers[name] for name in cores} for fishers in (safety, utility)]
        solution = solve_global(parts[0], parts[1], self.damping)
        return hard_filter_global(cores, safety, utility, solution, self.k, self.projector)
