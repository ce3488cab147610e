"""Budgeted merging: the largest α, or the safest variant, that utility can afford."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.methods import MergeMethod, MergeProblem
from sst_lightning.algebra.rank import RankRule
from sst_lightning.algebra.statistics import Interval, bootstrap
from sst_lightning.data.safety_utility import BUDGET, SafetyUtilityData
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.processes import gather_by_id, on_rank_zero

FIRST_ALPHA = 0.25
LARGEST_ALPHA = 8.0
SMALLEST_ALPHA = 2.0**-10
FEWEST_ROWS = 10
"""Rows below which a bootstrap interval says nothing."""
BISECTIONS = 4
"""Steps after the bracket α, 2α is found: the result is within 5 % of the largest α."""

Scores = dict[str, tuple[float, float]]
"""Row id to summed completion NLL and number of tokens."""


@dataclass(frozen=True)
class Trial:
    """One merge that was measured on the calibration split.

    Attributes:
        method: label of the variant.
        alpha: weight of the safety adapter.
        drop: relative increase of the utility NLL over the utility model's, with its interval.
        affordable: whether the interval's upper end is within the budget.
    """

    method: str
    alpha: float
    drop: Interval
    affordable: bool

    def record(self) -> dict[str, Any]:
        """Return the trial for merge.json."""
        return {
            "method": self.method,
            "alpha": self.alpha,
            "utility_drop": self.drop.value,
            "low": self.drop.low,
            "high": self.drop.high,
            "affordable": self.affordable,
        }


class Budget:
    """Searches merges whose utility drop stays below a limit with 95 % confidence.

    The drop of a merge is the relative increase of the completion NLL per token on utility rows,
    paired with the utility model's; a merge is affordable if the upper end of the bootstrap interval
    is at most the limit. The base model stays loaded: a trial swaps factors in hooks and costs one
    pass over the rows.

    Args:
        trainer: runs the validation passes.
        model: holds the adapters.
        datamodule: gives the rows (its validation set ``budget``).
        prepare: returns what a method prepared, and its problem.
        limit: largest utility drop, such as 0.01.
        rule: rank of the merged adapters.

    Raises:
        SSTMergeError: the limit is not a share, or there are too few rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        prepare: Callable[[MergeMethod], tuple[Any, MergeProblem]],
        limit: float,
        rule: RankRule,
    ) -> None:
        check_limit(limit)
        self.trainer = trainer
        self.model = model
        self.datamodule = datamodule
        self.prepare = prepare
        self.limit = limit
        self.rule = rule
        self.trials: list[Trial] = []
        self._reference: Scores | None = None
        rows = datamodule.budget_description()
        if rows["rows"] < FEWEST_ROWS:
            raise SSTMergeError(
                f"a budget needs at least {FEWEST_ROWS} utility rows, there are {rows['rows']}: raise "
                "data.budget_samples, or give the data set more calibration rows"
            )
        if rows["shared_with_fisher"]:
            rank_zero_warn(
                f"{rows['shared_with_fisher']} of the {rows['rows']} budget rows are also rows of a "
                "Fisher, on which a merge looks cheaper than it is: lower data.calibration_samples"
            )

    def search(self, methods: Sequence[MergeMethod]) -> tuple[MergeMethod, float]:
        """Return the method and α of the safest affordable merge.

        For each method the largest affordable α is found by doubling and bisection; between methods
        the lowest NLL of refusals on the calibration attacks decides.

        Raises:
            SSTMergeError: no α of any method is affordable.
        """
        found: list[tuple[float, MergeMethod, float]] = []
        for method in methods:
            largest = self._largest(method)
            if largest is None:
                continue
            alpha, adapter = largest
            refusal = 0.0
            if len(methods) > 1:
                refusal = _per_token(self._measure(adapter, "safety"))
            found.append((refusal, method, alpha))
        if not found:
            lowest = min(self.trials, key=lambda trial: trial.alpha)
            raise SSTMergeError(
                f"--max_utility_drop {self.limit:g}: even α = {lowest.alpha:g} may cost "
                f"{100 * (lowest.drop.high or 0):.2g} % of utility (upper end of the 95 % interval on "
                f"{lowest.drop.n} rows). Allow a larger drop, or give more rows "
                "(data.budget_samples)"
            )
        _, method, alpha = min(found, key=lambda item: item[0])
        kind = "largest α" if len(methods) == 1 else "merge that refuses most surely"
        rank_zero_info(
            f"{method.label()} α={alpha:.3g}: the {kind} within a utility drop of "
            f"{100 * self.limit:g} %, of {len(self.trials)} merges tried"
        )
        return method, alpha

    def record(self) -> dict[str, Any]:
        """Return the limit and all trials for merge.json."""
        return {
            "max_utility_drop": self.limit,
            "rows": self.datamodule.budget_description(),
            "trials": [trial.record() for trial in self.trials],
        }

    def _largest(self, method: MergeMethod) -> tuple[float, LoraAdapter] | None:
        """Return the largest affordable α and its merge, by doubling and bisection."""
        prepared, problem = self.prepare(method)
        best: tuple[float, LoraAdapter] | None = None
        too_much: float | None = None

        def attempt(alpha: float) -> None:
            nonlocal best, too_much
            adapter = on_rank_zero(
                lambda: method.merge_prepared(problem, prepared, alpha, self.rule).adapter,
                self.trainer,
            )
            if self._affordable(method, alpha, adapter):
                best = alpha, adapter
            else:
                too_much = alpha

        alpha = FIRST_ALPHA
        while alpha <= LARGEST_ALPHA and too_much is None:
            attempt(alpha)
            alpha *= 2
        if too_much is None:
            rank_zero_info(f"{method.label()}: the search ends at its largest α, {LARGEST_ALPHA:g}")
            return best
        while best is None and too_much / 2 >= SMALLEST_ALPHA:
            attempt(too_much / 2)
        for _ in range(BISECTIONS if best is not None else 0):
            assert best is not None
            attempt((best[0] * too_much) ** 0.5)
        return best

    def _affordable(self, method: MergeMethod, alpha: float, adapter: LoraAdapter) -> bool:
        if self._reference is None:
            self._reference = self._measure(self.model.utility_merge(), BUDGET)
        reference, scores = self._reference, self._measure(adapter, BUDGET)
        before, after = (
            np.array([part[row][0] for row in reference]) for part in (reference, scores)
        )
        drop = bootstrap(lambda x, y: (y - x).sum(axis=-1) / x.sum(axis=-1), before, after)
        affordable = drop.high is not None and drop.high <= self.limit
        self.trials.append(Trial(method.label(), alpha, drop, affordable))
        rank_zero_info(
            f"{method.label()} α={alpha:.3g}: utility drop {100 * (drop.value or 0):+.2f} % "
            f"({100 * (drop.low or 0):+.2f} to {100 * (drop.high or 0):+.2f} %), "
            f"{'within' if affordable else 'over'} the budget"
        )
        return affordable

    def _measure(self, adapter: LoraAdapter, name: str) -> Scores:
        self.model.use_adapter(adapter)
        collector = _SequenceScores()
        self.trainer.callbacks.append(collector)  # type: ignore[attr-defined]
        self.datamodule.select_validation([name])
        try:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        finally:
            self.trainer.callbacks.remove(collector)  # type: ignore[attr-defined]
            self.datamodule.select_validation(None)
        return collector.gathered(self.trainer)


