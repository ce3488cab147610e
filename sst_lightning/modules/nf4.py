"""4-bit weights (NF4) as plain numbers: as bitsandbytes computes with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from sst_lightning.algebra.errors import BackboneError
from sst_lightning.algebra.weight_files import WeightFiles

STATE = ".quant_state.bitsandbytes__"
"""In the key of a saved 4-bit weight's description."""
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def quantised_modules(model: PreTrainedModel, config: BitsAndBytesConfig) -> set[str]:
    """Return the names of the layers that loading with ``config`` would quantise.

    Args:
        model: on the meta device; its linear layers are replaced.
        config: 4-bit configuration.
    """
    from bitsandbytes.nn import Linear4bit

    in_fp32 = list(model._keep_in_fp32_modules or ())
    spared = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, in_fp32)
    converted: nn.Module = replace_with_bnb_linear(
        model, modules_to_not_convert=spared, quantization_config=config
    )
    return {name for name, module in converted.named_modules() if isinstance(module, Linear4bit)}


def through_nf4(weight: Tensor, config: BitsAndBytesConfig) -> Tensor:
    """Quantise a weight as loading does, and return it dequantised, in its own dtype.

    Args:
        weight: (d_out, d_in), in the dtype that the model is loaded in.
        config: 4-bit configuration.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    packed: Any = Params4bit(
        weight.contiguous(),
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    )
    packed = packed.to(weight.device)
    return dequantize_4bit(packed.data, packed.quant_state)


def is_stored_in_4_bits(files: WeightFiles, key: str) -> bool:
    """Whether a tensor of a model folder is a 4-bit weight of bitsandbytes."""
    return f"{key}{STATE}nf4" in files.files or f"{key}{STATE}fp4" in files.files


def belongs_to_4_bits(files: WeightFiles, key: str) -> bool:
    """Whether a tensor of a model folder is a scale or table of a 4-bit weight."""
    weight, _, part = key.rpartition(".")
    if STATE in key:
        weight = key.partition(STATE)[0]
    elif part not in PARTS:
        return False
    return is_stored_in_4_bits(files, weight)


def shape_of_4_bits(files: WeightFiles, key: str) -> tuple[int, ...]:
    """Return (d_out, d_in) of a 4-bit weight of a model folder, from its description.

    Raises:
        BackboneError: the description is damaged.
    """
    with _says_what_is_damaged(files, key):
        return tuple(_quant_state(files, key).shape)


def read_4_bits(files: WeightFiles, key: str) -> Tensor:
    """Return a 4-bit weight of a model folder, (d_out, d_in), in the dtype it is computed in.

    Raises:
        BackboneError: the weight or its description is damaged.
    """
    from bitsandbytes.functional import dequantize_4bit

    with _says_what_is_damaged(files, key):
        return dequantize_4bit(files.tensor(key), _quant_state(files, key))


def _quant_state(files: WeightFiles, key: str) -> Any:
    from bitsandbytes.functional import QuantState

    state = {
        name.removeprefix(f"{key}."): files.tensor(name)
        for name in files.files
        if name.startswith(f"{key}.")
    }
    return QuantState.from_dict(state, torch.device("cpu"))


@contextmanager
def _says_what_is_damaged(files: WeightFiles, key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise BackboneError(
            f"{files.files[key]}: the 4-bit weight '{key}' cannot be read ({error}); copy the model "
            "again"
        ) from error
