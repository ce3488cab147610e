"""How outputs of each kind are scored: mixins in front of a suite."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch

from sst_lightning.metrics.choices import ChoiceAccuracy
from sst_lightning.metrics.nll import CompletionNLL
from sst_lightning.metrics.per_example import PerExampleMetric
from sst_lightning.metrics.refusal import VerdictRate
from sst_lightning.metrics.refusal_judge import Verdict
from sst_lightning.suites.base import Measure
from sst_lightning.suites.items import LikelihoodItem, Output
from sst_lightning.suites.sources import answers_of, ids_of


def _tokens(item: LikelihoodItem, output: Output) -> int:
    return output.tokens[0]


class ChoiceScoring:
    """Accuracy: the choice with the largest log-likelihood is the answer."""

    measure: ClassVar[Measure] = "choice"
    primary: ClassVar[str] = "accuracy"

    def metrics(self) -> dict[str, PerExampleMetric]:
        """Return the accuracy."""
        return {"accuracy": ChoiceAccuracy()}

    def update(
        self, metrics: Mapping[str, Any], items: Sequence[Any], outputs: Sequence[Output]
    ) -> None:
        """Score outputs."""
        metrics["accuracy"].update(
            ids_of(items),
            [output.log_likelihoods for output in outputs],
            [item.answer for item in items],
        )


class LikelihoodScoring:
    """NLL of the completion per unit.

    Attributes:
        units: for each metric, the number of units of an item that its NLL is divided by.
    """

    measure: ClassVar[Measure] = "likelihood"
    primary: ClassVar[str] = "nll"
    units: ClassVar[Mapping[str, Callable[[LikelihoodItem, Output], int]]] = {"nll": _tokens}

    def metrics(self) -> dict[str, PerExampleMetric]:
        """Return the NLL per unit."""
        return {name: CompletionNLL() for name in self.units}

    def update(
        self, metrics: Mapping[str, Any], items: Sequence[Any], outputs: Sequence[Output]
    ) -> None:
        """Score outputs."""
        nll = torch.tensor([-output.log_likelihoods[0] for output in outputs], dtype=torch.float64)
        for name, unit in self.units.items():
            counts = [unit(item, output) for item, output in zip(items, outputs, strict=True)]
            metrics[name].update(ids_of(items), nll, torch.tensor(counts))


class VerdictScoring:
    """Rates of the verdicts of the rule-based judge, which add up to 1."""

    measure: ClassVar[Measure] = "generation"
    primary: ClassVar[str] = "refusal"

    def metrics(self) -> dict[str, PerExampleMetric]:
        """Return the rate of each verdict."""
        return {verdict: VerdictRate(verdict) for verdict in get_args(Verdict)}

    def update(
        self, metrics: Mapping[str, Any], items: Sequence[Any], outputs: Sequence[Output]
    ) -> None:
        """Score outputs."""
        prompts = [item.prompt for item in items]
        for verdict in get_args(Verdict):
            metrics[verdict].update(ids_of(items), answers_of(outputs), prompts)
