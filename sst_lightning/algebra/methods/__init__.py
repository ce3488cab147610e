"""Merge methods: one file per family, and a registry by name."""

from sst_lightning.algebra.methods.base import MergeMethod, MergeProblem
from sst_lightning.algebra.methods.sst import SST
from sst_lightning.algebra.methods.task_arithmetic import TaskArithmetic

METHODS: dict[str, type[MergeMethod]] = {method.name: method for method in (TaskArithmetic, SST)}

__all__ = ["METHODS", "SST", "MergeMethod", "MergeProblem", "TaskArithmetic"]
