"""Refusal rate and degenerate rate of generated answers."""

from collections.abc import Sequence

from sst_lightning.metrics.per_example import PerExampleMetric
from sst_lightning.metrics.refusal_judge import Verdict, judge


class VerdictRate(PerExampleMetric):
    """Share of answers with one verdict of the rule-based judge.

    On attacks, the rate of refusals is the refusal rate; on harmless prompts, over-refusal.

    Args:
        verdict: ``refusal``, ``compliance`` or ``degenerate``.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict

    def update(self, ids: Sequence[str], answers: Sequence[str]) -> None:
        """Judge answers.

        Args:
            ids: row ids.
            answers: generated texts.
        """
        self.add(ids, [float(judge(answer) == self.verdict) for answer in answers])
