"""What a process holds of a model whose decoder layers are divided among processes (FSDP2)."""

import math
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from sst_lightning.planner.architecture import parameter_bytes
from sst_lightning.planner.job import Adapter
from sst_lightning.planner.passes import Shape
from sst_lightning.planner.storage import adapter_bytes

GATHERED = 2
"""Layers that are whole at a time: one computes while the next one is gathered."""


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder layers by their names in the model."""
    layers = list(model.get_decoder().layers)  # type: ignore[arg-type]
    return {name: module for name, module in model.named_modules() if module in layers}


def share_bytes(model: PreTrainedModel, shards: int) -> int:
    """Return the bytes of the weights that one process keeps.

    Args:
        model: on the meta device, without an adapter.
        shards: processes.
    """
    layers = parameter_bytes(model) - outside_bytes(model)
    return outside_bytes(model) + math.ceil(layers / shards)


def outside_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of what is not in a decoder layer: embeddings, last norm, head."""
    layers = decoder_layers(model).values()
    return parameter_bytes(model) - sum(parameter_bytes(layer) for layer in layers)


def layer_bytes(
    model: PreTrainedModel, shapes: Mapping[str, Shape], adapter: Adapter | None
) -> int:
    """Return the bytes of the largest layer when it is whole.

    Args:
        model: on the meta device, without an adapter.
        shapes: (d_out, d_in) of its linear layers.
        adapter: whose factors are divided with the layers, where there is one.
    """
    sizes = []
    for name, layer in decoder_layers(model).items():
        size = parameter_bytes(layer)
        if adapter is not None:
            inside = tuple(m for m in adapter.modules if m.startswith(f"{name}."))
            size += adapter_bytes(shapes, Adapter(name, adapter.rank, inside))
        sizes.append(size)
    return max(sizes)
