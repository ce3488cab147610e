"""SST on a spectral merge: what the safety adapter changes in it, filtered."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from sst_lightning.algebra.accumulators import Estimator
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.algebra.methods.arguments import check
from sst_lightning.algebra.methods.base import CoreMethod
from sst_lightning.algebra.methods.boosting import SubspaceBoosting
from sst_lightning.algebra.methods.problem import ModuleProblem
from sst_lightning.algebra.methods.spectral import TSVMerge
from sst_lightning.algebra.methods.sst import SST

Spectral = Literal["tsv_merge", "subspace_boosting"]


class SSTSpectral(CoreMethod):
    """M = M_0 + filter(M_α − M_0), M_α the spectral merge of all adapters at α.

    SST's soft filter, argmin (δ − D)ᵀ(F_s + ρI)(δ − D) + μ δᵀF_u δ, does not ask where the change D
    comes from. :class:`SST` gives it the safety adapter, D = α M_s, and adds what is left to the sum
    of the utility adapters. Here M_0 is the spectral merge of the utility adapters alone, and D what
    the safety adapter changes in it. The two see different things: a spectral merge takes apart
    singular vectors that the adapters share, and knows nothing of data; the filter knows from
    gradients which of the changes utility and harmless look-alikes can bear.

    Each Fisher is divided by its mean eigenvalue first. With one utility adapter M_0 of
    ``tsv_merge`` is that adapter with its weight. With several, Fishers are still taken at their
    weighted sum; ``iterations`` takes the look-alikes' part, and ``merge_share`` of the rest, at the
    merge instead. Where the safety adapter has no ΔW the merge is M_0. As with TSV-M, whose singular
    vectors do not depend on weights, the merge does not tend to M_0 as α → 0.

    Args:
        spectral: the spectral merge: ``tsv_merge`` (TSV-M with all components) or
            ``subspace_boosting`` (with β = 0.5).
        mu: weight of utility in the filter; larger values protect utility more.
        rho: ridge of F_s in the filter, in mean eigenvalues.
        iterations: how often F_u is taken again at the merge and the filter applied again.
        iteration_alpha: α of the merges that those Fishers are taken at.
        harmless_share: share of harmless look-alikes in F_u, where the data has them.
        merge_share: share of the utility rows' part of F_u that is taken at the merge.
        estimator: Fisher estimator: ``exact``, ``kfac``, ``ekfac``, ``diagonal`` or ``vila``.

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "sst_spectral"
    family = "curvature"
    summary = "a spectral merge of all adapters: what safety changes in it, filtered as by sst"
    formula = "M_0 + (F_s+ρI+μF_u)⁻¹(F_s+ρI)(M_α − M_0), M_α the spectral merge at α"
    source = "this project; TSV-M and subspace boosting as said at those methods"
    requires_fisher = True

    def __init__(
        self,
        spectral: Spectral = "tsv_merge",
        mu: float = 10.0,
        rho: float = 0.1,
        iterations: int = 0,
        iteration_alpha: float = 1.0,
        harmless_share: float = 0.5,
        merge_share: float = 0.5,
        estimator: Estimator = "exact",
    ) -> None:
        kinds = get_args(Spectral)
        check("SSTSpectral", "spectral", spectral in kinds, f"one of {', '.join(kinds)}", spectral)
        # The same filter, with the same checks of its arguments.
        self.filter = SST(
            mu=mu,
            rho=rho,
            iterations=iterations,
            iteration_alpha=iteration_alpha,
            harmless_share=harmless_share,
            merge_share=merge_share,
            estimator=estimator,
        )
        self.spectral = spectral
        self.mu = mu
        self.rho = rho
        self.iterations = iterations
        self.iteration_alpha = iteration_alpha
        self.harmless_share = harmless_share
        self.merge_share = merge_share
        self.estimator = estimator

    def merge_core(self, module: ModuleProblem, prepared: Any) -> Tensor:
        """Return M_0 + filter(M_α − M_0).

        Raises:
            FisherError: a Fisher is missing, zero, or not of the problem's modules.
        """
        merge = TSVMerge() if self.spectral == "tsv_merge" else SubspaceBoosting(beta=0.5)
        without = merge.merge_core(replace(module, weights=(*module.weights[:-1], 0.0)), prepared)
        if module.alpha == 0 or not bool(module.safety_core().any()):
            return without
        if module.fisher_safety is None or module.fisher_utility is None:
            raise FisherError(
                f"{self.name}: no Fisher for module '{module.name}': collect them with these adapters"
            )
        change = merge.merge_core(module, prepared) - without
        return without + self.filter.filter_module(
            module.name, change, module.fisher_safety, module.fisher_utility
        )

    def utility_mixture(
        self, at_adapters: Mapping[str, FisherStatistics], at_merge: Mapping[str, FisherStatistics]
    ) -> list[tuple[float, FisherStatistics]]:
        """Mix utility rows and harmless look-alikes as :class:`SST` does."""
        return self.filter.utility_mixture(at_adapters, at_merge)

    def label(self) -> str:
        """``sst_spectral`` with what differs: ``sst_spectral_subspace_boosting_mu_30``."""
        extra = [item.removeprefix("spectral_") for item in self.differing()]
        return "_".join([self.name, *(item.removeprefix("estimator_") for item in extra)])
