"""Completion NLL."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from sst_lightning.metrics.per_example import PerExampleMetric


class CompletionNLL(PerExampleMetric):
    """NLL per completion token over the whole set, in nats: Σ nll / Σ tokens."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", default=[], dist_reduce_fx="cat")
        self.tokens: list[Tensor]

    def update(self, ids: Sequence[str], nll: Tensor, tokens: Tensor) -> None:
        """Add sequences.

        Args:
            ids: row ids.
            nll: summed NLL of each sequence, (B,).
            tokens: completion tokens of each sequence, (B,).
        """
        self.add(ids, nll)
        self.tokens.append(tokens.to(device=self.device, dtype=torch.float64))

    def add_nothing(self) -> None:
        """Take part in gathering without sequences."""
        self.update([], torch.zeros(0), torch.zeros(0))

    def compute(self) -> Tensor:
        """Return the NLL per token."""
        return self._all(self.values).sum() / self._all(self.tokens).sum()

    def token_counts(self) -> dict[int, float]:
        """Return the number of completion tokens of each example by row key."""
        with self.sync_context(should_sync=self._is_distributed()):
            keys, tokens = self._all(self.keys).tolist(), dim_zero_cat(self.tokens).tolist()
        return {int(key): float(value) for key, value in zip(keys, tokens, strict=True)}
