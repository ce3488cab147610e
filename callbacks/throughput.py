"""Training speed."""

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``tokens_per_second``: tokens trained on, without padding, in all processes together.

    The rate is that of the last ``window`` batches, with data loading and without validation. The
    other processes' batches are taken to be as large as this one's.

    Args:
        window: number of batches the rate is averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput.window must be at least 1, got {window}")
        self._batches: deque[tuple[int, float]] = deque(maxlen=window)
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._batches.clear()
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of validation out."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the rate."""
        now = time.perf_counter()
        self._batches.append((int(batch["attention_mask"].sum()), now - self._since))
        self._since = now
        tokens = sum(count for count, _ in self._batches) * trainer.world_size
        seconds = sum(duration for _, duration in self._batches)
        pl_module.log("tokens_per_second", tokens / seconds, prog_bar=True)
