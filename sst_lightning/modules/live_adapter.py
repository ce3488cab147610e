"""The adapter of a PEFT model in memory, as the algebra knows it."""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.modules.core_hooks import PEFT_PREFIX
from sst_lightning.modules.strategies import full_tensor


def live_adapter(model: PeftModel, base_model: str | None = None) -> LoraAdapter:
    """Copy the weights of the active adapter; if it is sharded, every process must call it.

    Args:
        model: PEFT model with one active LoRA adapter.
        base_model: name of the base that the result carries.
    """
    (active,) = model.active_adapters
    factors = {
        name.removeprefix(PEFT_PREFIX): LoraFactors(
            _copy(layer.lora_A[active]), _copy(layer.lora_B[active]), float(layer.scaling[active])
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and active in layer.lora_A
    }
    return LoraAdapter(factors, base_model)


def _copy(linear: Any) -> Tensor:
    weight: Tensor = full_tensor(linear.weight.detach())
    return weight.float().cpu().clone()
