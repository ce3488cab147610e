"""What a merge method is, and the three forms its result can take.

A method merges one module at a time, so that a merge needs memory for one module. What it has to
know of all modules first (a threshold over the whole adapter, a global eigenproblem) it computes in
:meth:`MergeMethod.prepare`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.errors import AdapterError, SSTMergeError
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.algebra.methods.problem import MergeProblem, ModuleProblem
from sst_lightning.algebra.rank import EXACT, RankRule, truncate_dense, truncate_factors

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps an iterable of module names, to show how far it is."""
Store = MutableMapping[str, LoraFactors]
"""Keeps the merged modules: a dictionary, or files."""


@dataclass(frozen=True)
class Merged:
    """A merge.

    Attributes:
        adapter: the merged adapter.
        discarded: share of Σ‖ΔW‖² that the rank rule discarded.
        discarded_by_module: the same by module.
    """

    adapter: LoraAdapter
    discarded: float
    discarded_by_module: dict[str, float] = field(default_factory=dict)


class MergeMethod(ABC):
    """Merges adapters into one.

    Attributes:
        name: name in the registry, in folders and in tables.
        family: ``linear``, ``sparse``, ``spectral``, ``curvature`` or ``safety``.
        summary: what it does, in one line.
        formula: what it computes.
        source: paper, section or equation.
        requires_fisher: whether it uses Fishers.
        uses_alpha: whether α, the safety adapter's weight, enters.
        iterations: how often the utility Fisher is taken again at the merge.
        iteration_alpha: α of the merges those Fishers are taken at.
        estimator: Fisher estimator the method wants.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    requires_fisher: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = True
    iterations: int = 0
    iteration_alpha: float = 1.0
    estimator: str = "exact"

    def check(self, problem: MergeProblem, alphas: Sequence[float]) -> None:
        """Refuse adapters or weights that the method cannot merge, before any work.

        Args:
            problem: the adapters; without Fishers.
            alphas: the α that are asked for.

        Raises:
            SSTMergeError: names what does not fit. By default everything does.
        """
        del problem, alphas

    def prepare(self, problem: MergeProblem) -> Any:
        """Return what does not depend on α and needs more than one module: nothing by default."""
        del problem
        return None

    @abstractmethod
    def merge_module(
        self, module: ModuleProblem, prepared: Any, rule: RankRule
    ) -> tuple[LoraFactors, float]:
        """Return the factors of the merged ΔW and the share of ‖ΔW‖² that was discarded.

        Args:
            module: the module, with the weights.
            prepared: what :meth:`prepare` returned.
            rule: rank of the result.
        """

    def merge(
        self,
        problem: MergeProblem,
        alpha: float,
        rule: RankRule = EXACT,
        progress: Progress = iter,
        store: Store | None = None,
    ) -> Merged:
        """Merge all modules.

        Args:
            problem: the adapters, and the Fishers if the method wants them.
            alpha: weight of the safety adapter.
            rule: rank of the result.
            progress: wraps the names of the modules, such as ``tqdm``.
            store: where merged modules are kept; in memory when not given.
        """
        return self.merge_prepared(problem, self.prepare(problem), alpha, rule, progress, store)

    def merge_prepared(
        self,
        problem: MergeProblem,
        prepared: Any,
        alpha: float,
        rule: RankRule = EXACT,
        progress: Progress = iter,
        store: Store | None = None,
    ) -> Merged:
        """Merge all modules, for one of several α that share ``prepared``."""
        return joined(
            problem,
            (
                (name, *self.merge_module(problem.module(name, alpha), prepared, rule))
                for name in progress(problem.space.bases)
            ),
            store,
        )

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
        """Name that tells variants apart: with the parameters that differ from the defaults."""
        return "_".join([self.name, *self.differing()])

    def parameters(self) -> dict[str, Any]:
        """Return the method's parameters for reports: those of its constructor."""
        return self._arguments()

    def differing(self) -> list[str]:
        """Return ``key_value`` of each parameter that differs from its default."""
        defaults = self._defaults()
        result = []
        for key, value in self.parameters().items():
            if value == defaults[key]:
                continue
            if isinstance(value, dict):
                text = json.dumps(value, sort_keys=True).encode()
                result.append(f"{key}_{sha256(text).hexdigest()[:6]}")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                result.append(f"{key}_{value}")
            else:
                result.append(f"{key}_{value:.12g}")
        return result

    def with_parameters(self, **changes: Any) -> "MergeMethod":
        """Return the same method with some parameters changed.

        Raises:
            SSTMergeError: the method has no such parameter, or refuses its value.
        """
        unknown = sorted(set(changes) - set(self._defaults()))
        if unknown:
            raise SSTMergeError(
                f"{self.name} has no parameter '{unknown[0]}'; it has {', '.join(self._defaults())}"
            )
        return self._registered()(**{**self._arguments(), **changes})

    def _arguments(self) -> dict[str, Any]:
        """Value of every constructor parameter."""
        return {key: getattr(self, key) for key in self._defaults()}

    def _defaults(self) -> dict[str, Any]:
        """Constructor parameters of the registered class with their defaults."""
        parameters = signature(self._registered()).parameters
        return {key: item.default for key, item in parameters.items()}

    def _registered(self) -> type["MergeMethod"]:
        """The class that has the name; jsonargparse derives others from it."""
        return next(item for item in type(self).__mro__ if "name" in vars(item))


