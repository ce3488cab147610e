"""Supervised LoRA training on completions."""

import math
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_layers import GradientCheckpointingLayer

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.modules.backbone import (
    Attention,
    Dtype,
    Quantization,
    identity,
)
from sst_lightning.modules.causal_lm import Batch, CausalLMModule, completion_nll
from sst_lightning.modules.core_hooks import CoreGradientCapture, Receiver
from sst_lightning.modules.live_adapter import live_adapter
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

SEVEN_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


class SupervisedLoRA(CausalLMModule):
    """Trains a LoRA adapter on a frozen base, with AdamW on the NLL per completion token.

    The mean is over all completion tokens of an optimizer step, in all processes and accumulated
    batches: how its rows are divided among them makes no difference (without dropout).

    The LoRA weights are fp32 whatever the base's dtype, and their initial values depend on
    ``seed_everything``'s seed alone. Checkpoints hold the LoRA weights, not the base. Resuming
    (``fit --ckpt_path``) continues with the losses of an uninterrupted run when the loader yields
    an epoch's batches in an order that is a function of (seed, epoch) and can be resumed inside an
    epoch (:class:`sst_lightning.data.resumable.ResumableLoader`), and dropout is 0 (random states
    are not part of a checkpoint). After an interruption between two optimizer steps it continues
    from the first of them.

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
        super().__init__(base, dtype, attention, quantization)
        self.save_hyperparameters()
        self.target_modules = list(target_modules or SEVEN_PROJECTIONS)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.decay = decay
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        # The state dict of a checkpoint lacks the base on purpose; on_load_checkpoint checks it.
        self.strict_loading = False
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

    def lora_config(self) -> LoraConfig:
        """Return the PEFT configuration of the adapter."""
        return LoraConfig(
            r=self.hparams["r"],
            lora_alpha=self.hparams["lora_alpha"],
            lora_dropout=self.hparams["dropout"],
            target_modules=self.target_modules,
            use_rslora=self.hparams["use_rslora"],
            task_type="CAUSAL_LM",
        )

    def configure_model(self) -> None:
        """Load the model once, and find out whether rows can be computed together.

        Raises:
            BackboneError: the base cannot be found or loaded.
            MisconfigurationException: the base post-processes its logits, or lacks a target module.
        """
        if self.model is None:
            super().configure_model()
            # With dropout, sequences would lose the same inputs where they share them.
            plain = self.hparams["dropout"] == 0
            self._shares_prefixes = plain and can_share_prefixes(self.language_model)

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
        if self.trainer.state.fn == TrainerFn.FITTING:
            rewind_to_optimizer_step(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits: loading is not strict, so nothing else would.

        The learning rate and weight decay of the command line take the place of the checkpoint's.

        Raises:
            MisconfigurationException: other target modules, another rank, another base, or the state
                of another optimizer.
        """
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            optimizer = checkpoint.get("hyper_parameters", {}).get("optimizer", "adamw")
            check_same_state(self.optimizer, optimizer)
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
        self._resumed_from = {"loops": checkpoint["loops"]} if "loops" in checkpoint else None
        for state, scheduler in zip(
            checkpoint.get("optimizer_states", []),
            checkpoint.get("lr_schedulers", []),
            strict=False,
        ):
            use_learning_rate(state, scheduler, self.learning_rate, self.weight_decay)

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

    def _rows(self, batch: Batch, chosen: Tensor | None = None) -> list[Any]:
        """Return the ids of the rows of all processes, or of those that are chosen."""
        ids = [getattr(row, "id", index) for index, row in enumerate(batch["rows"])]
        if chosen is not None:
            ids = [row for row, take in zip(ids, chosen.tolist(), strict=True) if take]
        return [row for part in gather(ids, self.trainer) for row in part]

    def _live_adapter(self) -> LoraAdapter:
        assert isinstance(self.model, PeftModel), "configure_model has not run"
        return live_adapter(self.model, identity(self.base))

    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}
