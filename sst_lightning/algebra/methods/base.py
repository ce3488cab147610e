"""What a merge method is."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sst_lightning.algebra.core import Cores, CoreSpace
from sst_lightning.algebra.fisher import ModuleFisher
from sst_lightning.algebra.fisher_file import FisherStatistics


@dataclass(frozen=True)
class MergeProblem:
    """Everything a method may use.

    Attributes:
        space: core space of all adapters.
        utility: cores M_u of the utility merge.
        safety: cores M_s of the safety adapter.
        fisher_utility: F_u by module; ``None`` for methods that need no Fisher.
        fisher_safety: F_s by module.
    """

    space: CoreSpace
    utility: Cores
    safety: Cores
    fisher_utility: Mapping[str, ModuleFisher] | None = None
    fisher_safety: Mapping[str, ModuleFisher] | None = None


class MergeMethod(ABC):
    """A merge M = M_u + α · filter(M_s).

    Attributes:
        name: name in the registry, in folders and in tables.
        requires_fisher: whether ``filter`` uses Fishers.
        iterations: how often the utility Fisher is taken again at the merge.
        iteration_alpha: α of the merges those Fishers are taken at.
        estimator: Fisher estimator the method wants.
    """

    name: ClassVar[str]
    requires_fisher: ClassVar[bool] = False
    iterations: int = 0
    iteration_alpha: float = 1.0
    estimator: str = "exact"

    def filter(self, problem: MergeProblem) -> Cores:
        """Return the part of the safety core that is merged: all of it, unless overridden."""
        return problem.safety

    def combine(self, problem: MergeProblem, filtered: Cores, alpha: float) -> Cores:
        """Return M_u + α · filtered."""
        return {name: core + alpha * filtered[name] for name, core in problem.utility.items()}

    def merge(self, problem: MergeProblem, alpha: float) -> Cores:
        """Return the merged cores."""
        return self.combine(problem, self.filter(problem), alpha)

    def utility_mixture(
        self, at_adapters: Mapping[str, FisherStatistics], at_merge: Mapping[str, FisherStatistics]
    ) -> list[tuple[float, FisherStatistics]]:
        """Return the weighted parts of F_u.

        Args:
            at_adapters: Fishers by calibration set (``utility``, ``harmless``), at the utility merge.
            at_merge: the same at the last merge of an iteration; empty before the first.
        """
        del at_merge
        return [(1.0, at_adapters["utility"])]

    def label(self) -> str:
        """Name that tells this method's variants apart."""
        return self.name

    def parameters(self) -> dict[str, Any]:
        """Return the method's parameters for reports."""
        return {}
