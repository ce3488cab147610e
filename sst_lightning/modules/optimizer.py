"""The optimizers of the LoRA weights: torch's AdamW, and bitsandbytes' with its state in 8 bits."""

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Parameter

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


def check_optimizer(name: OptimizerName, device: torch.device, sharded: bool = False) -> None:
    """Refuse an optimizer that cannot run, before a model is loaded.

    On other devices than CUDA bitsandbytes would keep the state of a paged optimizer unpaged and
    only warn.

    Args:
        name: ``adamw``, ``adamw_8bit`` or ``paged_adamw_8bit``.
        device: where the weights will be.
        sharded: whether they are divided among processes.

    Raises:
        MisconfigurationException: names the optimizer and the remedy.
    """
    if name == "adamw":
        return
    if sharded:
        raise MisconfigurationException(
            f"model.optimizer '{name}' does not know sharded weights (trainer.strategy fsdp): use "
            "model.optimizer: adamw"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MisconfigurationException(
            f"model.optimizer '{name}' needs bitsandbytes: pip install bitsandbytes, or use "
            "model.optimizer: adamw"
        )
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise MisconfigurationException(
            f"model.optimizer '{name}' needs a CUDA GPU, and the Trainer runs on '{device.type}': "
            "use model.optimizer: adamw (or adamw_8bit, whose state is not paged)"
        )


def check_same_state(name: OptimizerName, saved: str) -> None:
    """Refuse to continue with an optimizer whose state has another form than the checkpoint's.

    Args:
        name: the optimizer of this run.
        saved: that of the run which wrote the checkpoint.

    Raises:
        MisconfigurationException: one of them has its state in 8 bits and the other in fp32.
    """
    if (name == "adamw") != (saved == "adamw"):
        raise MisconfigurationException(
            f"the checkpoint was made with model.optimizer '{saved}', whose state '{name}' cannot "
            f"continue from: resume with model.optimizer: {saved}"
        )


def make_optimizer(
    name: OptimizerName,
    parameters: Sequence[Parameter],
    learning_rate: float,
    weight_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Return AdamW with decoupled weight decay (Loshchilov and Hutter 2019).

    ``adamw_8bit`` keeps both moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al.
    2022); those of tensors with fewer than 4,096 elements stay in fp32. ``paged_adamw_8bit`` also
    lets the driver move them to the host when the GPU is full (QLoRA, Dettmers et al. 2023). A
    resumed run has them on the GPU: bitsandbytes does not page a state that it loads.

    Args:
        name: which one; :func:`check_optimizer` says what it needs.
        parameters: trained weights.
        learning_rate: step size.
        weight_decay: decoupled weight decay.
        fused: one kernel for an update of ``adamw``, which takes a third of the time on the CPU; its
            gradients cannot be clipped where they are scaled (precision 16-mixed).
    """
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused
        )
    from bitsandbytes import optim

    kind = optim.PagedAdamW8bit if name == "paged_adamw_8bit" else optim.AdamW8bit
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay)