class CoreMethod(MergeMethod):
    """A method whose merged ΔW lies in core space: exact, whatever the width of the model."""

    @abstractmethod
    def merge_core(self, module: ModuleProblem, prepared: Any) -> Tensor:
        """Return the merged core M, (p, q) fp64."""

    def merge_module(
        self, module: ModuleProblem, prepared: Any, rule: RankRule
    ) -> tuple[LoraFactors, float]:
        """Merge the core and decode it by an SVD of (p, q)."""
        return module.basis.decode(self.merge_core(module, prepared), rule)


class AdditiveMethod(CoreMethod):
    """M = M_u + α · filter(M_s): the utility merge plus what a filter leaves of the safety core."""

    @abstractmethod
    def filter_safety(self, problem: MergeProblem) -> Cores:
        """Return the part of the safety core that is merged."""

    def prepare(self, problem: MergeProblem) -> Cores:
        """Return the filtered safety core: it does not depend on α."""
        return self.filter_safety(problem)

    def merge(
        self,
        problem: MergeProblem,
        alpha: float,
        rule: RankRule = EXACT,
        progress: Progress = iter,
        store: Store | None = None,
    ) -> Merged:
        """Merge all modules; a filter by module sees one module's Fishers at a time."""
        if not self.by_module:
            return super().merge(problem, alpha, rule, progress, store)

        def one(name: str) -> tuple[LoraFactors, float]:
            part = problem.only(name)
            return self.merge_module(part.module(name, alpha), self.prepare(part), rule)

        parts = ((name, *one(name)) for name in progress(problem.space.bases))
        return joined(problem, parts, store)

    @property
    def by_module(self) -> bool:
        """Whether the filter of a module depends on that module alone."""
        return False

    def merge_core(self, module: ModuleProblem, prepared: Any) -> Tensor:
        """Return M_u + α · filtered."""
        core: Tensor = module.utility_core() + module.alpha * prepared[module.name]
        return core


class FactorMethod(MergeMethod):
    """A method whose merged ΔW has a low rank, but not in core space."""

    @abstractmethod
    def merge_factors(self, module: ModuleProblem, prepared: Any) -> LoraFactors:
        """Return factors of the merged ΔW."""

    def merge_module(
        self, module: ModuleProblem, prepared: Any, rule: RankRule
    ) -> tuple[LoraFactors, float]:
        """Merge, and reduce the rank by QR and the SVD of a small core."""
        return truncate_factors(self.merge_factors(module, prepared), rule)


class EntrywiseMethod(MergeMethod):
    """A method that acts on the entries of ΔW: one module is densified at a time.

    Its result has no low rank; truncation to the adapter's rank is an approximation, and how much
    it discards is reported.
    """

    @abstractmethod
    def merge_entries(self, deltas: Tensor, module: ModuleProblem, prepared: Any) -> Tensor:
        """Return the merged ΔW, (d_out, d_in).

        Args:
            deltas: ΔW_i without weights, (n, d_out, d_in) fp32; may be overwritten.
            module: the module, with the weights.
            prepared: what :meth:`prepare` returned.
        """

    def merge_module(
        self, module: ModuleProblem, prepared: Any, rule: RankRule
    ) -> tuple[LoraFactors, float]:
        """Densify, merge and truncate."""
        merged = self.merge_entries(module.deltas(), module, prepared)
        if not torch.isfinite(merged).all():
            raise AdapterError(
                f"{self.name}: the merged ΔW of module '{module.name}' is not finite"
            )
        return truncate_dense(merged, rule, module.sum_of_ranks)


def joined(
    problem: MergeProblem,
    parts: Iterable[tuple[str, LoraFactors, float]],
    store: Store | None = None,
) -> Merged:
    """Put the merged modules together.

    Args:
        problem: gives the name of the base model.
        parts: name, factors and discarded share of each module.
        store: where the factors are kept; in memory when not given.
    """
    factors: Store = {} if store is None else store
    discarded: dict[str, float] = {}
    for name, merged, share in parts:
        factors[name], discarded[name] = merged, share
    lost = total = 0.0
    # The norms cost as much as a small merge: only where something was discarded at all.
    for name, share in discarded.items() if any(discarded.values()) else ():
        kept = squared_norm(factors[name])
        # The truncation is orthogonal: ‖ΔW‖² = kept / (1 − discarded).
        energy = kept / (1 - share) if share < 1 else kept
        lost += share * energy
        total += energy
    bases = [adapter.base_model for adapter in problem.adapters if adapter.base_model]
    adapter = LoraAdapter(factors, bases[-1] if bases else None)
    return Merged(adapter, lost / total if total > 0 else 0.0, discarded)


def squared_norm(factors: LoraFactors) -> float:
    """Return ‖ΔW‖² from the factors: s² tr(BᵀB AAᵀ)."""
    b, a = factors.B.double(), factors.A.double()
    return float(factors.scaling**2 * ((b.T @ b) * (a @ a.T)).sum())
