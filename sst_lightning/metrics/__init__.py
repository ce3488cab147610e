"""torchmetrics of utility and safety; all keep per-example scores."""

from sst_lightning.metrics.nll import CompletionNLL
from sst_lightning.metrics.per_example import PerExampleMetric, row_key
from sst_lightning.metrics.refusal import VerdictRate
from sst_lightning.metrics.refusal_judge import judge
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.metrics.text import ContainsMatch, ExactMatch, RougeL

__all__ = [
    "CompletionNLL",
    "ContainsMatch",
    "ExactMatch",
    "ModelScores",
    "PerExampleMetric",
    "RougeL",
    "VerdictRate",
    "judge",
    "row_key",
]
