"""The loss of one optimizer step: the mean NLL of its completion tokens, wherever they were."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn


class TokenMean:
    """Weights each batch of an optimizer step by its completion tokens.

    DDP takes the mean of the processes' gradients, and the Trainer that of the accumulated batches,
    as if all had equally many tokens. With K processes and n batches in a step, this gives each
    process Σ nll · K / c for backward, where c is the first batch's number of tokens in all
    processes, and multiplies the gradient that DDP and the Trainer make of it by n c / C, where C is
    that of all n batches: the gradient of the mean over all C tokens. Without accumulation the factor
    is 1. A step depends on its rows alone, not on how they are divided.

    Attributes:
        nll: summed NLL of the step's batches so far, in nats, over all processes.
        tokens: number of their completion tokens.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the batches of a step that was made, or never will be."""
        self.nll = 0.0
        self.tokens = 0.0
        self._first = 0.0

    @property
    def value(self) -> float:
        """Mean NLL per completion token of the step's batches so far."""
        return self.nll / self.tokens

    def add(self, nll: Tensor, tokens: Tensor, trainer: Trainer) -> tuple[float, float]:
        """Take up one batch; every process must call it with its part.

        Args:
            nll: summed NLL of each sequence (B,).
            tokens: number of completion tokens of each sequence (B,).
            trainer: of the run.

        Returns:
            Summed NLL and number of tokens of the batch, over all processes.
        """
        sums = torch.stack([nll.detach().sum(), tokens.sum().to(nll.dtype)])
        # Both in one collective, and one wait for the device.
        batch_nll, batch_tokens = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.nll += batch_nll
        self.tokens += batch_tokens
        self._first = self._first or batch_tokens
        return batch_nll, batch_tokens

    def loss(self, nll: Tensor, trainer: Trainer) -> Tensor:
        """Return what backward starts from, for the batch that was just added."""
        return nll.sum() * (trainer.world_size / self._first)

    def rescale(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Make the accumulated gradients that of the mean over the step's tokens; then start anew.

        Args:
            parameters: trained weights.
            accumulated: number of batches that the Trainer divides each batch's loss by.
        """
        factor = accumulated * self._first / self.tokens
        if factor != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self.reset()
