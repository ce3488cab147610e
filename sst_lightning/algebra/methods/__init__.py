"""Merge methods: one file per family, and a registry by name."""

from sst_lightning.algebra.methods.alignguard import AlignGuard
from sst_lightning.algebra.methods.base import (
    AdditiveMethod,
    CoreMethod,
    EntrywiseMethod,
    FactorMethod,
    Merged,
    MergeMethod,
)
from sst_lightning.algebra.methods.boosting import SubspaceBoosting
from sst_lightning.algebra.methods.consensus import ConsensusTaskArithmetic, ConsensusTIES
from sst_lightning.algebra.methods.curvature import FisherAveraging, RegMean
from sst_lightning.algebra.methods.dropping import DARE, DARETIES
from sst_lightning.algebra.methods.knots import KnOTS
from sst_lightning.algebra.methods.linear import (
    Concatenation,
    ExPO,
    TaskArithmetic,
    WeightAveraging,
)
from sst_lightning.algebra.methods.problem import MergeProblem, ModuleProblem
from sst_lightning.algebra.methods.published import SSTPublished
from sst_lightning.algebra.methods.resta import RESTA
from sst_lightning.algebra.methods.safe_lora import SafeLoRA, SafeMERGE
from sst_lightning.algebra.methods.sparse import TIES, MagnitudePruning
from sst_lightning.algebra.methods.spectral import IsoC, TSVMerge
from sst_lightning.algebra.methods.sst import SST
from sst_lightning.algebra.methods.sst_spectral import SSTSpectral

METHODS: dict[str, type[MergeMethod]] = {
    method.name: method
    for method in (
        TaskArithmetic,
        WeightAveraging,
        ExPO,
        Concatenation,
        MagnitudePruning,
        TIES,
        DARE,
        DARETIES,
        ConsensusTaskArithmetic,
        ConsensusTIES,
        KnOTS,
        TSVMerge,
        IsoC,
        SubspaceBoosting,
        SST,
        SSTSpectral,
        SSTPublished,
        FisherAveraging,
        RegMean,
        SafeLoRA,
        SafeMERGE,
        RESTA,
        AlignGuard,
    )
}
"""Name to class, family by family."""

__all__ = [
    "DARE",
    "DARETIES",
    "METHODS",
    "RESTA",
    "SST",
    "TIES",
    "AdditiveMethod",
    "AlignGuard",
    "Concatenation",
    "ConsensusTIES",
    "ConsensusTaskArithmetic",
    "CoreMethod",
    "EntrywiseMethod",
    "ExPO",
    "FactorMethod",
    "FisherAveraging",
    "IsoC",
    "KnOTS",
    "MagnitudePruning",
    "MergeMethod",
    "MergeProblem",
    "Merged",
    "ModuleProblem",
    "RegMean",
    "SSTPublished",
    "SSTSpectral",
    "SafeLoRA",
    "SafeMERGE",
    "SubspaceBoosting",
    "TSVMerge",
    "TaskArithmetic",
    "WeightAveraging",
]
