"""Safe LoRA and SafeMERGE: modules whose update leaves the subspace of the model's own alignment."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraFactors
from sst_lightning.algebra.errors import AdapterError, BackboneError, SSTMergeError
from sst_lightning.algebra.methods.base import CoreMethod, FactorMethod, MergeMethod
from sst_lightning.algebra.methods.problem import MergeProblem, ModuleProblem
from sst_lightning.algebra.weight_files import WeightFiles

DEFAULT_NUMBER = 10


@dataclass(frozen=True)
class Projected:
    """One module's utility merge under C.

    Attributes:
        cosine: ⟨CΔW_u, ΔW_u⟩ / (‖CΔW_u‖ ‖ΔW_u‖), in [0, 1]; NaN where C ΔW_u = 0.
        factors: of C ΔW_u.
    """

    cosine: float
    factors: LoraFactors


class Alignment:
    """V = W_aligned − W_unaligned by module, and C = V Vᵀ / ‖V‖_F, which is never formed.

    C is not a projector (C² ≠ C); it is positive semidefinite, so cosines with it are in [0, 1].

    Args:
        method: name of the method, for errors.
        aligned: folder of the aligned model.
        unaligned: folder of the model before alignment.

    Raises:
        SSTMergeError: both are one folder.
        BackboneError: a folder or a file in it is missing or damaged.
    """

    def __init__(self, method: str, aligned: str, unaligned: str) -> None:
        self.method = method
        self.aligned = WeightFiles(aligned)
        self.unaligned = WeightFiles(unaligned)
        if self.aligned.folder.resolve() == self.unaligned.folder.resolve():
            raise SSTMergeError(
                f"{method}: aligned and unaligned must be two models, got {aligned!r} for both"
            )

    def check(self, problem: MergeProblem, alphas: Sequence[float] = ()) -> None:
        """Refuse models that are not of the adapters' architecture, before a weight is read.

        Raises:
            BackboneError: a module has no plain weight in one of them.
            AdapterError: a weight has another shape than ΔW.
        """
        for name in problem.space.bases:
            expected = problem.module(name, 1.0).shape
            for files in (self.aligned, self.unaligned):
                shape = files.shape(name)
                if shape != expected:
                    raise AdapterError(
                        f"{self.method}: the weight of module '{name}' is {shape} in "
                        f"{files.folder}, but ΔW is {expected}; give models of the architecture "
                        "that the adapters were trained on"
                    )

    def projections(self, problem: MergeProblem) -> dict[str, Projected]:
        """Return C ΔW_u and its cosine with ΔW_u, for one module after another.

        Raises:
            AdapterError: as for :meth:`check`.
            BackboneError: as for :meth:`check`, or both models have the same weights everywhere.
        """
        self.check(problem)
        result: dict[str, Projected] = {}
        compared = differ = False
        for name in problem.space.bases:
            factors = utility_factors(problem.module(name, 1.0))
            if not (factors.B.any() and factors.A.any()):
                result[name] = Projected(math.nan, factors)
                continue
            change = self.aligned.weight(name)
            change -= self.unaligned.weight(name)
            result[name] = project(change, factors)
            compared, differ = True, differ or bool(change.any())
        if compared and not differ:
            raise BackboneError(
                f"{self.method}: {self.aligned.folder} and {self.unaligned.folder} hold the same "
                "weights in every module of the adapters; give the model before its alignment as "
                "unaligned"
            )
        return result


class AlignmentMethod(MergeMethod):
    """A method that asks how well the utility merge agrees with the model's own alignment."""

    def __init__(self, aligned: str, unaligned: str) -> None:
        self.aligned = str(aligned)
        self.unaligned = str(unaligned)
        self.alignment = Alignment(type(self).__name__, self.aligned, self.unaligned)

    def differing(self) -> list[str]:
        """As for other methods, but the two paths as one short hash: labels name folders."""
        folders = {f"aligned_{self.aligned}", f"unaligned_{self.unaligned}"}
        models = sha256(f"{self.aligned}\n{self.unaligned}".encode()).hexdigest()[:6]
        return [f"models_{models}", *(item for item in super().differing() if item not in folders)]


