"""Random LoRA adapters for the nano Llama, built without PEFT."""

import torch

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(model, rank=2, seed=0, scaling=1.5, size=0.1, base_model="nano", names=None):
    """Normal factors of standard deviation ``size`` for the projections of ``model``."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in (names or PROJECTIONS):
            continue
        d_out, d_in = module.weight.shape
        factors[name] = LoraFactors(
            A=size * torch.randn(rank, d_in, generator=generator),
            B=size * torch.randn(d_out, rank, generator=generator),
            scaling=scaling,
        )
    return LoraAdapter(factors, base_model=base_model)
