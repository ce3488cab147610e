"""Supervised LoRA training on completions."""

import math
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_layers import GradientCheckpointingLayer

from sst_lightning.modules.backbone import (
    Attention,
    Dtype,
    Quantization,
)
from sst_lightning.modules.causal_lm import Batch, completion_nll
from sst_lightning.modules.lora import LoRAModule
from sst_lightning.modules.optimizer import (
    OptimizerName,
    check_optimizer,
    check_same_state,
    make_optimizer,
)
from sst_lightning.modules.prefix_tree import (
    can_share_prefixes,
    prefix_tree,
    takes_less_memory,
    tree_states,
)
from sst_lightning.modules.processes import gather
from sst_lightning.modules.resume import (
    restore_position,
    rewind_to_optimizer_step,
    use_learning_rate,
)
from sst_lightning.modules.schedule import Decay, warmup_then_decay
from sst_lightning.modules.strategies import is_sharded
from sst_lightning.modules.token_mean import TokenMean


class SupervisedLoRA(LoRAModule):
    """Trains a LoRA adapter on a frozen base, with AdamW on the NLL per completion token.

    The mean is over all completion tokens of an optimizer step, in all processes and accumulated
    batches: how its rows are divided among them makes no difference (without dropout).

    Resuming (``fit --ckpt_path``) continues with the losses of an uninterrupted run when the loader
    yields an epoch's batches in an order that is a function of (seed, epoch) and can be resumed
    inside an epoch (:class:`sst_lightning.data.resumable.ResumableLoader`), and dropout is 0 (random
    states are not part of a checkpoint). After an interruption between two optimizer steps it
    continues from the first of them.

    Gradient accumulation, precision, clipping and devices are the Trainer's flags.

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
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay on the LoRA weights.
        warmup_ratio: share of the optimizer steps with rising learning rate.
        decay: shape of the learning rate's way down to zero.
        gradient_checkpointing: recompute activations in the backward pass: less memory, slower.
        optimizer: ``adamw``; ``adamw_8bit`` keeps its state in 8 bits, ``paged_adamw_8bit`` (CUDA)
            moreover in memory that the driver moves to the host when the GPU is full.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        quantization: Quantization | None = None,
        r: int = 32,
        lora_alpha: float = 64,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        use_rslora: bool = False,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        decay: Decay = "linear",
        gradient_checkpointing: bool = False,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        super().__init__(
            base,
            dtype,
            attention,
            quantization,
            r,
            lora_alpha,
            dropout,
            target_modules,
            use_rslora,
            gradient_checkpointing,
        )
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.decay = decay
        self.optimizer = optimizer
        self._resumed_from: dict[str, Any] | None = None
        self._step_mean = TokenMean()
        self._shares_prefixes = False

    def setup(self, stage: str) -> None:
        """Refuse an optimizer that cannot run here; the base is not loaded yet.

        Raises:
            MisconfigurationException: names the optimizer and the remedy.
        """
        if stage == "fit":
            check_optimizer(self.optimizer, self.trainer.strategy.root_device, is_sharded(self))

    def configure_model(self) -> None:
        """Load the model once, and find out whether rows can be computed together.

        Raises:
            BackboneError: the base cannot be found or loaded.
            MisconfigurationException: the base post-processes its logits, or lacks a target module.
        """
        if self.model is None:
            super().configure_model()
            # With dropout, sequences would lose the same inputs where they share them.
            self._shares_prefixes = self.dropout == 0 and can_share_prefixes(self.language_model)

    def on_train_start(self) -> None:
        """Take up the position of a checkpoint, and check that gradient checkpointing works.

        Raises:
            MisconfigurationException: the loader cannot be resumed inside an epoch, or gradient
                checkpointing was asked for and no layer recomputes its activations.
        """
        self._step_mean.reset()
        if self._resumed_from is not None:
            restore_position(self._resumed_from, self.trainer)
            self._resumed_from = None
        layers = [m for m in self.modules() if isinstance(m, GradientCheckpointingLayer)]
        active = bool(layers) and all(m.gradient_checkpointing and m.training for m in layers)
        if self.gradient_checkpointing and not active:
            raise MisconfigurationException(
                f"gradient_checkpointing is on but not active: {type(self.model).__name__} has "
                f"{len(layers)} layers that support it, or they are in eval mode"
            )

    def training_nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what :meth:`sequence_nll` does, computing once what sequences begin with in common.

        Validation does not: the gradients of single sequences are what a Fisher is made of.
        """
        lm = self.language_model
        if self._shares_prefixes:
            tree = prefix_tree(batch["input_ids"], batch["attention_mask"])
            if takes_less_memory(tree, lm):
                return completion_nll(lm, tree_states(lm, tree), batch["labels"], tree.nodes)
        return self.sequence_nll(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this process's part of the NLL per completion token (:class:`TokenMean`).

        ``train_loss`` is the mean over the tokens of the optimizer step so far, in all processes.

        Raises:
            MisconfigurationException: no row, in any process, has a completion token.
            FloatingPointError: the loss is NaN or infinite in some process.
        """
        nll, tokens = self.training_nll(batch)
        total, count = self._step_mean.add(nll, tokens, self.trainer)
        # The sums are those of all processes: all raise, or the others would wait for ever.
        if count == 0:
            raise MisconfigurationException(
                f"batch {batch_idx} has no completion tokens (rows {self._rows(batch)}): raise "
                "max_length"
            )
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss of batch {batch_idx} is {total / count} at step {self.global_step}, from "
                f"rows {self._rows(batch, ~nll.isfinite())}: lower learning_rate, use dtype "
                "bfloat16 or float32 instead of float16, or look at these rows"
            )
        self.log("train_loss", self._step_mean.value, prog_bar=True, batch_size=len(tokens))
        return self._step_mean.loss(nll, self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weight accumulated batches by their completion tokens."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self._step_mean.rescale(parameters, self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the LoRA weights with warm-up and decay over the whole run.

        Raises:
            MisconfigurationException: the length of the run is unknown.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MisconfigurationException(
                "the learning-rate schedule needs a run of known length: set trainer.max_epochs "
                "or trainer.max_steps"
            )
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = make_optimizer(
            self.optimizer,
            parameters,
            self.learning_rate,
            self.weight_decay,
            fused=self.trainer.scaler is None,
        )
        schedule = warmup_then_decay(int(steps), self.warmup_ratio, self.decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the LoRA weights only, at the position of the last optimizer step.

        Raises:
            FloatingPointError: a weight is NaN or infinite; no checkpoint is written.
        """
        super().on_save_checkpoint(checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            rewind_to_optimizer_step(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and note where it stopped.

        The learning rate and weight decay of the command line take the place of the checkpoint's.

        Raises:
            MisconfigurationException: other target modules, another rank, another base, or the state
                of another optimizer.
        """
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            optimizer = checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
            check_same_state(self.optimizer, optimizer)
        super().on_load_checkpoint(checkpoint)
        self._resumed_from = {"loops": checkpoint["loops"]} if "loops" in checkpoint else None
        for state, scheduler in zip(
            checkpoint.get("optimizer_states", []),
            checkpoint.get("lr_schedulers", []),
            strict=False,
        ):
            use_learning_rate(state, scheduler, self.learning_rate, self.weight_decay)

    def _rows(self, batch: Batch, chosen: Tensor | None = None) -> list[Any]:
        """Return the ids of the rows of all processes, or of those that are chosen."""
        ids = [getattr(row, "id", index) for index, row in enumerate(batch["rows"])]
        if chosen is not None:
            ids = [row for row, take in zip(ids, chosen.tolist(), strict=True) if take]
        return [row for part in gather(ids, self.trainer) for row in part]