class SafeLoRA(AlignmentMethod, FactorMethod):
    """Replaces ΔW_u by C ΔW_u where cos(C ΔW_u, ΔW_u) is low; C = V Vᵀ / ‖V‖_F.

    V = W_aligned − W_unaligned of the module, ΔW_u = Σ w_i ΔW_i. Neither the safety adapter nor α
    enters. C is not a projector, as published: it also changes the size of ΔW_u, by up to ‖V‖.

    The paper replaces where the cosine is below a threshold, its code where it is at most that;
    this is the code's rule, without its rounding to five digits. Its ``number`` rule takes the
    threshold from the cosines: the n-th smallest, so that exact ties are replaced together. A
    module where the cosine is undefined is kept and does not count: where the two models have the
    same weight (NaN in the code, which keeps it too), or ΔW_u = 0.

    Args:
        aligned: folder of the aligned model (instruct or chat: mostly the adapters' own base).
        unaligned: folder of the model it was aligned from (pretrained).
        threshold: modules with at most this cosine are replaced, in [0, 1]; not with ``number``.
        number: so many modules with the lowest cosines are replaced; 10 when neither is given.

    Raises:
        SSTMergeError: an argument is out of range, or both ``threshold`` and ``number`` are given.
        BackboneError: a model folder is missing or damaged.
    """

    name = "safe_lora"
    family = "safety"
    summary = "the utility merge, projected towards the base model's own alignment where it departs"
    formula = (
        "C ΔW_u where cos(C ΔW_u, ΔW_u) ≤ τ, else ΔW_u; C = VVᵀ/‖V‖, V = W_aligned − W_unaligned"
    )
    source = "Hsu et al. 2024, arXiv 2405.16833, section 3; its code for ≤ and the number"
    uses_alpha = False

    def __init__(
        self,
        aligned: str,
        unaligned: str,
        threshold: float | None = None,
        number: int | None = None,
    ) -> None:
        if threshold is not None and number is not None:
            raise SSTMergeError(
                f"SafeLoRA: threshold ({threshold!r}) and number ({number!r}) exclude each other; "
                "give one"
            )
        if threshold is not None:
            _check_threshold("SafeLoRA", threshold)
        elif number is None:
            number = DEFAULT_NUMBER
        elif not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise SSTMergeError(
                f"SafeLoRA: number must be a number of modules (1, 2, …), got {number!r}"
            )
        self.threshold = threshold
        self.number = number
        super().__init__(aligned, unaligned)

    def differing(self) -> list[str]:
        """As for other methods; the number that stands for no threshold is a default too."""
        return [item for item in super().differing() if item != f"number_{DEFAULT_NUMBER}"]

    def prepare(self, problem: MergeProblem) -> dict[str, LoraFactors]:
        """Return the factors of C ΔW_u for the modules that are replaced.

        Raises:
            AdapterError: a weight has another shape than ΔW.
            BackboneError: a module is missing in a model, or the models are the same.
        """
        projected = self.alignment.projections(problem)
        limit = self.threshold
        if limit is None:
            known = sorted(item.cosine for item in projected.values() if item.cosine >= 0)
            limit = known[: self.number][-1] if known else math.nan
        return {name: item.factors for name, item in projected.items() if item.cosine <= limit}

    def merge_factors(self, module: ModuleProblem, prepared: dict[str, LoraFactors]) -> LoraFactors:
        """Return factors of C ΔW_u or ΔW_u, of rank at most the sum of the utility ranks."""
        return prepared[module.name] if module.name in prepared else utility_factors(module)


