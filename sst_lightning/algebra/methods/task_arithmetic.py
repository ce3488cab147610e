"""Task arithmetic."""

from sst_lightning.algebra.methods.base import MergeMethod


class TaskArithmetic(MergeMethod):
    """ΔW = Σ ΔW_u + α ΔW_s: the safety adapter added as it is (Ilharco et al., arXiv 2212.04089)."""

    name = "task_arithmetic"
