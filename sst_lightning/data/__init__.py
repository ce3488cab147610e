"""Data of the three adapters: A5 RepliQA, A6 Alpaca, A7 Security."""

from sst_lightning.data.datamodules import Alpaca, RepliQA, Security, TextDataModule
from sst_lightning.data.rows import Row
from sst_lightning.data.safety_utility import EvaluationTask, SafetyUtilityData

__all__ = [
    "Alpaca",
    "EvaluationTask",
    "RepliQA",
    "Row",
    "SafetyUtilityData",
    "Security",
    "TextDataModule",
]