class SafeMERGE(AlignmentMethod, CoreMethod):
    """Adds the safety adapter only where the utility merge departs from the model's alignment.

    w_u ΔW_u + α w_s ΔW_s where cos(C ΔW_u, ΔW_u) < τ, else ΔW_u, with ΔW_u = Σ w_i ΔW_i and C of
    Safe LoRA; α = 1 is the published method. Its code merges A and B separately (PEFT's
    ``linear``); here the weights are of ΔW. As in that code, an undefined cosine counts as 0: where
    the two models have the same weight, or ΔW_u = 0.

    Args:
        aligned: folder of the aligned model (instruct or chat: mostly the adapters' own base).
        unaligned: folder of the model it was aligned from (pretrained).
        threshold: τ, in [0, 1]; modules with a smaller cosine are merged.
        weights: w_u and w_s of a merged module.

    Raises:
        SSTMergeError: an argument is out of range.
        BackboneError: a model folder is missing or damaged.
    """

    name = "safe_merge"
    family = "safety"
    summary = (
        "the utility merge, with the safety adapter where it departs from the base's alignment"
    )
    formula = "w_u ΔW_u + α w_s ΔW_s where cos(C ΔW_u, ΔW_u) < τ, else ΔW_u; C of safe_lora"
    source = "Djuhera et al. 2025, arXiv 2503.17239"

    def __init__(
        self,
        aligned: str,
        unaligned: str,
        threshold: float = 0.35,
        weights: tuple[float, float] = (0.8, 0.2),
    ) -> None:
        _check_threshold("SafeMERGE", threshold)
        weights = tuple(weights)  # type: ignore[assignment]  # a list from YAML or JSON
        if len(weights) != 2 or any(not 0 <= weight < math.inf for weight in weights):
            raise SSTMergeError(
                f"SafeMERGE: weights must be two finite numbers ≥ 0, got {weights!r}"
            )
        self.threshold = threshold
        self.weights = weights
        super().__init__(aligned, unaligned)

    def prepare(self, problem: MergeProblem) -> dict[str, float]:
        """Return each module's cosine, 0 where undefined; raises what Safe LoRA's raises."""
        found = self.alignment.projections(problem)
        return {n: 0.0 if math.isnan(item.cosine) else item.cosine for n, item in found.items()}

    def merge_core(self, module: ModuleProblem, prepared: dict[str, float]) -> Tensor:
        """Return w_u M_u + α w_s M_s, or M_u where the cosine reaches the threshold."""
        utility = module.utility_core()
        if prepared[module.name] >= self.threshold:
            return utility
        return self.weights[0] * utility + module.alpha * self.weights[1] * module.safety_core()

    def differing(self) -> list[str]:
        """As for other methods, with the two weights written without brackets."""
        plain, written = f"weights_{self.weights}", "weights_{:g}_{:g}".format(*self.weights)
        return [written if item == plain else item for item in super().differing()]


def utility_factors(module: ModuleProblem) -> LoraFactors:
    """Return thin fp32 factors of ΔW_u = Σ w_i ΔW_i: the scaled B_i side by side, the A_i stacked."""
    d_out, d_in = module.shape
    columns, rows = [torch.zeros(d_out, 0)], [torch.zeros(0, d_in)]
    for weight, item in zip(module.weights[:-1], module.factors[:-1], strict=True):
        if item is not None:
            columns.append((weight * item.scaling * item.B.double()).float())
            rows.append(item.A.float())
    if len(rows) == 1:
        return LoraFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1), 1.0)
    return LoraFactors(torch.cat(rows), torch.cat(columns, dim=1), 1.0)


def project(change: Tensor, factors: LoraFactors) -> Projected:
    """Return C ΔW and cos(C ΔW, ΔW), with neither formed.

    Args:
        change: V, (d_out, d_in) fp32.
        factors: of ΔW, with scaling 1.
    """
    norm = torch.linalg.vector_norm(change, dtype=torch.float64).item()
    if norm == 0:
        return Projected(math.nan, LoraFactors(factors.A, torch.zeros_like(factors.B), 1.0))
    inner = change.T @ factors.B
    columns = (change @ inner).double() / norm
    # Aᵀ = QR with orthonormal Q: norms and products of B A are those of B Rᵀ, (d_out, r).
    triangle = torch.linalg.qr(factors.A.double().T)[1].T
    product = (inner.double() @ triangle).square().sum().item() / norm
    length = torch.linalg.matrix_norm(factors.B.double() @ triangle).item()
    image = torch.linalg.matrix_norm(columns @ triangle).item()
    # 0 ≤ cosine ≤ 1 but for rounding.
    cosine = min(product / (image * length), 1.0) if image * length > 0 else math.nan
    return Projected(cosine, LoraFactors(factors.A, columns.float(), 1.0))


def _check_threshold(method: str, threshold: Any) -> None:
    if isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise SSTMergeError(f"{method}: threshold must be a cosine in [0, 1], got {threshold!r}")
