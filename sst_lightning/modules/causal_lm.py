"""A frozen causal language model under Lightning: completion NLL and greedy generation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sst_lightning.modules.backbone import (
    Attention,
    Dtype,
    Quantization,
    backbone_fingerprint,
    load_backbone,
    load_tokenizer,
)
from sst_lightning.modules.generation import Answer, can_hide, continue_prompts, stop_tokens
from sst_lightning.modules.head_nll import token_nll
from sst_lightning.modules.plain_head import check_plain_head
from sst_lightning.modules.strategies import check_strategy, is_sharded, shard

Batch = Mapping[str, Any]


class CausalLMModule(LightningModule):
    """A base model with what every stage needs of it; subclasses override :meth:`build_model`.

    Args:
        base: alias, hub id or folder (:func:`sst_lightning.modules.backbone.resolve`).
        dtype: dtype of the base weights.
        attention: attention implementation (``auto``: sdpa, on the CPU eager).
        quantization: ``nf4`` for 4-bit linear layers.

    Attributes:
        model: the transformers or PEFT model; ``None`` until ``configure_model``.
        tokenizer: the base's tokenizer.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.dtype_name = dtype
        self.attention = attention
        self.quantization = quantization
        self.model: PreTrainedModel | PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._base_fingerprint: str | None = None
        self._validation_nll = nn.ModuleList()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base)
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Refuse a strategy that the stage cannot run under.

        Raises:
            MisconfigurationException: names strategy, stage and remedy.
        """
        check_strategy(self.trainer.strategy, stage)

    def configure_model(self) -> None:
        """Load the model once, in the Trainer's entry point (or call it yourself without one).

        Raises:
            BackboneError: the base cannot be found or loaded.
            MisconfigurationException: the base post-processes its logits.
        """
        if self.model is None:
            model = self.build_model()
            check_plain_head(self.causal_lm(model))
            if is_sharded(self):
                # Of whole weights: what a process holds of them later depends on their number.
                self._base_fingerprint = backbone_fingerprint(model)
                assert self.device_mesh is not None
                mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
                shard(self.causal_lm(model), mesh, device)
            self.model = model

    def build_model(self) -> PreTrainedModel | PeftModel:
        """Return the model; a subclass adds adapters here."""
        return self.load_base()

    def load_base(self) -> PreTrainedModel:
        """Load the frozen base on this process's device, or on the CPU if it will be sharded."""
        trainer = self._trainer
        device = trainer.strategy.root_device if trainer is not None else self.device
        if is_sharded(self):
            if self.quantization is not None:
                raise MisconfigurationException(
                    "trainer.strategy fsdp cannot shard 4-bit weights: use ddp with "
                    "model.quantization: nf4, or fsdp without it"
                )
            device = torch.device("cpu")
        return load_backbone(
            self.base, self.dtype_name, self.attention, self.quantization, device=device
        )

    def base_fingerprint(self) -> str:
        """Hash of the base model (computed once)."""
        if self._base_fingerprint is None:
            assert self.model is not None, "configure_model has not run"
            self._base_fingerprint = backbone_fingerprint(self.model)
        return self._base_fingerprint

    @staticmethod
    def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """Return the transformers model inside ``model``, with PEFT's layers in place."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(inner, PreTrainedModel)
        return inner

    def sequence_nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the summed completion NLL of each sequence.

        The language-model head sees only the positions that predict a label, gathered into a
        (positions, width) matrix: on an instruction batch the head of a small model is otherwise
        most of the cost, and a 3-D slice makes torch copy its weight for every batch row.

        Padding is on the right, so causal attention keeps it away from every real token: the
        result does not depend on it.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels`` (B, T); a label is the token at
                its own position, -100 where there is none.

        Returns:
            NLL in nats, fp32 (B,), and number of labelled tokens (B,).
        """
        lm = self.language_model
        hidden = lm.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        return completion_nll(lm, hidden, batch["labels"])

    @torch.no_grad()
    def generate_text(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """Answer each prompt greedily.

        Args:
            batch: ``prompt_ids`` and ``prompt_mask`` (B, T), padded on the left.
            max_new_tokens: upper bound on the length of an answer, in tokens.

        Returns:
            The answers without the end-of-turn token; their text is not stripped.
        """
        lm, prompt_mask = self.language_model, batch["prompt_mask"]
        with self.evaluating():
            output = lm.get_decoder()(
                input_ids=batch["prompt_ids"],
                attention_mask=prompt_mask,
                position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=True,
            )
            answers = continue_prompts(
                lm,
                output.last_hidden_state[:, -1],
                output.past_key_values,
                prompt_mask,
                max_new_tokens,
                self.stop_ids,
            )
        return self.texts(answers)

    @torch.no_grad()
    def score_and_answer(
        self, batch: Batch, max_new_tokens: int
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Score the given completion and answer the prompt, in one pass over the prompt.

        The keys and values of the given completion stay in the cache; the answer's attention mask
        hides them, and its positions continue from the prompt. A model whose cache forgets (sliding
        windows, recurrent states) reads the prompt twice.

        Args:
            batch: as in :meth:`sequence_nll`, every row with a completion.
            max_new_tokens: upper bound on the length of an answer, in tokens.

        Returns:
            What :meth:`sequence_nll` and :meth:`generate_text` return.
        """
        lm, ids, lengths = self.language_model, batch["input_ids"], batch["prompt_mask"].sum(1)
        with self.evaluating():
            output = lm.get_decoder()(
                input_ids=ids, attention_mask=batch["attention_mask"], use_cache=True
            )
            hidden = output.last_hidden_state
            nll, tokens = completion_nll(lm, hidden, batch["labels"])
            if not can_hide(output.past_key_values):
                return nll, tokens, self.generate_text(batch, max_new_tokens)
            sequences = torch.arange(len(ids), device=ids.device)
            positions = torch.arange(ids.shape[1], device=ids.device)
            answers = continue_prompts(
                lm,
                hidden[sequences, lengths - 1],
                output.past_key_values,
                (positions < lengths[:, None]).long(),
                max_new_tokens,
                self.stop_ids,
            )
        return nll, tokens, self.texts(answers)

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, with PEFT's layers in place."""
        assert self.model is not None, "configure_model has not run"
        return self.causal_lm(self.model)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_tokens(self.tokenizer, self.language_model)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off; with gradient checkpointing a model in training mode has no cache."""
        assert self.model is not None, "configure_model has not run"
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """Return the text of answers; it is not stripped."""
        tokens = [answer.tokens for answer in answers]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Compute the completion NLL of a batch, and add it to ``val_nll``, its mean per token.

        Args:
            batch: one that has ``known_nll`` (its NLL and tokens, or those of none of its sequences)
                is not computed: a Fisher collection that was interrupted has it, or one that stops
                early leaves it out.
            batch_idx: number of the batch.
            dataloader_idx: number of the validation dataloader.

        Returns:
            ``sequence_nll`` (B,), with its graph where gradients are enabled, and ``tokens`` (B,).
        """
        known = batch.get("known_nll")
        nll, tokens = self.sequence_nll(batch) if known is None else known
        metric = self._validation_nll[dataloader_idx]
        assert isinstance(metric, MeanMetric)
        metric.update(nll.detach() / tokens.clamp(min=1), weight=tokens)
        return {"sequence_nll": nll, "tokens": tokens}

    def on_validation_epoch_start(self) -> None:
        """Open one running mean per validation dataloader."""
        loaders = len(self.trainer.num_val_batches)
        self._validation_nll = nn.ModuleList(MeanMetric() for _ in range(loaders)).to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_nll``; with several dataloaders ``val_nll/<name>`` (or their index)."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        for index, metric in enumerate(self._validation_nll):
            assert isinstance(metric, MeanMetric)
            single = len(self._validation_nll) == 1
            name = "val_nll" if single else f"val_nll/{names[index] if names else index}"
            # A mean weighted by tokens over all processes, which self.log(sync_dist=True) is not:
            # it would average the processes' own means.
            self.log(name, metric.compute(), prog_bar=True)


def completion_nll(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each sequence's summed NLL from the last hidden states.

    The head sees the labelled positions only, gathered into a matrix (see
    :meth:`CausalLMModule.sequence_nll`).

    Args:
        model: gives the language-model head.
        hidden: (B, T, width), or (1, N, width) with ``places``.
        labels: (B, T), -100 where there is none.
        places: (B, T) which of N states belongs to each position.

    Returns:
        NLL in nats, fp32 (B,), and number of labelled tokens (B,).
    """
    # The state at position t predicts token t + 1.
    labels = labels[:, 1:]
    sequence, position = (labels != -100).nonzero(as_tuple=True)
    index = (sequence, position) if places is None else (0, places[sequence, position])
    head = model.get_output_embeddings()
    nll = token_nll(head, hidden[index], labels[sequence, position])
    total = nll.new_zeros(labels.shape[0]).index_add(0, sequence, nll)
    return total, (labels != -100).sum(1)