def check_limit(limit: float) -> None:
    """Refuse a limit no merge could keep, before any work.

    Raises:
        SSTMergeError: the limit is not between 0 and 1.
    """
    if not 0 < limit < 1:
        raise SSTMergeError(
            f"--max_utility_drop must be a share between 0 and 1, such as 0.01, got {limit}"
        )


def variants(method: MergeMethod, search: Mapping[str, Sequence[Any]] | None) -> list[MergeMethod]:
    """Return the method with every combination of the searched parameters.

    Raises:
        SSTMergeError: a parameter the method does not have, or a value it refuses.
    """
    if search is None:
        return [method]
    empty = [name for name, values in search.items() if not values]
    if empty or not search:
        raise SSTMergeError(
            f"search: no values for {empty[0]}"
            if empty
            else "search: name a parameter and its values"
        )
    return [
        method.with_parameters(**dict(zip(search, values, strict=True)))
        for values in product(*search.values())
    ]


class _SequenceScores(Callback):
    """Keeps the NLL of each row that a validation pass sees."""

    def __init__(self) -> None:
        self.scores: Scores = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the step's sums."""
        values = zip(outputs["sequence_nll"].tolist(), outputs["tokens"].tolist(), strict=True)
        for row, (nll, tokens) in zip(batch["rows"], values, strict=True):
            self.scores[row.id] = nll, tokens

    def gathered(self, trainer: Trainer) -> Scores:
        """Return the scores of all processes, sorted by row."""
        return dict(sorted(gather_by_id(self.scores, trainer).items()))


def _per_token(scores: Scores) -> float:
    return sum(nll for nll, _ in scores.values()) / sum(tokens for _, tokens in scores.values())
