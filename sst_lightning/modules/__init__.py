"""LightningModules, and what they are built from."""

from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.supervised import SupervisedLoRA

__all__ = ["CausalLMModule", "SupervisedLoRA"]
