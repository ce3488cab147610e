"""Greedy answers to a few validation prompts, in TensorBoard."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.strategies import is_sharded


class SampleLogger(Callback):
    """Writes prompts, greedy answers and references as text ``samples`` after each validation.

    The prompts are spread over the first validation dataloader, whose batches are sorted by
    length. They are answered as one batch, on rank zero; not at all under ``fsdp``.

    Args:
        count: number of prompts.
        max_new_tokens: upper bound on the length of an answer, in tokens.
    """

    def __init__(self, count: int = 4, max_new_tokens: int = 32) -> None:
        if count < 1 or max_new_tokens < 1:
            raise ValueError("SampleLogger.count and max_new_tokens must be at least 1")
        self.count = count
        self.max_new_tokens = max_new_tokens
        self._prompts: list[tuple[Tensor, Any]] = []
        self._sharded = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that answers can be made and have somewhere to go.

        Raises:
            MisconfigurationException: no TensorBoardLogger, or a module without generate_text.
        """
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage != "fit" or fast_dev_run:
            return
        if not isinstance(pl_module, CausalLMModule):
            raise MisconfigurationException(
                f"SampleLogger needs a CausalLMModule, not {type(pl_module).__name__}"
            )
        self._sharded = is_sharded(pl_module)
        if self._sharded:
            rank_zero_warn(
                "SampleLogger writes no answers under trainer.strategy fsdp: it answers on rank zero "
                "alone, where a sharded model would wait for the other processes"
            )
        if not _writers(trainer):
            raise MisconfigurationException(
                "SampleLogger writes to TensorBoard: give the Trainer a TensorBoardLogger"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation's prompts."""
        self._prompts = []

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take prompts from evenly spaced batches."""
        if not self._active(trainer) or dataloader_idx != 0:
            return
        batches = int(trainer.num_val_batches[0])
        if batch_idx % max(1, batches // self.count):
            return
        wanted = min(math.ceil(self.count / batches), self.count - len(self._prompts))
        rows = zip(batch["prompt_ids"], batch["prompt_mask"], batch["rows"], strict=True)
        for ids, mask, row in list(rows)[:wanted]:
            self._prompts.append((ids[mask.bool()], row))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the prompts and write the text."""
        if not self._active(trainer) or not self._prompts:
            return
        assert isinstance(pl_module, CausalLMModule)
        pad_id = pl_module.tokenizer.pad_token_id
        answers = pl_module.generate_text(
            _left_padded([ids for ids, _ in self._prompts], pad_id), self.max_new_tokens
        )
        parts = []
        for (ids, row), answer in zip(self._prompts, answers, strict=True):
            prompt = str(pl_module.tokenizer.decode(ids, skip_special_tokens=True))
            parts.append(f"**Prompt**\n\n{_block(prompt)}\n\n**Answer**\n\n{_block(answer)}")
            reference = getattr(row, "response", None)
            if reference is not None:
                parts[-1] += f"\n\n**Reference**\n\n{_block(reference)}"
        for writer in _writers(trainer):
            writer.experiment.add_text("samples", "\n\n---\n\n".join(parts), trainer.global_step)

    def _active(self, trainer: Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        return fitting and not fast_dev_run and not self._sharded and trainer.is_global_zero


def _writers(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _block(text: str) -> str:
    """Return ``text`` as an indented Markdown block, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _left_padded(prompts: list[Tensor], pad_id: int) -> dict[str, Tensor]:
    width = max(len(ids) for ids in prompts)
    padded = [torch.nn.functional.pad(ids, (width - len(ids), 0), value=pad_id) for ids in prompts]
    masks = [
        torch.nn.functional.pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in prompts
    ]
    return {"prompt_ids": torch.stack(padded), "prompt_mask": torch.stack(masks)}
