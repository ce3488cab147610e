"""Sparse family: small entries of ΔW dropped, and sign conflicts resolved (TIES)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from sst_lightning.algebra.methods.arguments import check
from sst_lightning.algebra.methods.base import EntrywiseMethod
from sst_lightning.algebra.methods.problem import MergeProblem, ModuleProblem
from sst_lightning.algebra.top_entries import (
    ThresholdSearch,
    keep_top_,
    kept_count,
    magnitude_threshold,
)

Definition = Literal["paper", "peft", "mergekit"]
Elect = Literal["sum", "count"]


class MagnitudePruning(EntrywiseMethod):
    """ΔW = Σ w_i top(ΔW_i): each task vector keeps its entries of largest magnitude.

    Per module, ⌊density · size⌋ entries of each ΔW_i are kept, and all that tie with the smallest
    of them (PEFT's ``magnitude_prune`` keeps an arbitrary choice of those). Kept entries are not
    rescaled. The weights w_i, α among them, multiply afterwards.

    Args:
        density: share of each ΔW's entries that is kept, in (0, 1].

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "magnitude_pruning"
    family = "sparse"
    summary = "the weighted sum of each adapter's entries of largest magnitude"
    formula = "Σ w_i top_density(ΔW_i)"
    source = "Han et al. 2015, arXiv 1506.02626; PEFT's magnitude_prune"

    def __init__(self, density: float = 0.2) -> None:
        check("MagnitudePruning", "density", 0 < density <= 1, "in (0, 1]", density)
        self.density = density

    def merge_entries(self, deltas: Tensor, module: ModuleProblem, prepared: Any) -> Tensor:
        """Trim and add."""
        trim_(deltas, self.density)
        return weighted_sum_(deltas, module.weights)


class TIES(EntrywiseMethod):
    """ΔW = λ · mean of the w_i top(ΔW_i) that have the elected sign: trim, elect, merge.

    One name, three results in the field; ``definition`` says which:

    - ``paper``: the task vectors are w_i ΔW_i. Each is trimmed over the whole flattened adapter, so
      that modules with large entries keep more; the sign of Σ w_i ΔW_i wins; the entry is the mean
      of those that are not 0 and agree. Where the sum is exactly 0 nobody is elected and the entry
      is 0 (sgn 0 = 0; the authors' code takes the majority sign of the model there).
    - ``peft`` (0.21): trimmed per module; the sign of the *unweighted* sum Σ ΔW_i wins, + where it
      is 0; Σ w_i ΔW_i of the agreeing entries is divided by their number. So α scales the safety
      adapter's entries, but has no say in the election.
    - ``mergekit``: trimmed per module; the sign of Σ w_i ΔW_i wins, + where it is 0; Σ w_i ΔW_i of
      the agreeing entries is divided by Σ w_i over them. So an entry that one adapter alone holds
      keeps its full size whatever its weight: α acts only where adapters overlap.

    With all weights 1 the last two agree. All three keep ⌊density · size⌋ entries and those that tie
    with the smallest of them (the authors' code keeps one more; in PEFT and mergekit an arbitrary
    choice among ties stays). mergekit's own default density is 1, which trims nothing. FusionBench
    is ``paper`` with ``normalise`` off (its ``merge_func: sum``) and a ``scale`` below 1.

    Args:
        density: share of each task vector's entries that is kept, in (0, 1].
        definition: ``paper``, ``peft`` or ``mergekit``.
        elect: what decides the sign: ``sum`` of the entries, or ``count``, the majority of their
            signs (PEFT's ``frequency``), where two adapters that disagree are a tie.
        normalise: divide the sum of the agreeing entries as the definition says; off, it stays a sum.
        scale: λ, the factor of the merged task vector.

    Raises:
        SSTMergeError: an argument is out of range.
    """

    name = "ties"
    family = "sparse"
    summary = "trimmed adapters merged where their entries have the elected sign"
    formula = "λ · mean{w_i top(ΔW_i) : sgn(w_i top(ΔW_i)) = sgn(Σ w_j top(ΔW_j))}"
    source = "Yadav et al. 2023, arXiv 2306.01708, algorithm 1"

    def __init__(
        self,
        density: float = 0.2,
        definition: Definition = "paper",
        elect: Elect = "sum",
        normalise: bool = True,
        scale: float = 1.0,
    ) -> None:
        check("TIES", "density", 0 < density <= 1, "in (0, 1]", density)
        check_election("TIES", definition, elect, scale)
        self.density = density
        self.definition = definition
        self.elect = elect
        self.normalise = normalise
        self.scale = scale

    def prepare(self, problem: MergeProblem) -> list[float] | None:
        """Return each adapter's threshold over the whole model, where the definition trims so."""
        if self.definition != "paper":
            return None
        return model_thresholds(problem, self.density)

    def merge_entries(self, deltas: Tensor, module: ModuleProblem, prepared: Any) -> Tensor:
        """Trim, elect and merge."""
        trim_(deltas, self.density, prepared)
        merged = elect_and_merge_(
            deltas, module.weights, self.definition, self.elect, self.normalise
        )
        return merged.mul_(self.scale)


def model_thresholds(problem: MergeProblem, density: float) -> list[float] | None:
    """Return the magnitude above which each adapter keeps ⌊density · size⌋ entries of the model.

    Modules come densified one after another, twice. A weight scales all of an adapter's entries,
    so it changes nothing in which of them are kept.

    Returns:
        One threshold per adapter; ``None`` if all entries are kept.
    """
    if density >= 1:
        return None
    names = list(problem.space.bases)
    # Not a list of modules, which would hold the factors of all of them.
    count = kept_count(density, sum(math.prod(problem.module(name, 1.0).shape) for name in names))
    searches = [ThresholdSearch(count) for _ in problem.adapters]
    for number in range(2):
        for name in names:
            for search, delta in zip(searches, problem.module(name, 1.0).deltas(), strict=True):
                search.update(delta)
        if number == 0:
            for search in searches:
                search.next_pass()
    return [search.threshold() for search in searches]


def trim_(deltas: Tensor, density: float, thresholds: Sequence[float] | None = None) -> None:
    """Keep the entries of largest magnitude of each ΔW_i, in place.

    Args:
        deltas: (n, d_out, d_in) fp32.
        density: share of the entries that is kept.
        thresholds: smallest magnitude that each ΔW_i keeps; not given, that of its own entries.
    """
    if density >= 1:
        return
    for index, delta in enumerate(deltas):
        threshold = thresholds[index] if thresholds else magnitude_threshold(delta, density)
        keep_top_(delta, threshold)


def weighted_sum_(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """Return Σ w_i ΔW_i, (d_out, d_in), in the memory of ΔW_1."""
    merged = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight)
    return merged


def elect_and_merge_(
    deltas: Tensor,
    weights: Sequence[float],
    definition: Definition,
    elect: Elect,
    normalise: bool,
) -> Tensor:
    """Elect a sign per entry and merge the entries that have it, in the memory of ``deltas``.

    Args:
        deltas: sparse ΔW_i, (n, d_out, d_in); overwritten.
        weights: weight of each.
        definition: where the weights enter, what divides, and who wins a tie; see :class:`TIES`.
        elect: ``sum`` or ``count``.
        normalise: whether the sum is divided at all.

    Returns:
        The merged entries, (d_out, d_in).
    """
    if definition != "peft":
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(weight)
    if elect == "sum":
        sign = deltas.sum(0).sign_()
    else:
        sign = deltas[0].sign()
        for delta in deltas[1:]:
            sign.add_(delta.sign())
        sign.sign_()
    if definition != "paper":
        sign.masked_fill_(sign == 0, 1.0)
    divisor = sign.new_zeros(sign.shape if normalise else 0)
    merged = deltas[0]
    for index, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        # The magnitudes of what agrees; everything else becomes 0, but NaN stays.
        delta.mul_(sign).clamp_(min=0)
        if normalise:
            divisor.add_(delta > 0, alpha=weight if definition == "mergekit" else 1.0)
        if definition == "peft":
            delta.mul_(weight)
        if index:
            merged.add_(delta)
    if normalise:
        merged.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return merged.mul_(sign)


def check_election(method: str, definition: str, elect: str, scale: float) -> None:
    """Refuse bad parameters of an election.

    Raises:
        SSTMergeError: names the parameter.
    """
    known = ("paper", "peft", "mergekit")
    check(method, "definition", definition in known, "paper, peft or mergekit", definition)
    check(method, "elect", elect in ("sum", "count"), "sum or count", elect)
    check(method, "scale", 0 < scale < math.inf, "positive and finite", scale)
