"""A base model with a LoRA adapter in training: the adapter, its checkpoints, its Fisher."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.modules.backbone import Attention, Dtype, Quantization, identity
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.core_hooks import CoreGradientCapture, Receiver
from sst_lightning.modules.live_adapter import live_adapter

SEVEN_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


class LoRAModule(CausalLMModule):
    """A frozen base with a new adapter, in training mode; a subclass says what is learned.

    The LoRA weights are fp32 whatever the base's dtype, and their initial values depend on
    ``seed_everything``'s seed alone. Checkpoints hold the LoRA weights, not the base.

    Args:
        base: alias, hub id or folder (:func:`sst_lightning.modules.backbone.resolve`).
        dtype: dtype of the base weights.
        attention: attention implementation (``auto``: sdpa, on the CPU eager).
        quantization: ``nf4`` trains on a 4-bit base (QLoRA).
        r: rank of the adapter.
        lora_alpha: scaling numerator: ΔW = (lora_alpha / r) B A.
        dropout: dropout on the adapter's input.
        target_modules: names (last parts) of the linear layers that get an adapter; by default the
            seven projections of attention and feed-forward network.
        use_rslora: scale by lora_alpha / √r instead.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        base: str,
        dtype: Dtype,
        attention: Attention,
        quantization: Quantization | None,
        r: int,
        lora_alpha: float,
        dropout: float,
        target_modules: list[str] | None,
        use_rslora: bool,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(base, dtype, attention, quantization)
        self.r = r
        self.lora_alpha = lora_alpha
        self.dropout = dropout
        self.target_modules = list(target_modules or SEVEN_PROJECTIONS)
        self.use_rslora = use_rslora
        self.gradient_checkpointing = gradient_checkpointing
        # The state dict of a checkpoint lacks the base on purpose; on_load_checkpoint checks it.
        self.strict_loading = False

    def lora_config(self) -> LoraConfig:
        """Return the PEFT configuration of the adapter."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # it only divides
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            task_type="CAUSAL_LM",
        )

    def build_model(self) -> PeftModel:
        """Load the base and put a new adapter on it.

        Raises:
            MisconfigurationException: the base has no module of a target's name.
        """
        base = self.load_base()
        names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        missing = [name for name in self.target_modules if name not in names]
        if missing:
            raise MisconfigurationException(
                f"target_modules: {type(base).__name__} has no module called '{missing[0]}'; give "
                "the names of its linear layers (the last part, such as q_proj)"
            )
        if self.gradient_checkpointing:
            # transformers 5 renamed it on the way; the old name warns where the new one exists.
            old = base.gradient_checkpointing_enable
            enable = getattr(base, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})
        with torch.random.fork_rng():
            # What ran before (shuffling, another module) must not change the initial weights.
            torch.manual_seed(torch.initial_seed())
            model = get_peft_model(base, self.lora_config())
        # A base arrives in eval mode, in which gradient checkpointing does nothing.
        return model.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the LoRA weights only, and note the base they belong to.

        Raises:
            FloatingPointError: a weight is NaN or infinite; no checkpoint is written.
        """
        assert self.model is not None
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if name in self._trainable()
        }
        broken = [n for n, value in checkpoint["state_dict"].items() if not value.isfinite().all()]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} LoRA weights are not finite after step {self.global_step}, the first "
                f"in {broken[0]}: lower learning_rate, and go on from the last checkpoint"
            )
        checkpoint["base_fingerprint"] = self.base_fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits: loading is not strict, so nothing else would.

        Raises:
            MisconfigurationException: other target modules, another rank or another base.
        """
        self.configure_model()
        assert self.model is not None
        own = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        saved = checkpoint["state_dict"]
        differing = sorted(set(own) ^ set(saved))
        if differing:
            raise MisconfigurationException(
                f"the checkpoint was made with other target_modules: '{differing[0]}' is only in "
                "one of checkpoint and model"
            )
        for name, shape in own.items():
            if saved[name].shape != shape:
                raise MisconfigurationException(
                    f"the checkpoint was made with another r or another base: '{name}' is "
                    f"{tuple(saved[name].shape)} in it and {tuple(shape)} in the model"
                )
        if checkpoint.get("base_fingerprint") != self.base_fingerprint():
            raise MisconfigurationException(
                f"the checkpoint was made on another base model than {self.base} as it is loaded "
                "now (other weights, or another quantization)"
            )

    def core_space(self) -> CoreSpace:
        """Return the core space of the adapter as it is now, for ``FisherCollector``."""
        return CoreSpace.from_adapters([self._live_adapter()])

    def move_to_point(self, point: str) -> None:
        """Check that ``point`` is where the weights are.

        Raises:
            MisconfigurationException: another point than ``training``.
        """
        if point != "training":
            raise MisconfigurationException(
                f"a Fisher of SupervisedLoRA is taken at the weights in training: give "
                f"FisherCollector.points the point 'training', not '{point}'"
            )

    def gradient_capture(self, space: CoreSpace, receive: Receiver) -> CoreGradientCapture:
        """Return the capture of core gradients, for ``FisherCollector``."""
        assert self.model is not None
        return CoreGradientCapture(self.model, space, receive)

    def fisher_metadata(self, point: str) -> dict[str, Any]:
        """Identify the base model and the adapter that a Fisher is taken with."""
        assert self.model is not None
        fingerprint = self._live_adapter().fingerprint
        return {
            "base_model": identity(self.base),
            "base_fingerprint": self.base_fingerprint(),
            "adapter_fingerprints": [fingerprint],
            "point": point,
            "point_fingerprint": fingerprint,
        }

    def _live_adapter(self) -> LoraAdapter:
        assert isinstance(self.model, PeftModel), "configure_model has not run"
        return live_adapter(self.model, identity(self.base))

    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}
