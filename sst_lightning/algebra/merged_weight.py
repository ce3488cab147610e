"""W + ΔW of one module in the dtype it is stored in, and what of it is lost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraFactors
from sst_lightning.algebra.errors import BackboneError


@dataclass(frozen=True)
class WeightLoss:
    """Frobenius norms of one module's weights and of what became of them.

    Attributes:
        weight: ‖W‖, of the weights that ΔW is added to.
        delta: ‖ΔW‖; 0 without an adapter.
        rounding: ‖round(W + ΔW) − (W + ΔW)‖.
        quantization: ‖W − W₀‖ of weights W that went through 4 bits, W₀ before; ``None`` where
            they did not.
    """

    weight: float
    delta: float
    rounding: float
    quantization: float | None = None

    def shares(self) -> dict[str, float | None]:
        """Return the norms as shares: of ‖ΔW‖ what rounding takes, of ‖W‖ the rest."""
        return {
            "rounding_of_delta": self.rounding / self.delta if self.delta else None,
            "rounding_of_weight": self.rounding / self.weight if self.weight else None,
            "delta_of_weight": self.delta / self.weight if self.weight else None,
            "quantization_of_weight": (
                None if self.quantization is None or not self.weight
                else self.quantization / self.weight
            ),
        }  # fmt: skip


def merge_weight(
    name: str,
    weight: Tensor,
    factors: LoraFactors | None,
    dtype: torch.dtype,
    before: Tensor | None = None,
) -> tuple[Tensor, WeightLoss]:
    """Add ΔW = s B A to a weight in fp32 and round the sum once.

    Args:
        name: of the module, for errors.
        weight: W, (d_out, d_in).
        factors: of the adapter; ``None`` where it has none.
        dtype: of the result.
        before: W₀, the weight before it went through 4 bits.

    Returns:
        round(W + ΔW), (d_out, d_in), and what was lost.

    Raises:
        BackboneError: shapes differ, or the sum is beyond the range of ``dtype``.
    """
    exact = weight.to(torch.float32, copy=True)
    norm, delta = _norm(exact), 0.0
    quantization = None if before is None else _norm(exact - before.float())
    if factors is not None:
        if (factors.d_out, factors.d_in) != tuple(weight.shape):
            raise BackboneError(
                f"ΔW of module '{name}' is {(factors.d_out, factors.d_in)}, but its weight is "
                f"{tuple(weight.shape)}: the adapter was trained on another model"
            )
        update = factors.scaling * (factors.B.float() @ factors.A.float())
        delta = _norm(update)
        exact += update
    rounded = exact.to(dtype, copy=True)
    # In place: the embeddings of a large model take gigabytes.
    rounding = _norm(exact.sub_(rounded))
    if not math.isfinite(rounding):
        raise BackboneError(
            f"module '{name}': W + ΔW is not finite in {str(dtype).removeprefix('torch.')}; use "
            "dtype bfloat16 or float32"
        )
    return rounded, WeightLoss(norm, delta, rounding, quantization)


def total_loss(losses: Mapping[str, WeightLoss]) -> WeightLoss:
    """Return the norms of all modules together."""

    def root(values: list[float]) -> float:
        return math.sqrt(sum(value**2 for value in values))

    items = list(losses.values())
    quantised = [item.quantization for item in items if item.quantization is not None]
    return WeightLoss(
        root([item.weight for item in items]),
        root([item.delta for item in items]),
        root([item.rounding for item in items]),
        root(quantised) if quantised else None,
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
